"""Export a trained run."""

from nemo_prolong.config.cli import hydra_script
from nemo_prolong.config.schema import ExportConfig
from nemo_prolong.distributed.launched import refuse_several_ranks
from nemo_prolong.errors import ExportError

DESCRIPTION = """\
Write a run as a Hugging Face directory, compare it with the Megatron model, and prepare it for a server if asked."""

EXAMPLES = [
    "python scripts/export.py",
    "python scripts/export.py run=runs/sft output=exports/llama3-8b-512k dtype=bf16",
    "python scripts/export.py export=trtllm run=runs/sft output=exports/llama3-8b-512k-fp8",
    "python scripts/export.py run=runs/sft dtype=bf16 export.push_to_hub=ORG/NAME export.hub_dry_run=true",
]


def run(cfg: ExportConfig, overrides: list[str]) -> None:
    """Export; torch is imported only here."""
    refuse_several_ranks("scripts/export.py")
    from nemo_prolong.export.run import export

    export(cfg)


def main() -> None:
    """Read the command line."""
    hydra_script(ExportConfig, "export", run, DESCRIPTION, EXAMPLES, os_errors=ExportError)


if __name__ == "__main__":
    main()
