"""Print the tables of which precision, exchange and Transformer Engine go together, or renew them in a document."""

import argparse
from pathlib import Path

from nemo_prolong.config.rules.constraint_table import markdown, refresh


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("document", type=Path, nargs="?", help="Markdown file to renew; without one, print")
    document = parser.parse_args().document
    if document is None:
        print(markdown())
    else:
        document.write_text(refresh(document.read_text()))


if __name__ == "__main__":
    main()
