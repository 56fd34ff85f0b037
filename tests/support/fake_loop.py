"""A loop of training as callbacks see it, without a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from nemo_prolong.distributed.ranks import RankFailure
from nemo_prolong.records.checkpoint.manifest import CheckpointManifest, checkpoint_directory
from tests.support.fake_checkpoint import write_checkpoint


@dataclass
class FakeSave:
    """A save that writes a checkpoint of a few bytes, or fails where it is told to.

    Attributes:
        calls: What was called.
        fails_in: ``start`` or ``complete``.
    """

    run_dir: Path
    step: int
    fails_in: str | None = None
    written: bool = True
    manifest: CheckpointManifest | None = None
    calls: list[str] = field(default_factory=list)

    @property
    def final(self) -> Path:
        """Where the checkpoint will lie."""
        return checkpoint_directory(self.run_dir, self.step)

    def start(self, *, background: bool) -> None:
        """Begin."""
        self._called("start in the background" if background else "start")

    def is_written(self) -> bool:
        """Return what the test has set."""
        return self.written

    def complete(self) -> None:
        """Write the checkpoint."""
        self._called("complete")
        self.manifest = CheckpointManifest.read(write_checkpoint(self.run_dir, self.step))

    def abandon(self) -> None:
        """Note it."""
        self.calls.append("abandon")

    def _called(self, name: str) -> None:
        self.calls.append(name)
        if name.split()[0] == self.fails_in:
            raise RankFailure("rank 0: the disk is full")


@dataclass
class FakeLoop:
    """The loop of one rank.

    Attributes:
        fails_in: Of the saves that are made from now on.
        saves: All that were made.
        stopped: Whether a callback asked for the end.
    """

    run_dir: Path = Path("nowhere")
    step: int = 0
    train_iters: int = 100
    rank: int = 0
    world_size: int = 1
    counts_rows: bool = True
    counts_losses: bool = True
    grad_norm: float = 1.5
    learning_rate: float = 1e-3
    fails_in: str | None = None
    written: bool = True
    saves: list[FakeSave] = field(default_factory=list)
    stopped: bool = False

    def new_save(self, reached: Callable[[str], None]) -> FakeSave:
        """Return a save of this step."""
        self.saves.append(FakeSave(self.run_dir, self.step, self.fails_in, self.written))
        return self.saves[-1]

    def stop(self) -> None:
        """Note it."""
        self.stopped = True
