"""Train one stage of the recipe."""

from nemo_prolong.config.cli import hydra_script
from nemo_prolong.config.rules import check_world, world_size_from_environment
from nemo_prolong.config.schema import RunConfig
from nemo_prolong.errors import CheckpointError

DESCRIPTION = """\
Train one stage: a base model, stage 1 (64K), stage 2 (512K) or SFT. The stage is an experiment, chosen with a plus
sign; anything typed after it wins. Results go to runs/NAME. The same command resumes a run that was stopped."""

EXAMPLES = [
    "python scripts/train.py +exp=mini/base                            # miniature, on a CPU; then mini/stage1, ...",
    "torchrun --nproc-per-node 8 scripts/train.py +exp=stage1 parent=hf:DIR   # DIR: Llama-3-8B-Instruct",
    "python scripts/train.py +exp=stage2 --cfg job                     # print the configuration, train nothing",
    "python scripts/train.py +exp=mini/stage1 name=try seq_length=4K train.train_iters=100",
]


def run(cfg: RunConfig, overrides: list[str]) -> None:
    """Refuse too few ranks, then train; torch is imported only here."""
    check_world(cfg, world_size_from_environment(), overrides)
    from nemo_prolong.stages.run import run_stage

    run_stage(cfg, overrides)


def main() -> None:
    """Read the command line."""
    hydra_script(
        RunConfig, "train", run, DESCRIPTION, EXAMPLES, help_overrides=["+exp=mini/base"], os_errors=CheckpointError
    )


if __name__ == "__main__":
    main()
