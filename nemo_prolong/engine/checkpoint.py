"""Checkpoints of a run: written whole or not at all, newest found by step.

A checkpoint is ``checkpoints/step_XXXXXXXX/`` with ``weights/`` (Megatron's distributed format) and ``model.json`` (the
model in plain JSON, all that evaluation and export need). It is written under a temporary name and renamed when every
rank is done, so a directory with the final name is complete.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from nemo_prolong.config.locations import checkpoint_directory, complete_steps, tokenizer_directory
from nemo_prolong.config.schema import ModelConfig, RunConfig
from nemo_prolong.errors import CheckpointError

log = logging.getLogger(__name__)

MODEL_FILE = "model.json"


@dataclass(frozen=True)
class ModelDescription:
    """What a checkpoint holds, in plain JSON.

    Attributes:
        step: Optimizer steps of the stage.
        model: The model as it was trained, ``rotary_base`` of the stage included.
        seq_length: Tokens per training row.
        tokenizer: Tokenizer directory.
        compute: Precision it was trained in: fp32 or bf16.
    """

    step: int
    model: dict[str, Any]
    seq_length: int
    tokenizer: str
    compute: str

    @property
    def model_config(self) -> ModelConfig:
        """The model as a validated section."""
        return ModelConfig(**self.model)

    @classmethod
    def of_run(cls, cfg: RunConfig, step: int) -> ModelDescription:
        """Describe the model of a stage after ``step`` steps."""
        return cls(
            step=step,
            model=cfg.model.model_dump(mode="json"),
            seq_length=cfg.seq_length,
            tokenizer=str(tokenizer_directory(cfg.data)),
            compute=cfg.precision.compute,
        )

    @classmethod
    def read(cls, checkpoint: Path) -> ModelDescription:
        """Read the description of a checkpoint directory.

        Raises:
            CheckpointError: If it is missing or not ours.
        """
        path = checkpoint / MODEL_FILE
        try:
            return cls(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(
                str(path),
                f"a checkpoint of this software has a readable {MODEL_FILE} ({error}).",
                "Name a run directory that scripts/train.py wrote.",
            ) from error


class CheckpointWriter(Callback):
    """Saves every ``save_interval_steps`` and after the last step, and deletes what is too old.

    Args:
        cfg: The stage.
    """

    def __init__(self, cfg: RunConfig) -> None:
        self.cfg = cfg
        self.run_dir = Path(cfg.run_dir)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Save when it is time."""
        step = trainer.global_step
        if step % self.cfg.checkpoint.save_interval_steps == 0 or step == self.cfg.train.train_iters:
            self._save(trainer, step)

    def _save(self, trainer: pl.Trainer, step: int) -> None:
        started = time.perf_counter()
        final = checkpoint_directory(self.run_dir, step)
        temporary = final.with_name(f"{final.name}.writing")
        if trainer.is_global_zero:
            # Left by a run that was killed while it saved.
            shutil.rmtree(temporary, ignore_errors=True)
        torch.distributed.barrier()
        trainer.save_checkpoint(temporary)
        torch.distributed.barrier()
        if trainer.is_global_zero:
            description = ModelDescription.of_run(self.cfg, step)
            (temporary / MODEL_FILE).write_text(json.dumps(asdict(description), indent=2) + "\n")
            temporary.rename(final)
            self._delete_old()
            log.info("saved %s in %.1f s", final, time.perf_counter() - started)
        torch.distributed.barrier()

    def _delete_old(self) -> None:
        for step in complete_steps(self.run_dir)[: -self.cfg.checkpoint.keep_last]:
            shutil.rmtree(checkpoint_directory(self.run_dir, step))
