"""The contents of ``eval/perplexity.json`` and ``eval/recall.json``, as far as a report needs them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nemo_prolong.config.addresses import HF_PREFIX


def evaluation_directory(model: str) -> Path:
    """Return the directory of a model's evaluation results when none is configured.

    A run directory holds its own results. Those of ``hf:DIR`` lie beside DIR, because DIR is what gets published.

    >>> evaluation_directory("runs/demo/sft").as_posix(), evaluation_directory("hf:runs/demo/export/hf").as_posix()
    ('runs/demo/sft/eval', 'runs/demo/export/hf_eval')
    """
    if model.startswith(HF_PREFIX):
        directory = Path(model.removeprefix(HF_PREFIX))
        return directory.with_name(f"{directory.name}_eval")
    return Path(model) / "eval"


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Bucket(_Record):
    """Loss and perplexity at target positions ``start <= p < end``; None where no document reaches."""

    start: int
    end: int
    tokens: int
    loss: float | None
    perplexity: float | None

    @property
    def span(self) -> tuple[int, int]:
        """First position and the one after the last."""
        return self.start, self.end


class PerplexityResult(_Record):
    """Perplexity of one model by position."""

    through: str
    data: str
    documents: int
    buckets: list[Bucket] = Field(min_length=1)
    settings: dict[str, Any] = {}


class RecallEntry(_Record):
    """Recall at one prompt length; losses in nats per answer token."""

    length: int
    samples: int
    exact_match: float
    token_accuracy: float
    answer_loss: float
    chance_loss: float | None = None
    answer_tokens: int | None = None


class RecallResult(_Record):
    """Recall of one model by prompt length."""

    through: str
    lengths: list[RecallEntry] = Field(min_length=1)
    settings: dict[str, Any] = {}


Result = TypeVar("Result", PerplexityResult, RecallResult)


def read_result(path: Path, kind: type[Result], notes: list[str]) -> Result | None:
    """Return the result in ``path``, or None if there is none; one that cannot be read is said in ``notes``."""
    if not path.is_file():
        return None
    try:
        return kind(**json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, TypeError, ValidationError) as error:
        notes.append(f"{path}: left out, it is not readable ({str(error).splitlines()[0]}).")
        return None
