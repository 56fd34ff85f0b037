"""What exchange between ranks can run while a layer computes, and what that needs.

What Megatron 0.15.3 and Transformer Engine 2.9 only assert, or lose without a word, is refused here. Each function
returns the errors it finds.
"""

from __future__ import annotations

from nemo_prolong.config.rules.attention import ASSUMED_PLATFORM, Platform
from nemo_prolong.config.rules.constraints import resolve_backend
from nemo_prolong.config.schema import KernelBackend, RunConfig
from nemo_prolong.errors import ConfigError

_GRADIENTS = "parallelism.overlap_grad_reduce"
_WEIGHTS = "parallelism.overlap_param_gather"
_BUCKET = "parallelism.ddp_bucket_size"
_TENSOR = "parallelism.tp_comm_overlap"


def overlap_findings(cfg: RunConfig, platform: Platform = ASSUMED_PLATFORM) -> list[ConfigError]:
    """Return every overlap that could not take place with the layout and the kernels that run on a platform."""
    return [*_data_parallel(cfg), *_tensor_parallel(cfg, platform)]


def _data_parallel(cfg: RunConfig) -> list[ConfigError]:
    parallelism, found = cfg.parallelism, []
    if parallelism.overlap_param_gather:
        if not cfg.optim.use_distributed_optimizer:
            rule = "without the distributed optimizer every rank updates all weights, and none are gathered."
            found.append(ConfigError(f"{_WEIGHTS}=true", rule, f"Set {_WEIGHTS}=null."))
        elif not parallelism.overlap_grad_reduce:
            rule = f"without {_GRADIENTS} all weights are one bucket, and the first layer would wait for the last."
            found.append(ConfigError(f"{_WEIGHTS}=true", rule, f"Set {_WEIGHTS}=null, or {_GRADIENTS}=true."))
    if parallelism.ddp_bucket_size is not None and not parallelism.overlap_grad_reduce:
        rule = f"has no effect without {_GRADIENTS}."
        remedy = f"Set {_BUCKET}=null, or {_GRADIENTS}=true."
        found.append(ConfigError(f"{_BUCKET}={parallelism.ddp_bucket_size}", rule, remedy))
    return found


def _tensor_parallel(cfg: RunConfig, platform: Platform) -> list[ConfigError]:
    if not cfg.parallelism.tp_comm_overlap:
        return []
    parallelism, precision = cfg.parallelism, cfg.precision
    has_te = resolve_backend(precision, platform) is KernelBackend.TE
    is_blockwise = precision.compute.startswith("fp8") and precision.fp8_recipe == "blockwise"
    needs = (
        (has_te, "its buffers are Transformer Engine's, and the backend is torch.", "precision.backend=te"),
        (
            parallelism.tensor_model_parallel_size > 1,
            "overlaps the exchange between TP ranks, and TP is 1.",
            "parallelism.tensor_model_parallel_size=2 parallelism.sequence_parallel=true",
        ),
        (
            parallelism.sequence_parallel or parallelism.tensor_model_parallel_size == 1,
            "overlaps the gathers and scatters of sequence parallel, which is off.",
            "parallelism.sequence_parallel=true",
        ),
        (
            parallelism.context_parallel_size == 1,
            "its buffers have the size of one row exactly, and documents that are padded for CP make rows of "
            "different lengths.",
            "parallelism.context_parallel_size=1",
        ),
        (
            not is_blockwise,
            "its buffers do not take blockwise scaling.",
            "precision.fp8_recipe=tensorwise",
        ),
    )
    return [
        ConfigError(f"{_TENSOR}=true", rule, f"Set {_TENSOR}=false, or {other}.")
        for is_met, rule, other in needs
        if not is_met
    ]
