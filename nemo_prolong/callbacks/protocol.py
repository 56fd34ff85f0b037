"""What a callback is, and what it may ask of the loop that calls it.

The loop is Lightning's today. Callbacks know these two classes and nothing of Lightning, so that another loop can call
them one day. ``engine.training.lightning_loop`` is the one place that would change.
"""

from __future__ import annotations

import graphlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

from nemo_prolong.data.batch import RankBatch
from nemo_prolong.records.checkpoint.manifest import CheckpointManifest


class CheckpointSave(Protocol):
    """One save, from its plan to its published directory. Every method is called on all ranks.

    Attributes:
        step: Optimizer steps of the state.
        final: Where the checkpoint will lie.
        manifest: Its manifest, on rank 0 once it is complete.
    """

    step: int
    final: Path
    manifest: CheckpointManifest | None

    def start(self, *, background: bool) -> None:
        """Plan the save and write the shards, or start to write them in the background.

        Raises:
            RankFailure: On every rank, if the directory could not be made. What goes wrong later ``complete`` raises.
        """

    def is_written(self) -> bool:
        """Return whether all ranks have written their shards."""

    def complete(self) -> None:
        """Wait for the shards, write the rest and publish the checkpoint.

        Raises:
            RankFailure: On every rank, if one could not write.
        """

    def abandon(self) -> None:
        """Delete what was written. It is called on rank 0, after a failure."""


class TrainingLoop(Protocol):
    """What a callback may ask of the loop.

    Attributes:
        step: Optimizer steps done. During a step it counts those before.
        train_iters: Steps of the stage.
        rank: Of this process.
        world_size: Ranks.
        counts_rows: Whether this rank counts a row's sizes. One of those that share the row does.
        counts_losses: Whether this rank counts its token losses. One of the tensor-parallel ranks does.
        grad_norm: Norm of the gradient of the step that ended, before clipping.
        learning_rate: Of the step that ended.
    """

    @property
    def step(self) -> int: ...  # noqa: D102 - in the docstring of the class, as those below

    @property
    def train_iters(self) -> int: ...  # noqa: D102

    @property
    def rank(self) -> int: ...  # noqa: D102

    @property
    def world_size(self) -> int: ...  # noqa: D102

    @property
    def counts_rows(self) -> bool: ...  # noqa: D102

    @property
    def counts_losses(self) -> bool: ...  # noqa: D102

    @property
    def grad_norm(self) -> float: ...  # noqa: D102

    @property
    def learning_rate(self) -> float: ...  # noqa: D102

    def new_save(self, reached: Callable[[str], None]) -> CheckpointSave:
        """Return a save of the state as it is now.

        Args:
            reached: Called with the name of each point of the save path as it is passed.
        """

    def stop(self) -> None:
        """End training after this step."""


class Callback:
    """Something that happens around the steps of a run. Every hook is called on all ranks and does nothing here.

    Attributes:
        after: Callbacks that come before this one in every hook, if they are there.
    """

    after: ClassVar[tuple[type[Callback], ...]] = ()

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, in plain types. It is saved in every checkpoint."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the state of a checkpoint."""

    def on_train_start(self, loop: TrainingLoop) -> None:
        """Be told that the model is built, its state loaded and the first step about to come."""

    def on_step_start(self, loop: TrainingLoop) -> None:
        """Be told that the rows of a step are about to be trained on."""

    def on_micro_batch_end(self, loop: TrainingLoop, batch: RankBatch) -> None:
        """See a micro-batch that went through the model, in training or validation."""

    def on_losses(self, loop: TrainingLoop, outputs: Sequence[dict[str, Any]]) -> None:
        """See the losses of all micro-batches of this rank. Only the last pipeline stage has any.

        Args:
            loop: The loop.
            outputs: One report a micro-batch, as ``ExactLossReduction.forward`` makes it.
        """

    def allows_step(self, loop: TrainingLoop, grad_norm: float) -> bool:
        """Return whether the optimizer may take this step. Every rank must say the same.

        Args:
            loop: The loop.
            grad_norm: Norm of the gradient of the global batch, before clipping.
        """
        return True

    def on_step_end(self, loop: TrainingLoop) -> None:
        """Be told that the optimizer has taken the step, or left it out."""

    def on_validation_batch_end(self, loop: TrainingLoop) -> None:
        """Be told that a part of a validation ended."""

    def on_validation_end(self, loop: TrainingLoop) -> None:
        """Be told that a validation ended."""

    def on_train_end(self, loop: TrainingLoop) -> None:
        """Be told that the last step is done. What is left to do here may still fail."""

    def on_end(self, loop: TrainingLoop) -> None:
        """Be told that training ended well."""

    def on_exception(self, loop: TrainingLoop) -> None:
        """Be told that training ends by an exception."""


def in_order(callbacks: Sequence[Callback]) -> list[Callback]:
    """Return callbacks so that each comes after those it names in ``after``, and otherwise as they were given."""
    sorter: graphlib.TopologicalSorter[int] = graphlib.TopologicalSorter()
    for index, callback in enumerate(callbacks):
        before = [other for other, one in enumerate(callbacks) if isinstance(one, callback.after)]
        sorter.add(index, *before)
    sorter.prepare()
    ordered: list[Callback] = []
    while sorter.is_active():
        ready = sorted(sorter.get_ready())
        ordered += [callbacks[index] for index in ready]
        sorter.done(*ready)
    return ordered
