"""Which number formats, kernels and shapes can run together.

Decided from the configuration alone, for ``constraints.ASSUMED_PLATFORM``: what depends on a driver or a device is the
engine's to find out. Each function returns the errors it finds.
"""

from __future__ import annotations

from nemo_prolong.config.rules.constraints import constraint_findings
from nemo_prolong.config.rules.layout import nearest_multiple
from nemo_prolong.config.schema import RunConfig
from nemo_prolong.errors import ConfigError
from nemo_prolong.units import exact_tokens

_FP8_TILE = 16
"""FP8 matrix products need dimensions that are multiples of this."""

_FP8_ATTENTION_TILE = 128
"""The FP8 attention kernel of Hopper needs a length that is a multiple of this."""


def precision_findings(cfg: RunConfig) -> list[ConfigError]:
    """Return every combination of formats, kernels and layout that cannot be trained."""
    found = constraint_findings(cfg)
    if cfg.precision.compute.startswith("fp8"):
        found += _fp8_shapes(cfg)
    if cfg.precision.compute == "fp8_attention":
        found += _fp8_attention_length(cfg)
    return found


def _fp8_shapes(cfg: RunConfig) -> list[ConfigError]:
    model, tp = cfg.model, cfg.parallelism.tensor_model_parallel_size
    shapes = {
        "hidden_size": (model.hidden_size, 1),
        "ffn_hidden_size": (model.ffn_hidden_size, tp),
        "kv_channels": (model.kv_channels * model.num_query_groups // tp, 1),
    }
    found = []
    for name, (size, split) in shapes.items():
        multiple = _FP8_TILE * split
        if size % multiple:
            rule = (
                f"FP8 matrix products need every rank's share in multiples of {_FP8_TILE}, and {size} / {split} is not."
            )
            nearest = nearest_multiple(size, multiple)
            fix = f"model.{name}={nearest}, or precision=bf16" if name != "kv_channels" else "precision=bf16"
            found.append(ConfigError(f"model.{name}={getattr(model, name)}", rule, f"Set {fix}."))
    return found


def _fp8_attention_length(cfg: RunConfig) -> list[ConfigError]:
    multiple = _FP8_ATTENTION_TILE * cfg.parallelism.context_parallel_size
    if cfg.seq_length % multiple == 0:
        return []
    rule = f"FP8 attention needs a multiple of {_FP8_ATTENTION_TILE} tokens on each CP rank."
    nearest = exact_tokens(nearest_multiple(cfg.seq_length, multiple))
    return [ConfigError(f"seq_length={exact_tokens(cfg.seq_length)}", rule, f"Set seq_length={nearest}.")]
