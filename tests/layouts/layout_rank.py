"""What one rank of a layout does; imports NeMo, after ``layout_program.py`` has prepared it."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nemo_prolong.callbacks.checkpoint_writer import CheckpointWriter
from nemo_prolong.callbacks.protocol import TrainingLoop
from nemo_prolong.config.schema import RunConfig
from nemo_prolong.data.batch import RankBatch
from nemo_prolong.engine.training import stage_training
from nemo_prolong.engine.training.packed_step import ExactLossReduction
from nemo_prolong.records.run_directory import RunDirectory


class SaveFirstAndLast(CheckpointWriter):
    """Saves after the first and the last step: saving takes longer than all steps between."""

    def _is_due(self, step: int) -> bool:
        return step in (1, self.cfg.train.train_iters)


class SaveAndLeave(CheckpointWriter):
    """Saves what was loaded, before any step, and ends the process."""

    def on_train_start(self, loop: TrainingLoop) -> None:
        """Save and leave."""
        self.save(loop)
        self.wait()
        sys.exit(0)


def record_first_validation(directory: Path, rank: int) -> None:
    """Write the token losses of the rows of the first validation, with the document of each token here."""
    directory.mkdir(parents=True, exist_ok=True)
    original = ExactLossReduction.forward

    def forward(self: ExactLossReduction, batch: RankBatch, forward_out: Any) -> Any:
        path = directory / f"{batch.domain}.rank{rank}.npz"
        if self.validation_step and not path.exists():
            np.savez(path, losses=forward_out[1].numpy(), **tokens_here(batch))
        return original(self, batch, forward_out)

    ExactLossReduction.forward = forward  # type: ignore[method-assign]


def tokens_here(batch: RankBatch) -> dict[str, np.ndarray]:
    """Return document and position of every token of this rank; padding has a document too."""
    boundaries, partition = batch.cu_seqlens, batch.partition
    documents = torch.repeat_interleave(torch.arange(len(boundaries) - 1), boundaries.diff().long())
    if partition is not None:
        size, rank = partition.context_parallel_size, partition.rank
        chunk = [part.tensor_split(2 * size) for part in documents.split(boundaries.diff().tolist())]
        documents = torch.cat([torch.cat([parts[rank], parts[2 * size - 1 - rank]]) for parts in chunk])
    return {"documents": documents.numpy(), "positions": batch.position_ids[0].numpy()}


def run(job: dict[str, Any], rank: int) -> None:
    """Be one rank of a job."""
    cfg = RunConfig(**job["config"])
    run_dir = Path(cfg.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    stage_training.CheckpointWriter = (  # type: ignore[assignment, misc]
        SaveAndLeave if job["reload"] else SaveFirstAndLast
    )
    if not job["reload"]:
        record_first_validation(run_dir / "validation", rank)
    stage_training.train_stage(
        cfg, RunDirectory(run_dir), *(Path(job[key]) if job[key] else None for key in ("reload", "parent"))
    )
