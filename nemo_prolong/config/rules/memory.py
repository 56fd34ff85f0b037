"""Which ways of saving memory can be combined: what Megatron 0.15.3 refuses or dies on, refused first.

Each function returns the errors it finds.
"""

from __future__ import annotations

from nemo_prolong.config.rules.attention import ASSUMED_PLATFORM, Platform
from nemo_prolong.config.rules.constraints import resolve_backend
from nemo_prolong.config.rules.layout import nearest_divisor
from nemo_prolong.config.schema import KernelBackend, RunConfig
from nemo_prolong.errors import ConfigError

_RECOMPUTE = "precision.recompute"
_OFFLOAD = "precision.offload.cpu_offloading"


def memory_findings(cfg: RunConfig, platform: Platform = ASSUMED_PLATFORM) -> list[ConfigError]:
    """Return every conflict between recomputation, offload, layout and the kernels that run on a platform."""
    granularity = cfg.precision.recompute.recompute_granularity
    backend = resolve_backend(cfg.precision, platform)
    found = [*_modules(cfg), *_distributed(cfg), *_offload(cfg, backend)]
    return [*(_full(cfg) if granularity == "full" else _without_full(cfg)), *found]


def _full(cfg: RunConfig) -> list[ConfigError]:
    recompute, found = cfg.precision.recompute, []
    per_stage = max(cfg.model.num_layers // cfg.parallelism.pipeline_model_parallel_size, 1)
    method, layers = recompute.recompute_method, recompute.recompute_num_layers
    path = f"{_RECOMPUTE}.recompute_num_layers"
    if method is None:
        remedy = f"Set {_RECOMPUTE}.recompute_method=uniform."
        found.append(ConfigError(f"{_RECOMPUTE}.recompute_method=null", "full needs one.", remedy))
    if layers is None or layers > per_stage:
        rule = f"full needs 1 to {per_stage} layers (those of a pipeline stage)."
        found.append(ConfigError(f"{path}={layers or 'null'}", rule, f"Set {path}={per_stage if layers else 1}."))
    elif method == "uniform" and per_stage % layers:
        rule = f"uniform needs a divisor of the {per_stage} layers of a stage: Megatron counts past the last one."
        found.append(ConfigError(f"{path}={layers}", rule, f"Set {path}={nearest_divisor(layers, per_stage)}."))
    return found


def _without_full(cfg: RunConfig) -> list[ConfigError]:
    recompute = cfg.precision.recompute
    rule = f"belongs to full, and recompute_granularity is {recompute.recompute_granularity or 'null'}."
    unset = {"recompute_num_layers": "null", "recompute_method": "null", "distribute_saved_activations": "false"}
    return [
        ConfigError(f"{_RECOMPUTE}.{name}={str(value).lower()}", rule, f"Set {_RECOMPUTE}.{name}={nothing}.")
        for name, nothing in unset.items()
        if (value := getattr(recompute, name))
    ]


def _modules(cfg: RunConfig) -> list[ConfigError]:
    """Check that selective recomputation has something to recompute."""
    recompute = cfg.precision.recompute
    modules, path = recompute.recompute_modules, f"{_RECOMPUTE}.recompute_modules"
    if recompute.recompute_granularity != "selective":
        rule = f"belongs to selective, and recompute_granularity is {recompute.recompute_granularity or 'null'}."
        return [] if modules is None else [ConfigError(f"{path}=[{','.join(modules)}]", rule, f"Set {path}=null.")]
    if not modules:
        rule = "selective needs the modules to compute again; Megatron's default, core_attn, saves nothing here."
        return [ConfigError(f"{path}={'null' if modules is None else '[]'}", rule, f"Set {path}=[mlp].")]
    what, found = f"{path}=[{','.join(modules)}]", []
    if "core_attn" in modules:
        rule = "attention over documents keeps no scores, so core_attn would cost time and save nothing."
        found.append(ConfigError(what, rule, f"Set {path}=[mlp]."))
    if "layernorm" in modules:
        rule = (
            "layernorm has no use: Transformer Engine's layers hold norm and matrix in one, and without Transformer "
            "Engine Megatron cannot recompute a norm."
        )
        found.append(ConfigError(what, rule, f"Set {path}=[mlp]."))
    return found


def _distributed(cfg: RunConfig) -> list[ConfigError]:
    """Check that saved activations have tensor-parallel ranks to be split over, and are not split already."""
    recompute, parallelism = cfg.precision.recompute, cfg.parallelism
    if not recompute.distribute_saved_activations or recompute.recompute_granularity != "full":
        return []
    path = f"{_RECOMPUTE}.distribute_saved_activations"
    if parallelism.sequence_parallel:
        rule = "sequence parallel splits them already, and Megatron refuses both."
    elif parallelism.tensor_model_parallel_size == 1:
        rule = "splits them over the TP ranks, and TP is 1."
    else:
        return []
    return [ConfigError(f"{path}=true", rule, f"Set {path}=false.")]


def _offload(cfg: RunConfig, backend: KernelBackend) -> list[ConfigError]:
    offload = cfg.precision.offload
    layers, path = offload.cpu_offloading_num_layers, f"{_OFFLOAD}_num_layers"
    if not offload.cpu_offloading:
        rule = "has no effect without cpu_offloading."
        return [ConfigError(f"{path}={layers}", rule, f"Set {path}=0, or {_OFFLOAD}=true.")] if layers else []
    most, found = cfg.model.num_layers - 1, _offload_conflicts(cfg, backend)
    if not 1 <= layers <= most:
        rule = f"must be 1 to {most}: Megatron keeps the last of {cfg.model.num_layers} layers where it is."
        found.append(ConfigError(f"{path}={layers}", rule, f"Set {path}={1 if layers == 0 else most}."))
    return found


def _offload_conflicts(cfg: RunConfig, backend: KernelBackend) -> list[ConfigError]:
    """Return what Megatron 0.15.3 does not combine with offload."""
    remedy = f"Set {_OFFLOAD}=false {_OFFLOAD}_num_layers=0"
    conflicts = {
        f"recompute_granularity={cfg.precision.recompute.recompute_granularity}": (
            cfg.precision.recompute.recompute_granularity is not None,
            "precision.recompute.recompute_granularity=null",
        ),
        f"PP {cfg.parallelism.pipeline_model_parallel_size}": (
            cfg.parallelism.pipeline_model_parallel_size > 1,
            "parallelism.pipeline_model_parallel_size=1",
        ),
        "the torch backend": (
            backend is KernelBackend.TORCH,
            "precision.backend=te",
        ),
    }
    return [
        ConfigError(f"{_OFFLOAD}=true", f"Megatron does not offload with {what}.", f"{remedy}, or {other}.")
        for what, (conflict, other) in conflicts.items()
        if conflict
    ]
