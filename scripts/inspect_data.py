"""Show what is in a data directory, a row set or some of its rows: ``python scripts/inspect_data.py DIR [ROW ...]``."""

import argparse
import sys

from nemo_prolong.config.ending import clean_ending, end_with_the_reader
from nemo_prolong.data.verify import verify
from nemo_prolong.errors import DataError, ProlongError
from nemo_prolong.report.terminal.layout import open_console
from nemo_prolong.report.terminal.row_sets import describe
from nemo_prolong.report.terminal.rows import RowView

EXAMPLES = """\
examples:
  python scripts/inspect_data.py runs/demo/data
  python scripts/inspect_data.py runs/demo/data/docs-2048
  python scripts/inspect_data.py runs/demo/data/chat-2048 0 17 --tokens 60
  python scripts/inspect_data.py runs/demo/data --verify"""


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Show the row sets of a data directory, or the rows of a row set as text with document boundaries.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("directory", metavar="DIR", help="a data directory, a row set, or any MDS directory")
    parser.add_argument("rows", metavar="ROW", nargs="*", help="numbers of rows to show; none gives a summary")
    parser.add_argument("--tokens", metavar="N", type=int, default=24, help="tokens around a boundary (default: 24)")
    parser.add_argument("--tokenizer", metavar="PATH", default="", help="tokenizer.json or its directory")
    parser.add_argument("--full", action="store_true", help="show all of a row's text and documents")
    parser.add_argument("--verify", action="store_true", help="check every hash instead")
    parser.add_argument("--no-color", action="store_true", help="mark targets with [[ ]] instead of colour")
    return parser.parse_args()


def main() -> None:
    """Print."""
    args = arguments()
    with clean_ending(DataError):
        end_with_the_reader()
        sys.exit(print_verification(args.directory) if args.verify else print_description(args))


def print_description(args: argparse.Namespace) -> int:
    """Print a directory or its rows; return the exit code."""
    console = open_console(color=not args.no_color)
    view = RowView(args.tokenizer, max(args.tokens, 0), args.full, console.color_system is not None)
    for part in describe(args.directory, args.rows, view):
        console.print(part, soft_wrap=True)
        console.print()
    return 0


def print_verification(directory: str) -> int:
    """Print what is whole, and on stderr what is not; return the exit code."""
    code = 0
    for finding in verify(directory):
        if isinstance(finding, ProlongError):
            code = finding.exit_code
        print(finding, file=sys.stderr if isinstance(finding, ProlongError) else sys.stdout, flush=True)
    return code


if __name__ == "__main__":
    main()
