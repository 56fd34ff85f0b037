"""Turn documents into the data of a stage: tokenizer, packed rows, manifest, data card."""

import sys

from nemo_prolong.config.cli import hydra_script
from nemo_prolong.config.schema.prepare import PrepareConfig
from nemo_prolong.distributed.launched import refuse_several_ranks
from nemo_prolong.errors import DataError

DESCRIPTION = """\
Turn documents (JSON lines, Parquet, datasets directories, text, repositories, tokenized or packed MDS) into packed rows
with a manifest and a data card. Goes on where a killed run stopped."""

EXAMPLES = [
    "python scripts/prepare_data.py +exp=data/mini",
    "python scripts/prepare_data.py +exp=data/ultrachat_64k tokenizer.path=models/Meta-Llama-3-8B-Instruct workers=32",
    "python scripts/prepare_data.py output=data/books tokenizer.path=models/Meta-Llama-3-8B-Instruct "
    "'sources=[{domain:books,path:corpus/books}]' "
    "'row_sets=[{path:books-65536,domain:books,seq_length:64K,document_length:64K}]'",
]


def run(cfg: PrepareConfig, overrides: list[str]) -> None:
    """Prepare; heavy imports happen only here."""
    refuse_several_ranks("scripts/prepare_data.py")
    from nemo_prolong.data.preparation.manifest import command_line
    from nemo_prolong.data.preparation.run import prepare
    from nemo_prolong.logs import console_logging
    from nemo_prolong.report.data_card.write import write_card

    with console_logging():
        prepare(cfg, command=command_line(sys.argv[1:]), finish=write_card)


def main() -> None:
    """Read the command line."""
    hydra_script(
        PrepareConfig,
        "prepare_data",
        run,
        DESCRIPTION,
        EXAMPLES,
        help_overrides=["+exp=data/mini"],
        os_errors=DataError,
    )


if __name__ == "__main__":
    main()
