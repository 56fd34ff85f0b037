"""Write or submit what starts a stage, or a chain of stages."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from nemo_prolong.config.cli import hydra_script, typed_config_flags
from nemo_prolong.config.commands import typed
from nemo_prolong.config.findings import raise_all
from nemo_prolong.config.rules import check_world
from nemo_prolong.config.rules.launch import files_in_image
from nemo_prolong.config.schema import LaunchTarget, RunConfig
from nemo_prolong.config.schema.recipe import RecipeConfig
from nemo_prolong.launch.files import plan_launch, submitted_by
from nemo_prolong.launch.parts import LaunchPart, of_the_launch, recipe_arguments, without_launch
from nemo_prolong.plan.time_limits import with_job_limits
from nemo_prolong.records.run_directory import RunDirectory

DESCRIPTION = """\
Print what starts one stage, or with recipe=NAME a chain of stages: a Slurm job, a manifest for Kubernetes, a Docker
command or a plain one (launch.target). It takes what scripts/train.py takes, or for a chain what scripts/recipe.py
takes. The group cluster says where and with what around it, the group parallelism on how many GPUs. launch.submit=true
keeps the files in the run directory and submits them."""

EXAMPLES = [
    "python scripts/launch.py +exp=stage2 cluster.partition=h100                  # print the job",
    "python scripts/launch.py +exp=stage2 cluster.partition=h100 launch.submit=true",
    "python scripts/launch.py recipe=prolong parent=hf:DIR launch.submit=true     # the whole chain",
    "python scripts/launch.py +exp=mini/stage1 launch.target=local launch.submit=true",
]


def launch(parts: list[LaunchPart]) -> None:
    """Print, keep or submit the files that start these parts."""
    settings, planned = parts[0].launch, plan_launch(parts, Path.cwd())
    if settings.only_prints:
        sys.stdout.write(planned.text())
        return
    planned.write()
    for path, _ in planned.files:
        print(path)
    if settings.submit:
        raise SystemExit(planned.submit())
    print(submitted_by(planned))


def job_arguments(cfg: RunConfig, arguments: Sequence[str]) -> list[str]:
    """Return what is typed after scripts/train.py in a job. One that starts again after the last step has succeeded."""
    starts_again = cfg.launch.target in (LaunchTarget.SLURM, LaunchTarget.KUBERNETES)
    is_typed = any(argument.startswith("resume.when_complete=") for argument in arguments)
    return [*without_launch(arguments), *(["resume.when_complete=succeed"] if starts_again and not is_typed else [])]


def stage_part(cfg: RunConfig, arguments: Sequence[str]) -> LaunchPart:
    """Return the part that trains a stage, with the time limits that follow from its steps."""
    part = LaunchPart.of_stage(cfg, job_arguments(cfg, arguments))
    return replace(part, cfg=with_job_limits(cfg, RunDirectory(part.run_dir(Path.cwd()))))


def launch_stage(cfg: RunConfig, overrides: list[str]) -> None:
    """Start a stage on the planned number of ranks."""
    check_world(cfg, cfg.parallelism.planned_world_size, overrides)
    launch([stage_part(cfg, [*typed_config_flags(), *overrides])])


def launch_recipe(cfg: RecipeConfig, overrides: list[str]) -> None:
    """Start the parts of a recipe, each when the one before it has ended well."""
    from nemo_prolong.stages.recipe_plan import compose_recipe

    # What is typed for cluster and launch is of every stage.
    flags, settings = typed_config_flags(), of_the_launch(sys.argv[1:])
    plan = compose_recipe(cfg.model_copy(update={"overrides": [*cfg.overrides, *settings]}), flags)
    for stage in plan.stages:
        check_world(stage.cfg, stage.cfg.parallelism.planned_world_size, stage.arguments)
    parts = [stage_part(stage.cfg, stage.arguments) for stage in plan.stages]
    last = parts[-1].cfg
    if plan.evaluation:
        rows = plan.evaluation.cfg.rows
        raise_all(files_in_image(last.cluster, {typed("rows", rows): rows}, written=False))
    if plan.export:
        output = plan.export.cfg.output
        raise_all(files_in_image(last.cluster, {typed("output", output): output}, written=True))
    if last.launch.target in (LaunchTarget.DOCKER, LaunchTarget.LOCAL):
        ranks = max(stage.cfg.parallelism.ranks_per_node for stage in plan.stages)
        more = [] if cfg.ranks > 1 else [f"ranks={ranks}"]
        launch([LaunchPart(last.name, "recipe.py", (*flags, *overrides, *more), last)])
        return
    after = {"evaluate.py": plan.evaluation, "export.py": plan.export}
    parts += [
        LaunchPart(
            f"{last.name}-{script.removesuffix('.py')}", script, (*part.arguments, "when_complete=succeed"), last
        )
        for script, part in after.items()
        if part
    ]
    launch(parts)


def main() -> None:
    """Read the command line, which is that of a recipe where it names one."""
    arguments = recipe_arguments(sys.argv[1:])
    if arguments is None:
        hydra_script(RunConfig, "train", launch_stage, DESCRIPTION, EXAMPLES, help_overrides=["+exp=stage2"])
        return
    hydra_script(RecipeConfig, "recipe", launch_recipe, DESCRIPTION, EXAMPLES, arguments=arguments)


if __name__ == "__main__":
    main()
