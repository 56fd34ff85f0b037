"""Train one stage of the recipe."""

from nemo_prolong.config.cli import hydra_script
from nemo_prolong.config.rules import check_world, ranks_to_start
from nemo_prolong.config.schema import RunConfig
from nemo_prolong.distributed.devices import visible_gpus
from nemo_prolong.distributed.launched import take_place
from nemo_prolong.distributed.processes import run_ranks
from nemo_prolong.errors import CheckpointError

DESCRIPTION = """\
Train one stage: a base model, stage 1 (64K), stage 2 (512K) or SFT. The stage is an experiment, chosen with a plus
sign; anything typed after it wins. Results go to runs/NAME. The same command resumes a run that was stopped."""

EXAMPLES = [
    "python scripts/train.py +exp=mini/base                            # miniature, on a CPU; then mini/stage1, ...",
    "python scripts/train.py +exp=stage1 parent=hf:DIR                 # 8 GPUs; DIR: Llama-3-8B-Instruct",
    "srun python scripts/train.py +exp=stage2 parent=runs/stage1       # in a Slurm job with a task for each GPU",
    "python scripts/train.py +exp=stage2 --cfg job                     # print the configuration, train nothing",
    "python scripts/train.py +exp=mini/stage1 name=try seq_length=4K train.train_iters=100",
]


def run(cfg: RunConfig, overrides: list[str]) -> None:
    """Train as the rank that a launcher started, or start the ranks of this machine; torch is imported only here."""
    place = take_place()
    if place is not None:
        check_world(cfg, place.world_size, overrides)
    elif (ranks := ranks_to_start(cfg, visible_gpus(), overrides)) > 1:
        raise SystemExit(run_ranks(ranks))
    from nemo_prolong.stages.run import run_stage

    run_stage(cfg, overrides)


def main() -> None:
    """Read the command line."""
    hydra_script(
        RunConfig, "train", run, DESCRIPTION, EXAMPLES, help_overrides=["+exp=mini/base"], os_errors=CheckpointError
    )


if __name__ == "__main__":
    main()
