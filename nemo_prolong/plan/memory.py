"""Memory of a training step on one rank, by arithmetic, and the recomputation that it leaves room for.

This is a plan. Nothing in it was measured. What a layer saves is added up tensor by tensor, for Transformer Engine 2.9
in BF16 under Megatron-core 0.15.3. What a backward pass holds besides is less certain. Its terms were chosen so that
they give nine figures that were worked out by hand for layouts of Llama-3-8B, and no source says that they are these.

It leaves out the LM head (2 GB at TP 1, where a vocabulary of 128K keeps its fp32 gradient), padding of documents,
fragmentation, and what a save needs. ``MARGIN`` is for these, and for what the arithmetic got wrong.

Under FP8 the layers save copies of one byte instead of two. They are counted as two here.
"""

from __future__ import annotations

from typing import NamedTuple

from nemo_prolong.config.schema import ModelConfig, RecomputeConfig, RunConfig
from nemo_prolong.plan.model_size import model_size

MARGIN = 0.1
"""Share of the device's memory that a plan must leave free."""

FIXED_BYTES = 4_000_000_000
"""CUDA context, buffers of NCCL, workspaces of cuBLAS and cuDNN."""

ASSUMED_DEVICE_BYTES = 80_000_000_000
"""Memory of the device that the recipe is planned for, an H100."""

_RING_STEPS_SHARE = 0.75
"""Queries that a step of the ring between CP ranks works on: all with keys of earlier ranks, half with those of later
ones. The outputs of all steps are kept until the last."""

NOTHING = RecomputeConfig()
MLP = RecomputeConfig(recompute_granularity="selective", recompute_modules=["mlp"])
EVERY_LAYER = RecomputeConfig(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)

_CANDIDATES = {"nothing": NOTHING, "mlp": MLP, "every layer": EVERY_LAYER}
"""From the fastest to the smallest."""


class StepMemory(NamedTuple):
    """Bytes of one rank where a step needs most, in the backward pass of its last layer.

    Attributes:
        state: Weights, gradients, master weights and the moments of Adam.
        kept: What the forward pass saves for the backward pass, over all layers and micro-batches in flight.
        recomputed: What is saved once more for the layers that are computed again at a time.
        backward: Gradients inside a layer, gathered inputs, and the outputs of the ring between CP ranks.
        fixed: ``FIXED_BYTES``.
    """

    state: float
    kept: float
    recomputed: float
    backward: float
    fixed: float

    @property
    def total(self) -> float:
        """Bytes in all."""
        return sum(self)


class RecomputeChoice(NamedTuple):
    """The recomputation that a plan has chosen.

    Attributes:
        recompute: As it is configured by hand.
        fits: Whether the plan leaves ``MARGIN`` free.
        sentence: The choice with its numbers.
    """

    recompute: RecomputeConfig
    fits: bool
    sentence: str


class _LayerBytes(NamedTuple):
    """Bytes of a layer for each token of a rank.

    Attributes:
        input: Its input, which is all that is kept of a layer that is computed again.
        mlp: What the MLP saves besides its input.
        all: Everything that a layer saves, its input too.
        backward: See ``StepMemory``.
    """

    input: float
    mlp: float
    all: float
    backward: float


def planned_memory(cfg: RunConfig, recompute: RecomputeConfig, world_size: int) -> StepMemory:
    """Return the memory of a step with some recomputation, whatever the configuration says about it.

    Args:
        cfg: The stage, whose layout divides ``world_size``.
        recompute: With a granularity that is not auto.
        world_size: Ranks.
    """
    parallelism = cfg.parallelism
    layer, tokens = _layer_bytes(cfg), cfg.seq_length // parallelism.context_parallel_size
    layers = cfg.model.num_layers // parallelism.pipeline_model_parallel_size
    kept, recomputed = _kept_and_recomputed(layer, layers, recompute)
    rows = tokens * cfg.train.micro_batch_size
    return StepMemory(
        state=_state_bytes(cfg, world_size),
        kept=kept * rows * _micro_batches_in_flight(cfg, world_size),
        recomputed=recomputed * rows,
        backward=layer.backward * rows,
        fixed=FIXED_BYTES,
    )


def choose_recompute(cfg: RunConfig, world_size: int, device_bytes: int) -> RecomputeChoice:
    """Return the least recomputation that fits: of nothing, of the MLP, or of every layer, which is taken anyway.

    Args:
        cfg: The stage.
        world_size: Ranks.
        device_bytes: Memory of the device of one rank.
    """
    totals = {name: planned_memory(cfg, candidate, world_size).total for name, candidate in _CANDIDATES.items()}
    limit = (1 - MARGIN) * device_bytes
    chosen = next((name for name, total in totals.items() if total <= limit), None)
    name = chosen or "every layer"
    plans = ", ".join(f"{other} {total / 1e9:.1f}" for other, total in totals.items())
    sentence = (
        f"computes {name} again in the backward pass: of {device_bytes / 1e9:.1f} GB a rank, of which {MARGIN:.0%} "
        f"stay free, the plan needs {plans} (arithmetic, not measured)"
    )
    return RecomputeChoice(_CANDIDATES[name], chosen is not None, sentence)


