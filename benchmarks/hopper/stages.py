"""The stages, in the order in which they run."""

from __future__ import annotations

from benchmarks.hopper import attention, loss_head
from benchmarks.hopper.bench import Stage

STAGES: dict[str, Stage] = {module.STAGE.letter: module.STAGE for module in (attention, loss_head)}
