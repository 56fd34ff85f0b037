"""Train a chain of stages and export the last one."""

from nemo_prolong.config.cli import hydra_script, typed_config_dir
from nemo_prolong.config.schema.recipe import RecipeConfig
from nemo_prolong.distributed.launched import refuse_several_ranks
from nemo_prolong.errors import CheckpointError

DESCRIPTION = """\
Train the stages of a recipe one after the other and export the last one. Each stage runs as scripts/train.py would run
it, in processes of its own. The same command goes on at the stage and step where it was."""

EXAMPLES = [
    "python scripts/recipe.py +exp=mini/recipe dry_run=true      # what would be done",
    "python scripts/recipe.py +exp=mini/recipe",
    "python scripts/recipe.py +exp=mini/recipe ranks=2 'overrides=[\"runs_dir=elsewhere\"]' export_overrides=null",
]


def run(cfg: RecipeConfig, overrides: list[str]) -> None:
    """Run what is left of the recipe; NeMo is imported in its children only."""
    refuse_several_ranks("scripts/recipe.py")
    from nemo_prolong.export.run import check_planned
    from nemo_prolong.logs import console_logging
    from nemo_prolong.stages.recipe_run import run_recipe

    with console_logging():
        run_recipe(cfg, typed_config_dir(), check_planned)


def main() -> None:
    """Read the command line."""
    hydra_script(
        RecipeConfig,
        "recipe",
        run,
        DESCRIPTION,
        EXAMPLES,
        help_overrides=["+exp=mini/recipe"],
        os_errors=CheckpointError,
    )


if __name__ == "__main__":
    main()
