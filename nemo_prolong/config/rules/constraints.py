"""Which attention a stage may run where: one table of rules over formats, layouts, exchanges, versions and devices.

The configuration is checked with ``ASSUMED_PLATFORM`` before any device is known. When the stage starts it is checked
again with the platform that the engine finds. The tables of ``docs/precision.md`` are made from the same rules. The
versions are those at which Transformer Engine's sources change. Later releases are taken to allow what 2.19 does. Needs
no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from nemo_prolong.config.rules.attention import ASSUMED_PLATFORM, Attention, Platform, Version, dotted
from nemo_prolong.config.schema import CpCommType, KernelBackend, PrecisionConfig, RunConfig
from nemo_prolong.errors import ConfigError
from nemo_prolong.units import format_bytes

_LARGEST_INT32 = 2**31 - 1

_LARGEST_WORKSPACE_BYTES = 4 * 2**30
"""Of one attention. The plans of the full-size layouts leave some GB of 80 free beside weights and activations."""


@dataclass(frozen=True)
class Constraint:
    """One row of the table of refusals.

    Attributes:
        name: What tests and readers call it.
        broken: Whether an attention breaks it.
        what: The setting or version at fault; names in braces are fields of ``Attention`` and what ``finding`` adds.
        reason: Why it cannot run.
        remedy: What to set or install instead.
    """

    name: str
    broken: Callable[[Attention], bool]
    what: str
    reason: str
    remedy: str

    def finding(self, attention: Attention) -> ConfigError:
        """Return the error to raise for an attention that breaks the rule."""
        platform = attention.platform
        added = {
            "cudnn": dotted(platform.cudnn),
            "te": dotted(platform.transformer_engine),
            "flash_attn": f"flash-attn {dotted(platform.flash_attn)}" if platform.flash_attn else "no flash-attn",
            "workspace": format_bytes(attention.deterministic_workspace_bytes),
        }
        return ConfigError(self.what.format_map(vars(attention) | added), self.reason, self.remedy)


def _minimum_cudnn(attention: Attention) -> Version:
    """Return the cuDNN from which attention over documents runs in BF16."""
    if attention.architecture == 10:
        return (9, 7)
    return (9, 1) if attention.num_attention_heads == attention.num_query_groups else (9, 6)


def _offsets_need_64_bits(attention: Attention) -> bool:
    elements = attention.num_attention_heads * attention.kv_channels * attention.max_seqlen
    return attention.layout == "thd" and elements > _LARGEST_INT32


def _takes_flash_attn(attention: Attention) -> bool:
    """Whether an installed flash-attn is one that Transformer Engine 2.9 takes on this device."""
    platform = attention.platform
    if platform.flash_attn_3 is not None and attention.architecture == 9:
        return True
    first = (2, 7, 3) if attention.architecture == 10 else (2, 1, 1)
    return platform.flash_attn is not None and first <= platform.flash_attn <= (2, 8, 1)


def _scales_blockwise(attention: Attention) -> bool:
    return attention.is_te and attention.compute.startswith("fp8") and attention.fp8_recipe == "blockwise"


def _exchanges(attention: Attention, comm_type: CpCommType, layout: str = "thd") -> bool:
    return attention.cp_comm_type == comm_type and attention.layout == layout


_BACKEND = "precision.compute={compute} precision.backend={backend}"
_COMM = "parallelism.cp_comm_type={cp_comm_type}"
_RECIPE = "precision.fp8_recipe={fp8_recipe}"
_TE = "Transformer Engine {te}"
_CUDNN = "cuDNN {cudnn}"
_KERNELS = "precision.attention={kernels}"

_USE_TORCH = "Set precision=bf16 precision.backend=torch."
_USE_P2P = "Set parallelism.cp_comm_type=p2p."
_NO_FP8_ATTENTION = "Set precision=fp8 (FP8 matrix products, BF16 attention)."
_NOT_DETERMINISTIC = "Set train.deterministic=false."
_NEWER_CUDNN = "Install cuDNN 9.18 or newer."

CONSTRAINTS: tuple[Constraint, ...] = (
    # Backends.
    Constraint(
        "fp8_in_torch",
        lambda a: a.backend is KernelBackend.TORCH and a.compute.startswith("fp8"),
        _BACKEND,
        "the torch backend has no FP8 kernels; FP8 needs Transformer Engine.",
        "Set precision.backend=te, or precision=bf16.",
    ),
    Constraint(
        "fp32_in_te",
        lambda a: a.is_te and a.dtype == "fp32",
        _BACKEND,
        "Transformer Engine has no FP32 kernel for attention over documents.",
        "Set precision.backend=torch, or precision=bf16.",
    ),
    Constraint(
        "no_gpu",
        lambda a: a.is_te and a.platform.compute_capability is None,
        _BACKEND,
        "Transformer Engine computes on a GPU, and there is none here.",
        _USE_TORCH,
    ),
    Constraint(
        "no_te",
        lambda a: a.is_te and a.platform.transformer_engine is None,
        _BACKEND,
        "Transformer Engine is not installed here.",
        "Run it in the GPU container, or set precision=bf16 precision.backend=torch.",
    ),
    Constraint(
        "old_te",
        lambda a: a.te_before(2, 9),
        _TE,
        "Megatron-core 0.15.3 needs Transformer Engine 2.9.",
        "Install transformer-engine 2.9, or set precision=bf16 precision.backend=torch.",
    ),
    Constraint(
        "device",
        lambda a: a.is_te and a.architecture not in (9, 10, None),
        _BACKEND,
        "the kernels of this recipe for Transformer Engine are those of Hopper (sm90) and Blackwell (sm100).",
        _USE_TORCH,
    ),
    # cuDNN and CUDA.
    Constraint(
        "cudnn_bugs",
        lambda a: a.is_cudnn and (a.platform.cudnn or ())[:3] in ((9, 10, 0), (9, 10, 1)),
        _CUDNN,
        "cuDNN 9.10.0 and 9.10.1 have known bugs in attention, and Transformer Engine refuses them.",
        _NEWER_CUDNN,
    ),
    Constraint(
        "cudnn_documents",
        lambda a: a.layout == "thd" and a.cudnn_before(*_minimum_cudnn(a)),
        _CUDNN,
        "attention over documents needs cuDNN 9.6 with grouped queries, 9.1 without, and 9.7 on Blackwell.",
        _NEWER_CUDNN,
    ),
    Constraint(
        "cudnn_offsets",
        lambda a: a.cudnn_before(9, 5) and _offsets_need_64_bits(a),
        _CUDNN,
        "counts 32-bit offsets before 9.5, and heads / TP * kv_channels * seq_length exceeds 2,147,483,647.",
        _NEWER_CUDNN,
    ),
    Constraint(
        "cudnn_gradients",
        lambda a: a.layout == "thd" and a.architecture == 9 and a.cudnn_before(9, 18),
        _CUDNN,
        "before 9.18 the backward pass over documents reads a workspace that nothing has set, on Hopper, and gradients "
        "become NaN.",
        "Install cuDNN 9.18 or newer, or set precision.attention=flash.",
    ),
    Constraint(
        "cuda_blockwise",
        lambda a: _scales_blockwise(a) and a.platform.cuda is not None and a.platform.cuda < (12, 9),
        _RECIPE,
        "blockwise scaling needs CUDA 12.9.",
        "Set precision.fp8_recipe=tensorwise.",
    ),
    # Kernels of attention.
    Constraint(
        "kernels_in_torch",
        lambda a: a.backend is KernelBackend.TORCH and a.kernels != "auto",
        _KERNELS,
        "chooses among the kernels of Transformer Engine, and the torch backend has its own.",
        "Set precision.attention=auto, or precision.backend=te.",
    ),
    Constraint(
        "no_flash_attn",
        lambda a: a.is_flash and a.platform.compute_capability is not None and not _takes_flash_attn(a),
        _KERNELS + " ({flash_attn})",
        "Transformer Engine 2.9 takes flash-attn 2.1.1 to 2.8.1 (from 2.7.3 on Blackwell), and on Hopper flash-attn 3.",
        "Install one of these, or set precision.attention=cudnn.",
    ),
    Constraint(
        "flash_fp8",
        lambda a: a.is_flash and a.dtype == "fp8",
        _KERNELS,
        "flash-attn does not train FP8 attention in Transformer Engine.",
        f"Set precision.attention=cudnn, or {_NO_FP8_ATTENTION[4:]}",
    ),
    # Exchanges between context-parallel ranks.
    Constraint(
        "a2a_documents",
        lambda a: a.te_before(2, 10) and _exchanges(a, "a2a"),
        _COMM,
        "Transformer Engine before 2.10 refuses a2a for rows with document masks.",
        _USE_P2P,
    ),
    Constraint(
        "all_gather_documents",
        lambda a: a.te_before(2, 18) and _exchanges(a, "all_gather"),
        _COMM,
        "Transformer Engine before 2.18 refuses all_gather for rows with document masks.",
        _USE_P2P,
    ),
    Constraint(
        "hierarchical_documents",
        lambda a: a.te_before(2, 19) and _exchanges(a, "a2a+p2p"),
        _COMM,
        "Transformer Engine before 2.19 refuses a2a+p2p for rows with document masks.",
        _USE_P2P,
    ),
    Constraint(
        "all_gather_fp8",
        lambda a: a.is_fp8 and a.te_before(2, 15) and _exchanges(a, "all_gather", "bshd"),
        _COMM,
        "Transformer Engine before 2.15 computes in 16 bits with all_gather, without a word.",
        _USE_P2P,
    ),
    Constraint(
        "hierarchical_in_torch",
        lambda a: a.backend is KernelBackend.TORCH and a.cp_comm_type == "a2a+p2p",
        _COMM,
        "the exchanges of the torch backend are p2p, all_gather and a2a.",
        _USE_P2P,
    ),
    # FP8 attention.
    Constraint(
        "fp8_documents",
        lambda a: a.is_fp8 and a.layout == "thd",
        "precision.compute={compute}",
        "no release of cuDNN and Transformer Engine trains FP8 attention with document masks (thd).",
        "Set precision=fp8_attention, which runs such rows in BF16.",
    ),
    Constraint(
        "fp8_attention_blockwise",
        lambda a: a.is_fp8 and a.fp8_recipe == "blockwise",
        _RECIPE,
        "blockwise scaling has no FP8 attention.",
        f"Set precision.fp8_recipe=delayed, or {_NO_FP8_ATTENTION[4:]}",
    ),
    Constraint(
        "fp8_attention_tensorwise",
        lambda a: a.is_fp8 and a.fp8_recipe == "tensorwise" and a.architecture != 10,
        _RECIPE,
        "Hopper's FP8 attention kernel exists for delayed scaling only (tensorwise needs Blackwell).",
        f"Set precision.fp8_recipe=delayed, or {_NO_FP8_ATTENTION[4:]}",
    ),
    Constraint(
        "fp8_attention_tensorwise_cudnn",
        lambda a: a.is_fp8 and a.fp8_recipe == "tensorwise" and a.architecture == 10 and a.cudnn_before(9, 14),
        _RECIPE,
        "FP8 attention with tensorwise scaling needs cuDNN 9.14 on Blackwell.",
        "Set precision.fp8_recipe=delayed, or install cuDNN 9.14.",
    ),
    Constraint(
        "fp8_head_hopper",
        lambda a: a.is_fp8 and a.architecture != 10 and a.kv_channels != 128,
        "model.kv_channels={kv_channels}",
        "the FP8 attention kernel of Hopper trains heads of 128 dimensions only.",
        _NO_FP8_ATTENTION,
    ),
    Constraint(
        "fp8_head_blackwell",
        lambda a: a.is_fp8 and a.architecture == 10 and (a.kv_channels > 128 or a.kv_channels % 16 > 0),
        "model.kv_channels={kv_channels}",
        "the FP8 attention kernel of Blackwell trains heads of 16, 32, ... 128 dimensions.",
        _NO_FP8_ATTENTION,
    ),
    # Bitwise repetition.
    Constraint(
        "fp8_deterministic",
        lambda a: a.is_fp8 and a.deterministic and (a.te_before(2, 13) or a.cudnn_before(9, 19)),
        "train.deterministic=true",
        "FP8 attention has no deterministic backward pass before Transformer Engine 2.13 and cuDNN 9.19.",
        _NOT_DETERMINISTIC,
    ),
    Constraint(
        "hopper_deterministic",
        lambda a: (
            a.deterministic
            and a.is_cudnn
            and a.layout == "thd"
            and a.architecture == 9
            and a.deterministic_workspace_bytes > _LARGEST_WORKSPACE_BYTES
        ),
        "train.deterministic=true ({workspace} of workspace on each GPU)",
        "on Hopper cuDNN's deterministic backward pass over documents keeps 2 bytes for every query and key of a "
        "rank's row, in each head and in each of at least 32 document slots.",
        "Set train.deterministic=false, or precision.attention=flash, whose backward pass repeats in linear memory.",
    ),
    Constraint(
        "flash_deterministic",
        lambda a: (
            a.deterministic
            and a.is_flash
            and _takes_flash_attn(a)
            and a.platform.flash_attn_3 is None
            and (a.platform.flash_attn or ()) < (2, 4, 1)
        ),
        "{flash_attn}",
        "flash-attn before 2.4.1 has no deterministic backward pass.",
        "Install flash-attn 2.4.1 or newer, or set train.deterministic=false.",
    ),
    Constraint(
        "blackwell_deterministic",
        lambda a: a.deterministic and a.architecture == 10 and (a.te_before(2, 12) or a.cudnn_before(9, 18, 1)),
        "train.deterministic=true",
        "attention has no deterministic backward pass on Blackwell before Transformer Engine 2.12 and cuDNN 9.18.1.",
        _NOT_DETERMINISTIC,
    ),
)
"""Every reason for which an attention cannot run; the order is that of messages and documentation."""


def broken_rules(attention: Attention) -> list[Constraint]:
    """Return the rules that an attention breaks; none if it can run."""
    return [rule for rule in CONSTRAINTS if rule.broken(attention)]


def resolve_backend(precision: PrecisionConfig, platform: Platform) -> KernelBackend:
    """Return whose kernels run: what is set, and for auto Transformer Engine on a GPU.

    A GPU without Transformer Engine is not given to torch in silence: the stage is refused until torch is asked for,
    whose attention takes about twice the time.

    Args:
        precision: Formats and the backend asked for.
        platform: Where the stage runs.

    Returns:
        ``TORCH`` or ``TE``.
    """
    if precision.backend is not KernelBackend.AUTO:
        return precision.backend
    if precision.compute.startswith("fp8"):
        return KernelBackend.TE
    on_gpu = platform.compute_capability is not None
    return KernelBackend.TE if on_gpu and precision.compute == "bf16" else KernelBackend.TORCH


def attentions(cfg: RunConfig, platform: Platform) -> list[Attention]:
    """Return every kind of attention that a stage runs: packed rows always, with fp8_attention FP8 batches too."""
    parallelism, model = cfg.parallelism, cfg.model
    kinds: list[tuple[Literal["fp32", "bf16", "fp8"], Literal["thd", "bshd"]]]
    kinds = [("fp32" if cfg.precision.compute == "fp32" else "bf16", "thd")]
    if cfg.precision.compute == "fp8_attention":
        kinds.append(("fp8", "bshd"))
    return [
        Attention(
            compute=cfg.precision.compute,
            fp8_recipe=cfg.precision.fp8_recipe,
            backend=resolve_backend(cfg.precision, platform),
            kernels=cfg.precision.attention,
            dtype=dtype,
            layout=layout,
            cp_comm_type=parallelism.cp_comm_type if parallelism.context_parallel_size > 1 else None,
            deterministic=cfg.train.deterministic,
            num_attention_heads=max(model.num_attention_heads // parallelism.tensor_model_parallel_size, 1),
            num_query_groups=max(model.num_query_groups // parallelism.tensor_model_parallel_size, 1),
            kv_channels=model.kv_channels,
            max_seqlen=cfg.seq_length,
            rank_tokens=cfg.seq_length // parallelism.context_parallel_size,
            platform=platform,
        )
        for dtype, layout in kinds
    ]


def constraint_findings(cfg: RunConfig, platform: Platform = ASSUMED_PLATFORM) -> list[ConfigError]:
    """Return an error for every rule that an attention of the stage breaks there."""
    first_breaks: dict[str, ConfigError] = {}
    for attention in attentions(cfg, platform):
        for rule in broken_rules(attention):
            first_breaks.setdefault(rule.name, rule.finding(attention))
    return [first_breaks[rule.name] for rule in CONSTRAINTS if rule.name in first_breaks]
