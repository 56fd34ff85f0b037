"""Export a trained run."""

from nemo_prolong.config.app import hydra_script
from nemo_prolong.config.schema import ExportConfig

DESCRIPTION = """\
Write a run as a Hugging Face directory (weights, config, tokenizer) and compare it with the Megatron model."""

EXAMPLES = [
    "python scripts/export.py",
    "python scripts/export.py run=runs/sft output=exports/llama3-8b-512k dtype=bf16",
]


def run(cfg: ExportConfig, overrides: list[str]) -> None:
    """Export; torch is imported only here."""
    from nemo_prolong.export.run import export

    export(cfg)


def main() -> None:
    """Read the command line."""
    hydra_script(ExportConfig, "export", run, DESCRIPTION, EXAMPLES)


if __name__ == "__main__":
    main()
