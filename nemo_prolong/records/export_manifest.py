"""``export_manifest.json``: what an exported directory was made from, what was compared, and the hash of every file.

The export room writes it. An export that replaces an earlier one, the upload to the Hub, the recipe and the report read
it. Its format is in docs/architecture.md.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

from nemo_prolong.config.schema import ExportConfig
from nemo_prolong.files import write_json_atomically

MANIFEST_FILE = "export_manifest.json"

_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}

SOFTWARE = "nemo_prolong"
"""What the manifest says wrote the directory."""


class _Record(BaseModel):
    """Base: what is written has exactly these keys; ``ExportManifest.read`` leaves out the keys it does not know."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_by_name=True, validate_by_alias=True, serialize_by_alias=True
    )


class SourceRecord(_Record):
    """The checkpoint that was exported.

    Attributes:
        run: Run directory, as it was given.
        name: Name of the run.
        stage: Its stage.
        checkpoint: Name of the checkpoint's directory.
        step: Optimizer steps of the checkpoint.
        git_commit: Of this software when the run was trained.
    """

    run: str
    name: str
    stage: str
    checkpoint: str
    step: int
    git_commit: str | None


class PromptRecord(_Record):
    """One prompt whose logits were compared.

    Attributes:
        name: What it tests.
        tokens: Its length.
        last_position: Position of its last token.
        compared_positions: Positions whose logits were compared, the last ones.
        max_logit_difference: Largest difference of a logit.
        argmax_equal: Positions at which both models choose the same token.
    """

    name: str
    tokens: int
    last_position: int
    compared_positions: int
    max_logit_difference: float
    argmax_equal: int


class SharpenedRecord(_Record):
    """The prompt that was scored with queries and keys multiplied by ``factor``."""

    factor: int
    argmax_equal_share: float
    max_difference: float


class GreedyRecord(_Record):
    """Tokens that transformers generated, and how many of them are Megatron's choice too."""

    tokens: int
    equal: int


class LogitsRecord(_Record):
    """How the model that plain transformers makes of the directory was compared with Megatron's.

    Attributes:
        max_logit_difference: Largest difference of a logit over all prompts.
        logit_tolerance: The difference that would have refused the export.
        prompts: One record per prompt.
        sharpened: The comparison that only positions decide; early versions did not make it.
        greedy: The greedy continuation.
        stop_ids: Tokens after which generation was seen to end.
        transformers: Version that computed the logits.
    """

    max_logit_difference: float
    logit_tolerance: float
    prompts: list[PromptRecord]
    sharpened: SharpenedRecord | None = None
    greedy: GreedyRecord
    stop_ids: list[int] = []
    transformers: str


class VerificationRecord(LogitsRecord):
    """Everything that was compared before the directory took its name.

    Attributes:
        tensors: Hugging Face tensors that were read back, bitwise equal to the checkpoint.
    """

    tensors: int

    @model_serializer(mode="wrap")
    def _tensors_first(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {"tensors": self.tensors, **handler(self)}


_Optional = Field(exclude_if=lambda value: value is None)
"""Of a key that is left out where there is nothing to say."""


class QuantizationRecord(_Record):
    """How weights were quantized.

    Attributes:
        algorithm: Of the weights.
        kv_cache_algorithm: Of keys and values.
        modelopt: Version of ModelOpt.
        calibration_rows: Packed rows the documents were taken from.
        calibration_length: Tokens of a document that were taken at most.
        calibration_documents: Documents.
        calibration_tokens: Tokens of all documents.
        verified_matrices: Matrices whose every value was compared; left out without verification.
        relative_logit_difference: Norm of the difference of the logits by the norm of bf16's; left out likewise.
    """

    algorithm: str
    kv_cache_algorithm: str
    modelopt: str
    calibration_rows: int
    calibration_length: int
    calibration_documents: int
    calibration_tokens: int
    verified_matrices: Annotated[int | None, _Optional] = None
    relative_logit_difference: Annotated[float | None, _Optional] = None


class TargetRecord(_Record):
    """What the directory was prepared for besides transformers; ``quantization`` is None in bf16."""

    format: str
    gpu: str
    tensor_parallel_size: int
    pipeline_parallel_size: int
    quantization: QuantizationRecord | None


class ExportedFile(_Record):
    """A file of the directory: SHA-256 in hexadecimal, and its size (``bytes`` in the file)."""

    sha256: str
    num_bytes: int = Field(alias="bytes")


class ExportManifest(_Record):
    """The content of ``export_manifest.json``.

    Attributes:
        format: Version of this format.
        software: What wrote it.
        source: The checkpoint.
        dtype: Number format of the weights, such as ``bfloat16``.
        rotary_base: RoPE base.
        trained_context_length: Longest training row, in tokens.
        advertised_context_length: Tokens the model is said to take.
        stop_token_ids: Tokens that end what the model generates; empty in files of earlier versions.
        chat_template_sha256: Of the chat template; None where there is none.
        chat_date: What the training template was given as today's date; None where it asked for none.
        verification: What was compared; None if it was not asked for.
        target: What the directory was prepared for; None for a plain Hugging Face directory.
        versions: Packages that wrote it.
        exported_at: Time in UTC.
        files: Every file but the manifest, by its name.
    """

    format: int = 1
    software: str = SOFTWARE
    source: SourceRecord
    dtype: str
    rotary_base: float
    trained_context_length: int
    advertised_context_length: int
    stop_token_ids: list[int] = []
    chat_template_sha256: str | None = None
    chat_date: str | None = None
    verification: VerificationRecord | None
    target: TargetRecord | None = None
    versions: dict[str, str]
    exported_at: str
    files: dict[str, ExportedFile]

    @classmethod
    def read(cls, directory: Path) -> ExportManifest:
        """Read the manifest of an exported directory; keys of later versions are left out.

        Raises:
            OSError: If there is none.
            ValueError: If it is not a manifest of an export.
        """
        content = json.loads((directory / MANIFEST_FILE).read_text(encoding="utf-8"))
        return cls.model_validate(content, extra="ignore")

    @classmethod
    def describes(cls, cfg: ExportConfig, step: int) -> bool:
        """Return whether the output of an export is this export of a step already. No file of weights is read."""
        try:
            written = cls.read(Path(cfg.output))
        except (OSError, ValueError):
            return False
        source, target = written.source, written.target
        found = (source.run, source.step, written.dtype, target.format if target else "hf")
        expected = (cfg.run, step, _DTYPES[cfg.dtype], cfg.export.format)
        is_quantized = target is not None and target.quantization is not None
        return found == expected and is_quantized == (cfg.export.quantization is not None)

    def write(self, directory: Path) -> None:
        """Write the manifest; a reader never sees half of it."""
        write_json_atomically(directory / MANIFEST_FILE, self.model_dump())
