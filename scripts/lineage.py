"""Print the chain of runs that led to a run: tokens, RoPE bases, losses, versions of every stage."""

import argparse
import sys

from nemo_prolong.errors import ProlongError
from nemo_prolong.report.terminal.layout import open_console
from nemo_prolong.report.terminal.lineage import chain_of, describe_chain


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="run directory, such as runs/sft")
    try:
        open_console().print(describe_chain(chain_of(parser.parse_args().run)), soft_wrap=True)
    except ProlongError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
