"""Evaluate trained or exported models."""

from nemo_prolong.config.cli import hydra_script
from nemo_prolong.config.schema import EvaluateConfig
from nemo_prolong.distributed.launched import refuse_several_ranks
from nemo_prolong.errors import CheckpointError

DESCRIPTION = """\
Measure perplexity by position in long documents, and key-value recall by prompt length. A run directory is read through
Megatron, hf:DIR through transformers. Results go to RUN/eval, and beside DIR to DIR_eval."""

EXAMPLES = [
    "python scripts/evaluate.py",
    "python scripts/evaluate.py 'models=[runs/demo/stage2,hf:runs/demo/export/hf]' recall_samples=16",
    "python scripts/evaluate.py 'models=[runs/stage2]' rows=DIRECTORY 'recall_lengths=[64K,512K]'",
]


def run(cfg: EvaluateConfig, overrides: list[str]) -> None:
    """Evaluate; torch is imported only here."""
    refuse_several_ranks("scripts/evaluate.py")
    from nemo_prolong.evaluate.run import evaluate

    evaluate(cfg)


def main() -> None:
    """Read the command line."""
    hydra_script(EvaluateConfig, "evaluate", run, DESCRIPTION, EXAMPLES, os_errors=CheckpointError)


if __name__ == "__main__":
    main()
