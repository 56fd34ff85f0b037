"""Rules between lengths, the model's shape, the parallel layout and the number of ranks.

Each function returns the errors it finds. None looks at files or devices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from nemo_prolong.config.schema import RunConfig, Transition
from nemo_prolong.errors import ConfigError
from nemo_prolong.units import exact_tokens

_MAX_DEGREE = 64
"""Largest degree offered as a remedy."""


def global_batch_findings(cfg: RunConfig, world_size: int) -> list[ConfigError]:
    """Check that the global batch divides over the data-parallel ranks."""
    data_parallel_size = world_size // cfg.parallelism.model_parallel_size
    rows = cfg.train.micro_batch_size * data_parallel_size
    if cfg.train.global_batch_size % rows == 0:
        return []
    rule = f"must be a multiple of micro_batch_size * DP = {rows} ({world_size} ranks)."
    nearest = nearest_multiple(cfg.train.global_batch_size, rows)
    return [_finding("train.global_batch_size", cfg.train.global_batch_size, rule, nearest)]


def _planned_world(cfg: RunConfig) -> list[ConfigError]:
    """Check the planned number of ranks. A plan of one rank is no plan, because torchrun decides then."""
    parallelism = cfg.parallelism
    planned, needed = parallelism.planned_world_size, parallelism.model_parallel_size
    if planned == 1:
        return []
    if planned % needed == 0:
        return global_batch_findings(cfg, planned)
    ranks = nearest_multiple(planned, needed)
    per_node = parallelism.ranks_per_node
    fix = (
        f"parallelism.num_nodes={ranks // per_node}"
        if ranks % per_node == 0
        else f"parallelism.num_nodes=1 parallelism.ranks_per_node={ranks}"
    )
    return [
        ConfigError(
            f"parallelism.num_nodes={parallelism.num_nodes} parallelism.ranks_per_node={per_node}",
            f"{planned} ranks are no multiple of TP*PP*CP = {needed}.",
            f"Set {fix}.",
        )
    ]


def _shape(cfg: RunConfig) -> list[ConfigError]:
    model, found = cfg.model, []
    heads, groups = model.num_attention_heads, model.num_query_groups
    if heads % groups:
        rule = f"must divide num_attention_heads = {heads}, so that every group serves as many heads."
        found.append(_finding("model.num_query_groups", groups, rule, nearest_divisor(groups, heads)))
    if model.kv_channels % 2:
        rule = "must be even: RoPE turns pairs of dimensions."
        found.append(_finding("model.kv_channels", model.kv_channels, rule, model.kv_channels + 1))
    return found


def _tensor_parallel(cfg: RunConfig) -> list[ConfigError]:
    parallelism, model, found = cfg.parallelism, cfg.model, []
    tp = parallelism.tensor_model_parallel_size
    counts = {
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.num_query_groups,
        "ffn_hidden_size": model.ffn_hidden_size,
    }
    broken = [f"{name} = {count}" for name, count in counts.items() if count % tp]
    if broken:
        rule = f"must divide {' and '.join(broken)} of the model."
        nearest = nearest_divisor(tp, math.gcd(*counts.values()))
        found.append(_finding("parallelism.tensor_model_parallel_size", tp, rule, nearest))
    if parallelism.sequence_parallel and tp == 1:
        rule = "splits activations over the TP ranks, and TP is 1."
        remedy = "Set parallelism.sequence_parallel=false, or parallelism.tensor_model_parallel_size=2."
        found.append(ConfigError("parallelism.sequence_parallel=true", rule, remedy))
    return found


def _pipeline_parallel(cfg: RunConfig) -> list[ConfigError]:
    pp, layers = cfg.parallelism.pipeline_model_parallel_size, cfg.model.num_layers
    if layers % pp == 0:
        return []
    rule = f"must divide model.num_layers = {layers}."
    return [_finding("parallelism.pipeline_model_parallel_size", pp, rule, nearest_divisor(pp, layers))]


def _context_parallel(cfg: RunConfig) -> list[ConfigError]:
    """Check the ranks that exchange heads: that they are given where they must be, and have heads to share."""
    parallelism = cfg.parallelism
    comm, cp, sizes = (
        parallelism.cp_comm_type,
        parallelism.context_parallel_size,
        parallelism.hierarchical_context_parallel_sizes,
    )
    if comm == "a2a":
        return [*_hierarchy_without_use(cfg), *_heads(cfg, cp)]
    if comm != "a2a+p2p":
        return _hierarchy_without_use(cfg)
    if sizes is None or len(sizes) != 2 or sizes[0] * sizes[1] != cp:
        written = "null" if sizes is None else f"[{','.join(map(str, sizes))}]"
        path = "parallelism.hierarchical_context_parallel_sizes"
        rule = f"a2a+p2p needs two sizes, [a2a, p2p], whose product is CP = {cp}."
        a2a = nearest_divisor(2, math.gcd(cp, *_rank_heads(cfg)))
        keep = f", or {path}=[{a2a},{cp // a2a}]" if a2a > 1 else ""
        return [ConfigError(f"{path}={written}", rule, f"Set parallelism.cp_comm_type=p2p{keep}.")]
    return _heads(cfg, sizes[0])


def _hierarchy_without_use(cfg: RunConfig) -> list[ConfigError]:
    sizes, path = cfg.parallelism.hierarchical_context_parallel_sizes, "parallelism.hierarchical_context_parallel_sizes"
    if sizes is None:
        return []
    rule = f"belongs to cp_comm_type=a2a+p2p, and it is {cfg.parallelism.cp_comm_type}."
    return [ConfigError(f"{path}=[{','.join(map(str, sizes))}]", rule, f"Set {path}=null.")]


def _rank_heads(cfg: RunConfig) -> tuple[int, int]:
    """Return the query heads and the key and value heads of a tensor-parallel rank."""
    tp = cfg.parallelism.tensor_model_parallel_size
    return max(cfg.model.num_attention_heads // tp, 1), max(cfg.model.num_query_groups // tp, 1)


def _heads(cfg: RunConfig, ranks: int) -> list[ConfigError]:
    """Check that query heads and groups of a rank divide over the ranks that exchange heads."""
    heads, groups = _rank_heads(cfg)
    if heads % ranks == 0 and groups % ranks == 0:
        return []
    comm, cp = cfg.parallelism.cp_comm_type, cfg.parallelism.context_parallel_size
    divisor = nearest_divisor(ranks, math.gcd(heads, groups))
    keep = (
        f"parallelism.context_parallel_size={divisor} to keep a2a"
        if comm == "a2a"
        else f"parallelism.hierarchical_context_parallel_sizes=[{divisor},{cp // divisor}]"
    )
    rule = (
        f"a2a shares the num_attention_heads / TP = {heads} heads and num_query_groups / TP = {groups} groups "
        f"of a rank over {ranks} ranks."
    )
    return [ConfigError(f"parallelism.cp_comm_type={comm}", rule, f"Set parallelism.cp_comm_type=p2p, or {keep}.")]


def seq_length_multiple(cfg: RunConfig, context_parallel_size: int) -> tuple[int, str]:
    """Return what ``seq_length`` must be a multiple of at this CP, and the rule in words."""
    tp, cp = cfg.parallelism.tensor_model_parallel_size, context_parallel_size
    if cfg.precision.compute.startswith("fp8"):
        tile = 128 if cfg.precision.fp8_recipe == "blockwise" else 16
        return 2 * tile * cp * tp, f"{tile}*2*CP*TP, the tile of FP8 matrix products on every rank"
    split_tp = tp if cfg.parallelism.sequence_parallel else 1
    halves = 2 * cp if cp > 1 else 1
    words = {
        (True, True): "both 2*CP and CP*TP",
        (True, False): "2*CP, because every CP rank takes two pieces of a row",
        (False, True): "TP, because sequence parallel splits a row over the TP ranks",
    }
    return math.lcm(halves, cp * split_tp), words.get((halves > 1, split_tp > 1), "1")


def _seq_length(cfg: RunConfig) -> list[ConfigError]:
    length, cp = cfg.seq_length, cfg.parallelism.context_parallel_size
    multiple, words = seq_length_multiple(cfg, cp)
    if length == 1:
        return [ConfigError("seq_length=1", "a row of one token has nothing to predict.", "Set seq_length=2 or more.")]
    if length % multiple == 0:
        return []
    fitting = [n for n in _powers_of_two() if n != cp and length % seq_length_multiple(cfg, n)[0] == 0]
    other = f", or parallelism.context_parallel_size={_closest(cp, fitting)}" if fitting else ""
    nearest = exact_tokens(nearest_multiple(length, multiple))
    return [
        ConfigError(
            f"seq_length={exact_tokens(length)}",
            f"must be a multiple of {multiple} ({words}).",
            f"Set seq_length={nearest}{other}.",
        )
    ]


def _vocab_padding(cfg: RunConfig) -> list[ConfigError]:
    """Optimizer state that is carried over has the parent's padding: ask for a vocabulary no layout pads."""
    model, tp = cfg.model, cfg.parallelism.tensor_model_parallel_size
    padded = model.padded_vocab_size(tp)
    if cfg.transition is not Transition.WEIGHTS_AND_OPTIMIZER or padded == model.vocab_size or model.vocab_size % tp:
        return []
    rule = (
        f"pads the vocabulary of {model.vocab_size} to {padded} at TP {tp}; optimizer state carried over from a parent "
        "with another TP would not fit."
    )
    nearest = math.gcd(model.make_vocab_size_divisible_by, model.vocab_size // tp)
    return [_finding("model.make_vocab_size_divisible_by", model.make_vocab_size_divisible_by, rule, nearest)]


LAYOUT_RULES: tuple[Callable[[RunConfig], list[ConfigError]], ...] = (
    _shape,
    _tensor_parallel,
    _pipeline_parallel,
    _context_parallel,
    _seq_length,
    _vocab_padding,
    _planned_world,
)
"""Rules between lengths, model shape and layout that can be checked without starting a rank."""


def _finding(path: str, value: int, rule: str, nearest: int) -> ConfigError:
    return ConfigError(f"{path}={value}", rule, f"Set {path}={nearest}.")


def nearest_multiple(value: int, of: int) -> int:
    """Return the positive multiple of ``of`` closest to ``value``; the smaller of two."""
    below = max(value // of, 1) * of
    above = below + of
    return below if abs(value - below) <= abs(above - value) else above


def nearest_divisor(value: int, of: int) -> int:
    """Return the divisor of ``of`` closest to ``value``; the smaller of two."""
    return _closest(value, [number for number in range(1, of + 1) if of % number == 0])


def _closest(value: int, candidates: Sequence[int]) -> int:
    return min(candidates, key=lambda number: (abs(number - value), number))


def _powers_of_two() -> list[int]:
    return [2**n for n in range(_MAX_DEGREE.bit_length())]
