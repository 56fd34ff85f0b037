"""TensorBoard events under ``<run>/tensorboard``."""

from __future__ import annotations

from torch.utils.tensorboard import SummaryWriter

from nemo_prolong.telemetry.tracker import Figures, TrackedRun


class TensorBoardTracker:
    """Writes scalars.

    Args:
        run: The run.
    """

    def __init__(self, run: TrackedRun) -> None:
        # Events of steps that a resumed run trains again are hidden.
        self._writer = SummaryWriter(str(run.directory.tensorboard), purge_step=run.step + 1)

    def log(self, figures: Figures, step: int, unix_time: float) -> None:
        """Write the figures of a step."""
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step, walltime=unix_time)

    def close(self, *, succeeded: bool) -> None:
        """Close the file."""
        self._writer.close()
