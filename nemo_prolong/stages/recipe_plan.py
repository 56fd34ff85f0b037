"""What a recipe consists of, and what of it is left to do. Needs no torch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_prolong.config.addresses import HF_PREFIX
from nemo_prolong.config.commands import hydra_override
from nemo_prolong.config.compose import compose
from nemo_prolong.config.rules import check_world
from nemo_prolong.config.schema import EvaluateConfig, ExportConfig, RunConfig
from nemo_prolong.config.schema.recipe import RecipeConfig, RecipeStage
from nemo_prolong.errors import ConfigError
from nemo_prolong.records.checkpoint.manifest import listed_steps, step_of
from nemo_prolong.records.checkpoint.verify import choose_checkpoint
from nemo_prolong.records.evaluation import evaluation_directory, is_current, state_of
from nemo_prolong.records.export_manifest import ExportManifest
from nemo_prolong.records.run_directory import RunDirectory
from nemo_prolong.records.stage_manifest import StageManifest
from nemo_prolong.stages.preflight import (
    changed_settings,
    check_data,
    check_same_shape,
    check_tokenizer,
    refuse_other_run,
    stored_run,
)
from nemo_prolong.stages.stop_tokens import check_chat
from nemo_prolong.weights.hf_directory import HuggingFaceDirectory


@dataclass(frozen=True)
class PlannedStage:
    """One stage of a recipe.

    Attributes:
        cfg: The stage.
        arguments: What is typed after ``scripts/train.py``.
    """

    cfg: RunConfig
    arguments: tuple[str, ...]

    @property
    def run(self) -> RunDirectory:
        """Its run directory as it is now. Processes that were started meanwhile have written to it."""
        return RunDirectory(self.cfg.run_dir)

    @property
    def manifest(self) -> StageManifest | None:
        """How far it is, or None where it has not begun."""
        return stored_run(self.cfg, self.run)

    @property
    def is_complete(self) -> bool:
        """Whether its last step is trained. The files of its checkpoint are not looked at."""
        manifest = self.manifest
        return manifest is not None and manifest.status == "complete"

    def is_usable(self) -> bool:
        """Return whether it is complete and its last checkpoint is whole. This reads every file of it."""
        manifest = self.manifest
        if manifest is None or manifest.status != "complete":
            return False
        checkpoint = choose_checkpoint(self.run.path).checkpoint
        return checkpoint is not None and step_of(checkpoint) == manifest.step

    def describe(self) -> str:
        """Return its name and how far it is, in one line."""
        steps = listed_steps(self.run.path)
        done = self.cfg.train.train_iters if self.is_complete else max(steps, default=0)
        state = "complete" if self.is_complete else f"goes on after step {done}" if steps else "starts"
        return f"{self.cfg.stage} {self.cfg.run_dir}: {state}, {done} of {self.cfg.train.train_iters} steps"


@dataclass(frozen=True)
class PlannedExport:
    """The export of a recipe's last stage.

    Attributes:
        cfg: The export.
        arguments: What is typed after ``scripts/export.py``.
    """

    cfg: ExportConfig
    arguments: tuple[str, ...]

    def is_complete(self, last: PlannedStage) -> bool:
        """Return whether the output is this export of the last stage as it is now."""
        manifest = last.manifest
        return manifest is not None and ExportManifest.describes(self.cfg, manifest.step)

    def describe(self, last: PlannedStage) -> str:
        """Return what is written and whether it is, in one line."""
        return f"export {self.cfg.output}: {'complete' if self.is_complete(last) else 'starts'}"


@dataclass(frozen=True)
class PlannedEvaluation:
    """The evaluation of a recipe's last stage.

    Attributes:
        cfg: The evaluation.
        arguments: What is typed after ``scripts/evaluate.py``.
    """

    cfg: EvaluateConfig
    arguments: tuple[str, ...]

    def is_complete(self, last: PlannedStage) -> bool:
        """Return whether both results are of the last stage as it is now, and of these settings."""
        directory = Path(self.cfg.output) if self.cfg.output else evaluation_directory(last.cfg.run_dir)
        return is_current(directory, state_of(last.cfg.run_dir), self.cfg)

    def describe(self, last: PlannedStage) -> str:
        """Return what is evaluated and whether it was, in one line."""
        return f"evaluate {last.cfg.run_dir}: {'complete' if self.is_complete(last) else 'starts'}"


@dataclass(frozen=True)
class RecipePlan:
    """A recipe whose parts fit together."""

    stages: tuple[PlannedStage, ...]
    evaluation: PlannedEvaluation | None
    export: PlannedExport | None

    @property
    def advertised_context_length(self) -> int:
        """What the last stage will advertise, in tokens."""
        first, last = self.stages[0].cfg, self.stages[-1].cfg
        lengths = [_context_of_parent(first), *(stage.cfg.seq_length for stage in self.stages)]
        return last.advertised_context_length or max(lengths)

    def describe(self) -> list[str]:
        """Return one line a part."""
        after = [part.describe(self.stages[-1]) for part in (self.evaluation, self.export) if part]
        return [*(stage.describe() for stage in self.stages), *after]

    def next_stage(self) -> int | None:
        """Return the number of the stage that is to be trained next, or None when all are complete.

        That is the first that is not complete, or the one before it if its checkpoint is damaged and still needed.
        """
        number = next((number for number, stage in enumerate(self.stages) if not stage.is_complete), None)
        if number and not listed_steps(self.stages[number].run.path):
            while number and not self.stages[number - 1].is_usable():
                number -= 1
        return number


def _context_of_parent(cfg: RunConfig) -> int:
    """Return the tokens that the parent of a stage was trained for, 0 without one."""
    if cfg.parent is None:
        return 0
    if cfg.parent.startswith(HF_PREFIX):
        return HuggingFaceDirectory(Path(cfg.parent.removeprefix(HF_PREFIX))).context_length
    return StageManifest.read(Path(cfg.parent)).trained_context_length


def plan_recipe(cfg: RecipeConfig, config_flags: Sequence[str] = ()) -> RecipePlan:
    """Return the plan of a recipe, and change nothing.

    Args:
        cfg: The recipe.
        config_flags: Hydra's flags that say where the experiments are, for every part.

    Raises:
        ConfigError: If a stage cannot be composed, or the parents do not make a chain.
        DataError: If rows that a stage needs are missing.
        CheckpointError: If a run directory holds something else.
    """
    plan = compose_recipe(cfg, config_flags)
    for stage in plan.stages:
        check_world(stage.cfg, cfg.ranks, stage.arguments)
        _check_run(stage)
    return plan


def compose_recipe(cfg: RecipeConfig, config_flags: Sequence[str] = ()) -> RecipePlan:
    """Return the plan of a recipe without a look at any file.

    Args:
        cfg: The recipe.
        config_flags: Hydra's flags that say where the experiments are, for every part.

    Raises:
        ConfigError: If a stage cannot be composed, or the parents do not make a chain.
    """
    parent = [] if cfg.parent is None else [hydra_override("parent", cfg.parent)]
    stages = [
        _plan_stage(stage, [*cfg.overrides, *([] if number else parent)], config_flags)
        for number, stage in enumerate(cfg.stages)
    ]
    _check_chain(stages)
    last = stages[-1]
    return RecipePlan(
        tuple(stages), _plan_evaluation(cfg.evaluate_overrides, last), _plan_export(cfg.export_overrides, last)
    )


def _plan_stage(stage: RecipeStage, overrides: Sequence[str], config_flags: Sequence[str]) -> PlannedStage:
    arguments = (*config_flags, f"+exp={stage.exp}", *overrides, *stage.overrides)
    return PlannedStage(compose(RunConfig, "train", arguments), arguments)


def _plan_evaluation(overrides: Sequence[str] | None, last: PlannedStage) -> PlannedEvaluation | None:
    if overrides is None:
        return None
    arguments = (*overrides, hydra_override("models", [last.cfg.run_dir]))
    return PlannedEvaluation(compose(EvaluateConfig, "evaluate", arguments), arguments)


def _plan_export(overrides: Sequence[str] | None, last: PlannedStage) -> PlannedExport | None:
    if overrides is None:
        return None
    arguments = (*overrides, hydra_override("run", last.cfg.run_dir))
    return PlannedExport(compose(ExportConfig, "export", arguments), arguments)


def _check_run(stage: PlannedStage) -> None:
    """Check what can be checked hours before the stage starts."""
    if stage.is_complete:
        run = stage.run
        refuse_other_run(stage.cfg, run, changed_settings(stage.cfg, run, run.manifest.step))
    else:
        data = check_data(stage.cfg)
        if stage.manifest is None:
            check_tokenizer(stage.cfg)
        check_chat(stage.cfg, data)


def _check_chain(stages: Sequence[PlannedStage]) -> None:
    """Refuse stages that do not start from the one before them."""
    for number, (before, stage) in enumerate(itertools.pairwise(stages), start=1):
        parent, expected = stage.cfg.parent, before.cfg.run_dir
        if parent is None or Path(parent) != Path(expected):
            raise ConfigError(
                f"stages[{number}] parent={parent or 'null'}",
                f"the stage before it is {expected}, and {stage.cfg.name} does not start from that.",
                f"Add {hydra_override('parent', expected)} to stages[{number}].overrides, or put the stages in order.",
            )
        check_same_shape(stage.cfg, before.cfg.model)
    directories = [stage.run.path for stage in stages]
    for number, directory in enumerate(directories):
        if directory in directories[:number]:
            raise ConfigError(
                f"stages[{number}] name={stages[number].cfg.name}",
                "another stage of the recipe has the same run directory.",
                f"Add name=... to stages[{number}].overrides.",
            )