def _layer_bytes(cfg: RunConfig) -> _LayerBytes:
    """Return what a layer of Transformer Engine saves of each token.

    With sequence parallel that is, for Llama-3-8B in BF16, 139,392 / TP + 1,024 bytes. Every norm keeps input and
    output. The attention keeps queries, keys, values, output and the fp32 log-sum-exp of each head. SwiGLU keeps both
    halves of its input and its product. RoPE keeps cosines and sines for queries and keys.
    """
    model, parallelism = cfg.model, cfg.parallelism
    element, tp = _element_bytes(cfg), parallelism.tensor_model_parallel_size
    hidden, query, key_value, ffn = (
        element * width
        for width in (
            model.hidden_size,
            model.num_attention_heads * model.kv_channels,
            2 * model.num_query_groups * model.kv_channels,
            model.ffn_hidden_size,
        )
    )
    hidden_here = hidden / (tp if parallelism.sequence_parallel else 1)
    attention = (query + key_value + query + 4 * model.num_attention_heads) / tp + 4 * element * model.kv_channels
    mlp = hidden_here + 3 * ffn / tp
    ring = _RING_STEPS_SHARE * query * parallelism.context_parallel_size if parallelism.context_parallel_size > 1 else 0
    return _LayerBytes(
        input=hidden_here,
        mlp=mlp,
        all=3 * hidden_here + attention + mlp,
        # Fitted, see the module: gradients of MLP and attention at the same time, and two whole tensors.
        backward=2 * hidden + (3 * ffn + 2 * query + key_value + ring) / tp,
    )


def _kept_and_recomputed(layer: _LayerBytes, layers: int, recompute: RecomputeConfig) -> tuple[float, float]:
    """Return the bytes per token that all layers keep, and those that are saved once more at a time."""
    if recompute.recompute_granularity is None:
        return layers * layer.all, 0
    if recompute.recompute_granularity == "selective":
        return layers * (layer.all - layer.mlp), layer.mlp
    assert recompute.recompute_granularity == "full" and recompute.recompute_num_layers is not None, recompute
    if recompute.recompute_method == "block":
        again = recompute.recompute_num_layers
        return again * layer.input + (layers - again) * layer.all, layer.all
    at_a_time = recompute.recompute_num_layers
    return layers / at_a_time * layer.input, at_a_time * layer.all


def _micro_batches_in_flight(cfg: RunConfig, world_size: int) -> int:
    """Return the micro-batches whose activations the first pipeline stage holds at a time."""
    parallelism = cfg.parallelism
    data_parallel_size = world_size // parallelism.model_parallel_size
    per_rank = cfg.train.global_batch_size // (cfg.train.micro_batch_size * data_parallel_size)
    return min(parallelism.pipeline_model_parallel_size, per_rank)


def _state_bytes(cfg: RunConfig, world_size: int) -> float:
    """Return the memory of weights, gradients in fp32, and optimizer.

    The optimizer has fp32 master weights, but for fp32 weights, and two moments. Its distributed form shares them over
    the DP x CP ranks. FP8 keeps two copies of the matrices of the layers, as they are and transposed.
    """
    parallelism = cfg.parallelism
    shards = world_size // (parallelism.tensor_model_parallel_size * parallelism.pipeline_model_parallel_size)
    element = _element_bytes(cfg)
    optimizer = (8 if element == 4 else 12) / (shards if cfg.optim.use_distributed_optimizer else 1)
    fp8_copies = 2 * _parameters_of_layers(cfg) if cfg.precision.compute.startswith("fp8") else 0
    return (element + 4 + optimizer) * _parameters(cfg) + fp8_copies


def _parameters_of_layers(cfg: RunConfig) -> float:
    """Return the parameters in matrices of layers on one rank."""
    size, parallelism = model_size(cfg.model), cfg.parallelism
    ranks = parallelism.tensor_model_parallel_size * parallelism.pipeline_model_parallel_size
    return (size.attention + size.mlp) / ranks


def _parameters(cfg: RunConfig) -> float:
    """Return the parameters of the rank that has most: norms whole, and of several pipeline stages an outer one."""
    size, parallelism = model_size(cfg.model), cfg.parallelism
    tp, pp = parallelism.tensor_model_parallel_size, parallelism.pipeline_model_parallel_size
    padding = _padding_share(cfg.model, tp)
    ends = (size.embedding + size.head) * padding if pp == 1 else max(size.embedding, size.head) * padding
    return _parameters_of_layers(cfg) + size.norms / pp + ends / tp


def _padding_share(model: ModelConfig, tensor_parallel_size: int) -> float:
    return model.padded_vocab_size(tensor_parallel_size) / model.vocab_size


def _element_bytes(cfg: RunConfig) -> int:
    """Return the bytes of a weight and of an activation."""
    return 4 if cfg.precision.compute == "fp32" else 2
