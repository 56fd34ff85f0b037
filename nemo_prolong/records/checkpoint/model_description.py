"""``model.json`` of a checkpoint, which is the model in plain JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from nemo_prolong.config.addresses import tokenizer_directory
from nemo_prolong.config.schema import ModelConfig, RunConfig
from nemo_prolong.errors import CheckpointError
from nemo_prolong.records.checkpoint.manifest import MODEL_FILE
from nemo_prolong.records.locations import recorded_path, working_directory


@dataclass(frozen=True)
class ModelDescription:
    """What a checkpoint holds, in plain JSON.

    Attributes:
        step: Optimizer steps of the stage.
        model: The model as it was trained, ``rotary_base`` of the stage included.
        seq_length: Tokens per training row.
        tokenizer: Tokenizer directory, as the run found it.
        compute: Precision it was trained in, fp32 or bf16.
        working_directory: Where the run was started; None in files of earlier versions.
    """

    step: int
    model: dict[str, Any]
    seq_length: int
    tokenizer: str
    compute: str
    working_directory: str | None = None

    @property
    def tokenizer_directory(self) -> Path:
        """The tokenizer, seen from here."""
        return recorded_path(self.tokenizer, self.working_directory)

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
            working_directory=working_directory(),
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
        except (OSError, ValueError, TypeError, ValidationError) as error:
            raise CheckpointError(
                str(path),
                f"a checkpoint of this software has a readable {MODEL_FILE} ({error}).",
                "Name a run directory that scripts/train.py wrote.",
            ) from error
