"""``perplexity.json`` and ``recall.json``: what the evaluation measured of one model.

The evaluate room writes them. The model card and the report read them. Their format is in docs/architecture.md.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from nemo_prolong.config.addresses import HF_PREFIX
from nemo_prolong.config.commands import typed
from nemo_prolong.config.schema import EvaluateConfig
from nemo_prolong.files import digest_file, write_json_atomically
from nemo_prolong.records.checkpoint.manifest import CHECKPOINT_MANIFEST, checkpoint_directory, listed_steps, step_of
from nemo_prolong.records.export_manifest import MANIFEST_FILE as EXPORT_MANIFEST
from nemo_prolong.records.export_manifest import ExportManifest


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


class EvaluatedState(NamedTuple):
    """Which state of a model was evaluated; None where its directory does not say.

    Attributes:
        step: Optimizer steps of a run's checkpoint, or of the one that an export was made of.
        sha256: Hash of the manifest of the checkpoint or of the export. These hold the hashes of all files.
    """

    step: int | None = None
    sha256: str | None = None


def state_of(model: str) -> EvaluatedState:
    """Return the state that a model is in now, from manifests alone: no file of weights is read.

    Args:
        model: A run directory or ``hf:DIR``. A run is in the state of its newest checkpoint.
    """
    if model.startswith(HF_PREFIX):
        return state_of_export(Path(model.removeprefix(HF_PREFIX)))
    steps = listed_steps(Path(model))
    return state_of_checkpoint(checkpoint_directory(Path(model), steps[-1])) if steps else EvaluatedState()


def state_of_checkpoint(checkpoint: Path) -> EvaluatedState:
    """Return the state that a checkpoint is of."""
    try:
        return EvaluatedState(step_of(checkpoint), digest_file(checkpoint / CHECKPOINT_MANIFEST).sha256)
    except OSError:
        return EvaluatedState()


def state_of_export(directory: Path) -> EvaluatedState:
    """Return the state that a Hugging Face directory is of, if it is an export of this software."""
    try:
        step = ExportManifest.read(directory).source.step
        return EvaluatedState(step, digest_file(directory / EXPORT_MANIFEST).sha256)
    except (OSError, ValueError):
        return EvaluatedState()


class _Record(BaseModel):
    """Base: what is written has exactly these keys; ``read_result`` leaves out the keys it does not know."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_by_name=True, validate_by_alias=True, serialize_by_alias=True
    )


class Bucket(_Record):
    """Loss and perplexity at target positions ``start <= p < end``; None where no document reaches.

    Attributes:
        start: First position.
        end: The one after the last.
        documents: Documents that reach it.
        tokens: Targets in it.
        loss: Mean loss, nats per token.
        perplexity: Its exponential.
    """

    start: int
    end: int
    documents: int
    tokens: int
    loss: float | None
    perplexity: float | None

    @property
    def span(self) -> tuple[int, int]:
        """First position and the one after the last."""
        return self.start, self.end


class PerplexityResult(_Record):
    """Perplexity of one model by position, the content of ``perplexity.json``.

    Attributes:
        task: What was measured.
        model: The model as the user wrote it.
        backend: The library that ran it, ``megatron`` or ``transformers`` (``through`` in the file).
        data: Directory of the rows.
        documents: Documents scored.
        buckets: By position, ascending.
        seconds: How long it took.
        settings: The settings of the evaluation.
        step: Optimizer steps of the checkpoint; None in results of an older version, and for models of others.
        model_sha256: Hash that tells this state of the model from another; None likewise.
    """

    file_name: ClassVar[str] = "perplexity.json"

    task: Literal["perplexity"] = "perplexity"
    model: str
    backend: str = Field(alias="through")
    data: str
    documents: int
    buckets: list[Bucket] = Field(min_length=1)
    seconds: float
    settings: dict[str, Any] = {}
    step: int | None = None
    model_sha256: str | None = None


class RecallEntry(_Record):
    """Recall at one prompt length.

    Attributes:
        length: Tokens of prompt and answer together, at most.
        samples: Prompts.
        exact_match: Share of prompts whose value would be written in full.
        token_accuracy: Share of answer tokens that are the most likely ones.
        answer_loss: Nats per answer token.
        chance_loss: What a model pays that knows the form of a value and does not look it up.
        answer_tokens: Tokens of all answers.
    """

    length: int
    samples: int
    exact_match: float
    token_accuracy: float
    answer_loss: float
    chance_loss: float | None = None
    answer_tokens: int | None = None


class RecallResult(_Record):
    """Recall of one model by prompt length, the content of ``recall.json``.

    Attributes:
        task: What was measured.
        model: The model as the user wrote it.
        backend: The library that ran it, ``megatron`` or ``transformers`` (``through`` in the file).
        lengths: By prompt length, in the order asked for.
        seconds: How long it took.
        settings: The settings of the evaluation.
        step: Optimizer steps of the checkpoint; None in results of an older version, and for models of others.
        model_sha256: Hash that tells this state of the model from another; None likewise.
    """

    file_name: ClassVar[str] = "recall.json"

    task: Literal["recall"] = "recall"
    model: str
    backend: str = Field(alias="through")
    lengths: list[RecallEntry] = Field(min_length=1)
    seconds: float
    settings: dict[str, Any] = {}
    step: int | None = None
    model_sha256: str | None = None


def why_stale(model: str, result: PerplexityResult | RecallResult) -> str | None:
    """Return in words why a result is not of the model as it is now; None if it is, or nothing says so.

    Args:
        model: Run directory or ``hf:DIR`` that the result lies beside.
        result: The result.
    """
    now = state_of(model)
    if None in (now.sha256, result.model_sha256) or now.sha256 == result.model_sha256:
        return None
    before = "another state" if result.step in (None, now.step) else f"step {result.step}"
    return (
        f"{model}: {result.file_name} is of {before}, and the model is now at step {now.step}; "
        f"evaluate it again with: python scripts/evaluate.py {typed('models', [model])}"
    )


EvaluationResult = TypeVar("EvaluationResult", PerplexityResult, RecallResult)


def write_result(directory: Path, result: PerplexityResult | RecallResult) -> None:
    """Write a result under its name into ``directory``; a reader never sees half of it."""
    write_json_atomically(directory / result.file_name, result.model_dump())


def is_current(directory: Path, state: EvaluatedState, cfg: EvaluateConfig) -> bool:
    """Return whether a directory has both results of a state of a model, with the same settings."""
    results = (
        read_result(directory / PerplexityResult.file_name, PerplexityResult, []),
        read_result(directory / RecallResult.file_name, RecallResult, []),
    )
    return state.sha256 is not None and all(
        result is not None and result.model_sha256 == state.sha256 and result.settings == cfg.settings
        for result in results
    )


def read_result(path: Path, kind: type[EvaluationResult], notes: list[str]) -> EvaluationResult | None:
    """Return the result in ``path``, or None if there is none; one that cannot be read is said in ``notes``."""
    if not path.is_file():
        return None
    try:
        return kind.model_validate(json.loads(path.read_text("utf-8")), extra="ignore")
    except (OSError, ValueError) as error:
        notes.append(f"{path}: left out, it is not readable ({str(error).splitlines()[0]}).")
        return None
