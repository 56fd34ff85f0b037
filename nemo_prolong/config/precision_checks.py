"""Which number formats, kernels and recomputations can run together.

Decided from the configuration alone, for Hopper GPUs and Transformer Engine 2.9: what depends on a driver or a device
is the engine's to find out. Each function returns the errors it finds.
"""

from __future__ import annotations

from nemo_prolong.config.layout_checks import exact_tokens, nearest_multiple
from nemo_prolong.config.schema import KernelBackend, RunConfig
from nemo_prolong.errors import ConfigError

_FP8_TILE = 16
"""FP8 matrix products need dimensions that are multiples of this."""

_FP8_ATTENTION_TILE = 128
"""The FP8 attention kernel of Hopper: head dimension, and multiple of the length."""


def precision_findings(cfg: RunConfig) -> list[ConfigError]:
    """Return every combination of formats, kernels and layout that cannot be trained."""
    found = [*_recompute(cfg), *_document_masks_over_context_parallel(cfg)]
    if cfg.precision.compute.startswith("fp8"):
        found += [*_fp8_backend(cfg), *_fp8_shapes(cfg)]
    if cfg.precision.compute == "fp8_attention":
        found += _fp8_attention(cfg)
    return found


def _fp8_backend(cfg: RunConfig) -> list[ConfigError]:
    if cfg.precision.backend is not KernelBackend.TORCH:
        return []
    rule = f"has no FP8 kernels; compute={cfg.precision.compute} needs Transformer Engine."
    return [ConfigError("precision.backend=torch", rule, "Set precision.backend=te, or precision=bf16.")]


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


def _fp8_attention(cfg: RunConfig) -> list[ConfigError]:
    precision, found = cfg.precision, []
    if precision.fp8_recipe != "delayed":
        rule = "Hopper's FP8 attention kernel exists for delayed scaling only (cuDNN's others need Blackwell)."
        remedy = "Set precision.fp8_recipe=delayed, or precision=fp8 (FP8 matrix products, BF16 attention)."
        found.append(ConfigError(f"precision.fp8_recipe={precision.fp8_recipe}", rule, remedy))
    if cfg.model.kv_channels != _FP8_ATTENTION_TILE:
        rule = f"the FP8 attention kernel of Hopper trains heads of {_FP8_ATTENTION_TILE} dimensions only."
        found.append(ConfigError(f"model.kv_channels={cfg.model.kv_channels}", rule, "Set precision=fp8."))
    multiple = _FP8_ATTENTION_TILE * cfg.parallelism.context_parallel_size
    if cfg.seq_length % multiple:
        rule = f"FP8 attention needs a multiple of {_FP8_ATTENTION_TILE} tokens on each CP rank."
        nearest = exact_tokens(nearest_multiple(cfg.seq_length, multiple))
        found.append(ConfigError(f"seq_length={exact_tokens(cfg.seq_length)}", rule, f"Set seq_length={nearest}."))
    return found


def _document_masks_over_context_parallel(cfg: RunConfig) -> list[ConfigError]:
    """Rows hold several documents: Transformer Engine 2.9 exchanges masked rows with p2p only."""
    comm = cfg.parallelism.cp_comm_type
    if cfg.parallelism.context_parallel_size == 1 or comm == "p2p" or cfg.precision.backend is KernelBackend.TORCH:
        return []
    reason = {
        "a2a": "Transformer Engine 2.9 refuses a2a for rows with document masks",
        "a2a+p2p": "Transformer Engine 2.9 refuses a2a+p2p for rows with document masks",
        "all_gather": "Transformer Engine 2.9 refuses all_gather for rows with document masks, "
        "and ignores FP8 there without a word",
    }[comm]
    return [ConfigError(f"parallelism.cp_comm_type={comm}", f"{reason}.", "Set parallelism.cp_comm_type=p2p.")]


def _recompute(cfg: RunConfig) -> list[ConfigError]:
    """The combinations Megatron accepts: full with a method and a number of layers, selective with neither."""
    recompute = cfg.precision.recompute
    path = "precision.recompute.recompute"
    method, layers = recompute.recompute_method, recompute.recompute_num_layers
    found = []
    if recompute.recompute_granularity == "full":
        per_stage = max(cfg.model.num_layers // cfg.parallelism.pipeline_model_parallel_size, 1)
        if method is None:
            found.append(ConfigError(f"{path}_method=null", "full needs one.", f"Set {path}_method=uniform."))
        if layers is None or layers > per_stage:
            value = "null" if layers is None else layers
            rule = f"full needs 1 to {per_stage} layers (those of a pipeline stage)."
            nearest = 1 if layers is None else per_stage
            found.append(ConfigError(f"{path}_num_layers={value}", rule, f"Set {path}_num_layers={nearest}."))
        return found
    granularity = recompute.recompute_granularity or "null"
    if layers is not None:
        rule = f"belongs to full, and recompute_granularity is {granularity}."
        found.append(ConfigError(f"{path}_num_layers={layers}", rule, f"Set {path}_num_layers=null."))
    if method is not None:
        rule = f"belongs to full, and recompute_granularity is {granularity}."
        found.append(ConfigError(f"{path}_method={method}", rule, f"Set {path}_method=null."))
    return found
