"""Run what is left of a recipe, every part in processes of its own.

Nothing is remembered between two starts of the command. What is done is read from ``stage.json`` and the checkpoints.
The ranks are started here and not by torchrun, see ``distributed.processes``.
"""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Callable, Sequence

from nemo_prolong.config.commands import shell_command
from nemo_prolong.config.compose import CONFIG_DIR
from nemo_prolong.config.schema import ExportConfig, ModelConfig
from nemo_prolong.config.schema.recipe import RecipeConfig
from nemo_prolong.distributed.processes import RankProcesses, exit_code, handing_on_signals
from nemo_prolong.errors import EXIT_PREEMPTED
from nemo_prolong.stages.recipe_plan import RecipePlan, plan_recipe

log = logging.getLogger(__name__)

CheckExport = Callable[[ExportConfig, ModelConfig, int], None]
"""Refuses an export by its configuration, the model and the advertised context, before the model is trained."""


def run_recipe(cfg: RecipeConfig, config_flags: Sequence[str] = (), check_export: CheckExport | None = None) -> None:
    """Train the stages that are left, evaluate the last one and export it. The same command again resumes where it was.

    Args:
        cfg: The recipe.
        config_flags: See ``plan_recipe``.
        check_export: Called for the export if it is not complete; raises what the export would refuse.

    Raises:
        ConfigError: If a stage cannot be composed, or the parents do not make a chain.
        DataError: If rows that a stage needs are missing.
        CheckpointError: If a run directory holds something else.
        ExportError: If the model could not be exported as configured.
        SystemExit: With ``EXIT_PREEMPTED`` if a part was asked to stop, else with the code of the part that failed.
    """
    plan = plan_recipe(cfg, config_flags)
    for number, line in enumerate(plan.describe(), start=1):
        log.info("%d. %s", number, line)
    if check_export is not None and plan.export and not plan.export.is_complete(plan.stages[-1]):
        check_export(plan.export.cfg, plan.stages[-1].cfg.model, plan.advertised_context_length)
    if cfg.dry_run:
        return
    with handing_on_signals() as processes:
        _train(plan, processes, cfg.ranks)
        last = plan.stages[-1]
        if plan.evaluation and not plan.evaluation.is_complete(last):
            log.info(plan.evaluation.describe(last))
            _run(processes, "evaluate.py", plan.evaluation.arguments, 1)
        if plan.export and not plan.export.is_complete(last):
            log.info(plan.export.describe(last))
            _run(processes, "export.py", plan.export.arguments, 1)
    log.info("the recipe is complete: %s", plan.export.cfg.output if plan.export else last.cfg.run_dir)


def _train(plan: RecipePlan, processes: RankProcesses, ranks: int) -> None:
    while (number := plan.next_stage()) is not None:
        stage = plan.stages[number]
        log.info(stage.describe())
        _run(processes, "train.py", stage.arguments, ranks)
        if not stage.is_complete:
            log.error("%s ended well and is not complete", stage.cfg.run_dir)
            raise SystemExit(1)


def _run(processes: RankProcesses, script: str, arguments: Sequence[str], ranks: int) -> None:
    """Run a script on some ranks to its end.

    Raises:
        SystemExit: If it did not end well, or a request to stop was received.
    """
    try:
        processes.start([sys.executable, str(CONFIG_DIR.parent / "scripts" / script), *arguments], ranks)
        status = processes.wait()
    finally:
        processes.kill()
    if processes.received is not None or status == EXIT_PREEMPTED:
        log.warning("stopped; the same command goes on")
        raise SystemExit(EXIT_PREEMPTED)
    if status:
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with {status}"
        log.error("%s %s; the same command goes on", shell_command([script, *arguments]), how)
        raise SystemExit(exit_code(status))
