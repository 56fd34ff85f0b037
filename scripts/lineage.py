"""Print the chain of runs that led to a run: tokens, RoPE bases, losses, versions of every stage."""

import argparse

from nemo_prolong.config.ending import clean_ending, end_with_the_reader
from nemo_prolong.errors import CheckpointError
from nemo_prolong.report.terminal.layout import open_console
from nemo_prolong.report.terminal.lineage import chain_of, describe_chain


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="run directory, such as runs/sft")
    run = parser.parse_args().run
    with clean_ending(CheckpointError):
        end_with_the_reader()
        open_console().print(describe_chain(chain_of(run)), soft_wrap=True)


if __name__ == "__main__":
    main()
