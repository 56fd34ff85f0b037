"""The configuration of ``scripts/export.py``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from nemo_prolong.config.schema.base import Count, Name, Parts, RowTokens, Section
from nemo_prolong.units import parse_size


class ExportTargetConfig(Section):
    """What an exported model is prepared for, and where it is published."""

    format: Literal["hf", "trtllm", "vllm", "trtllm_engine_checkpoint"] = "hf"
    """A Hugging Face directory alone, with what a server needs to start, or the files of TensorRT-LLM <= 1.2."""
    quantization: Literal["fp8"] | None = None
    """FP8 weights and KV cache by ModelOpt, calibrated on rows of the run's own data; null keeps bf16."""
    calibration_rows: Count = 64
    """Packed training rows that calibration runs over."""
    calibration_length: RowTokens = 32768
    """Tokens of a document that calibration sees; longer documents are cut."""
    gpu: Name = "h100_80gb"
    """Device that serves; its memory sizes the server's settings."""
    tensor_parallel_size: Parts = 1
    """GPUs that share every layer of one server."""
    pipeline_parallel_size: Parts = 1
    """GPUs that share the layers in order; of trtllm_engine_checkpoint only."""
    max_batch_size: Count = 1
    """Requests of the whole advertised length that are in memory at a time."""
    max_num_tokens: RowTokens = 8192
    """Prompt tokens computed in one step; longer prompts are cut into such chunks."""
    push_to_hub: str | None = Field(default=None, pattern=r"^[\w.-]+/[\w.-]+$")
    """Repository ORG/NAME on the Hugging Face Hub that receives the verified directory."""
    hub_private: bool = True
    """Make a repository that does not exist yet private."""
    hub_dry_run: bool = False
    """Print what would be sent to the Hub, and send nothing."""


class ExportConfig(Section):
    """The configuration of ``scripts/export.py``."""

    run: Name
    """Run directory to export."""
    output: Name
    """Hugging Face directory to write; must not exist unless ``overwrite``."""
    dtype: Literal["bf16", "fp32"] = "fp32"
    """Number format of the exported weights."""
    overwrite: bool = False
    """Replace ``output`` if it is an earlier export."""
    when_complete: Literal["refuse", "succeed"] = "refuse"
    """What an output that is this export already is: taken, or done. Jobs of a chain say succeed."""
    verify: bool = True
    """Compare every tensor and the logits with the Megatron model; a difference refuses the export."""
    max_shard_bytes: Annotated[int, BeforeValidator(parse_size), Field(ge=2**16, le=2**60)] = 5 * 2**30
    """Largest safetensors file. Below 64K every vector would be a file."""
    export: ExportTargetConfig = ExportTargetConfig()
    """What the directory is prepared for, and where it is published."""
