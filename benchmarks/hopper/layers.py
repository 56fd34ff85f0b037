"""Layers of Llama-3-8B with their optimizer on packed rows of ProLong's length mix: speed and memory."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from benchmarks.hopper.bench import Bench, Stage
from benchmarks.hopper.layer_memory import layers_that_fit, planned_bytes, state_bytes
from benchmarks.hopper.measure import kernel_seconds, median_seconds, peak_bytes, release
from benchmarks.hopper.megatron import RECOMPUTE, Trainable, start
from benchmarks.hopper.records import Row, at_most, attempt, measured, not_run
from benchmarks.hopper.rows import LONG_DOCUMENT_TOKENS, RowKind, micro_batch, prolong_mix
from nemo_prolong.config.schema import ModelConfig, PrecisionConfig
from nemo_prolong.plan.flops import training_flops
from nemo_prolong.units import format_bytes, format_tokens

LLAMA_3_8B = ModelConfig(
    name="Llama-3-8B",
    nemo_config="Llama3Config8B",
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=14336,
    num_attention_heads=32,
    num_query_groups=8,
    kv_channels=128,
    vocab_size=128_256,
    make_vocab_size_divisible_by=32,
    rotary_base=1.28e8,
)
THIN = LLAMA_3_8B.model_copy(
    update={
        "name": "thin",
        "nemo_config": "LlamaConfig",
        "num_layers": 2,
        "hidden_size": 64,
        "ffn_hidden_size": 224,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": 16,
        "vocab_size": 128,
    }
)

_MEMORY_TOLERANCE = 1.05
USABLE_SHARE = 0.94
"""Of the memory that is free: the rest is lost between blocks of the allocator."""

# What a long row leaves out where its head does not fit beside one layer.
_SMALL_VOCABULARY = 2048
# More would fit on some devices: the share of the peak stays, the minutes grow.
_MOST_LAYERS = {65_536: 12, 131_072: 4, 262_144: 2}


@dataclass(frozen=True)
class Load:
    """What is trained.

    Attributes:
        row_tokens: Tokens of a row.
        mfu: Least share of the dense bf16 peak on the device that counts as good: the aim of this recipe at 64K, what
            NVIDIA printed for FP8 with NeMo 24.03 beyond.
    """

    row_tokens: int
    mfu: float


_FULL = (Load(65_536, 0.40), Load(131_072, 0.33), Load(262_144, 0.30))
_SMALL = (Load(256, 0.0), Load(512, 0.0))


def model_that_fits(row_tokens: int, free_bytes: int) -> ModelConfig | None:
    """Return as many layers of Llama-3-8B as fit, with a small vocabulary if none does beside the whole one."""
    for vocab_size in (LLAMA_3_8B.vocab_size, _SMALL_VOCABULARY):
        model = LLAMA_3_8B.model_copy(update={"vocab_size": vocab_size, "num_layers": _MOST_LAYERS[row_tokens]})
        if layers := layers_that_fit(model, row_tokens, free_bytes):
            return model.model_copy(update={"num_layers": layers})
    return None


def precision_of(backend: str, compute: str) -> PrecisionConfig:
    """Return a precision with full recomputation."""
    return PrecisionConfig(compute=compute, backend=backend, recompute=RECOMPUTE)


def run(bench: Bench) -> Iterator[Row]:
    """Measure every length, and at 64K Transformer Engine beside the torch backend."""
    start(bench.device)
    for load in _FULL if bench.full else _SMALL:
        # What the load before left in torch's cache would not count as free.
        release(bench.device)
        free = int(USABLE_SHARE * torch.cuda.mem_get_info(bench.device)[0]) if bench.full else 0
        model = model_that_fits(load.row_tokens, free) if bench.full else THIN
        name = format_tokens(load.row_tokens)
        if model is None:
            least = LLAMA_3_8B.model_copy(update={"vocab_size": _SMALL_VOCABULARY, "num_layers": 1})
            needed = format_bytes(planned_bytes(least, load.row_tokens, "cuda"))
            yield not_run(f"rows of {name}", f"one layer needs {needed}, {format_bytes(free)} are free.")
            continue
        yield from attempt(f"rows of {name}", functools.partial(_measure, bench, model, load, "torch", "bf16"))
        if load.row_tokens == LONG_DOCUMENT_TOKENS and importlib.util.find_spec("transformer_engine"):
            for compute in ("bf16", "fp8"):
                part = functools.partial(_measure, bench, model, load, "te", compute)
                yield from attempt(f"rows of {name}, Transformer Engine, {compute}", part)


def _measure(bench: Bench, model: ModelConfig, load: Load, backend: str, compute: str) -> Iterator[Row]:
    """Take steps on rows of every kind; yield speed, memory and what the time goes to."""
    release(bench.device)
    long_tokens = LONG_DOCUMENT_TOKENS if bench.full else _SMALL[0].row_tokens
    kinds = prolong_mix(load.row_tokens, long_tokens)
    batches = {kind.name: micro_batch(kind.lengths, model.vocab_size) for kind in kinds}
    built: list[Trainable] = []

    def first_steps() -> None:
        built.append(Trainable.build(model, load.row_tokens, precision_of(backend, compute), bench.device))
        for batch in (*batches.values(), *batches.values()):
            built[0].step(batch)

    peaks = []
    # A CPU's profiler misses a free now and then, which can only make the figure larger.
    for _ in range(1 if bench.device.type == "cuda" else 3):
        built.clear()
        peaks.append(peak_bytes(bench.device, first_steps))
    peak = min(peaks)
    trainable = built.pop()
    name = f"{format_tokens(load.row_tokens)}, {backend} {compute}"
    yield from _memory(name, model, load, peak, bench, backend)
    steps = {kind: functools.partial(trainable.step, batch) for kind, batch in batches.items()}
    seconds = median_seconds(bench.device, steps, warm=True)
    mfu = None if compute == "fp8" else load.mfu
    yield from speed_rows(bench, name, model, kinds, seconds, compute, mfu)
    yield from _shares(bench, name, steps, seconds)


def _memory(name: str, model: ModelConfig, load: Load, peak: int, bench: Bench, backend: str) -> Iterator[Row]:
    plan = planned_bytes(model, load.row_tokens, bench.device.type)
    note = f"{format_bytes(peak)}, plan {format_bytes(plan)} (state {format_bytes(state_bytes(model))}); "
    note += f"{model.num_layers} layers, vocabulary {model.vocab_size:,}"
    bar = f"{name}: peak memory over the plan"
    if backend == "torch":
        yield at_most(bar, peak / plan, _MEMORY_TOLERANCE, note=note)
    else:
        yield measured(bar, peak / plan, "", note=f"{note}; the plan is the torch backend's")


def speed_rows(
    bench: Bench,
    name: str,
    model: ModelConfig,
    kinds: list[RowKind],
    seconds: dict[str, float],
    compute: str,
    mfu: float | None = None,
) -> Iterator[Row]:
    """Yield the rates of the mix: each kind of row as often as its share of the tokens.

    Args:
        bench: Where.
        name: What was run.
        model: The model.
        kinds: Rows of one length.
        seconds: Name of a kind -> time of a step on such a row.
        compute: ``precision.compute``. FP8 has a second row, with its own peak.
        mfu: Least causal MFU that counts as good, or None.
    """
    flops = {kind.name: training_flops(model, kind.lengths) for kind in kinds}
    mean_seconds = sum(kind.share * seconds[kind.name] for kind in kinds)
    rate = sum(kind.share * flops[kind.name] for kind in kinds) / mean_seconds
    yield measured(f"{name}: tokens per second of the mix", sum(kinds[0].lengths) / mean_seconds, "tokens/s")
    yield measured(f"{name}: causal model FLOPs of the mix", rate / 1e12, "TFLOPS")
    rates = [f"{kind.name} {flops[kind.name] / seconds[kind.name] / 1e12:.0f} TFLOPS" for kind in kinds]
    note = f"{', '.join(rates)}; recomputation not counted, peak of bf16"
    yield from bench.shares_of_peak(f"{name}: causal MFU of the mix", rate, mfu, note)
    if compute == "fp8":
        note = "the same FLOPs; attention is in bf16"
        yield from bench.shares_of_peak(f"{name}: share of FP8's own peak", rate, None, note, compute)


def _shares(
    bench: Bench, name: str, steps: dict[str, functools.partial[torch.Tensor]], seconds: dict[str, float]
) -> Iterator[Row]:
    """Yield what the time of each kind of row goes to."""
    for kind, step in steps.items():
        spent = kernel_seconds(bench.device, step)
        whole = sum(spent.values())
        note = ", ".join(f"{what} {part / whole:.1%}" for what, part in sorted(spent.items()))
        if bench.full:
            note += f"; kernels fill {whole / seconds[kind]:.1%} of the step"
        rest = spent.get("the rest", 0.0) / whole
        yield measured(f"{name}: share outside attention and products, {kind}", rest, "", note=note)


STAGE = Stage(
    name="layers",
    title="Llama-3-8B layers",
    shows="Optimizer steps of as many layers as fit (12, 4 and 2 at most), every layer computed again, on rows of "
    "ProLong's mix of lengths, with train.deterministic=false: speed, causal MFU, peak memory against the plan, and "
    "what kind of kernel the time goes to.",
    run=run,
    needs=("nemo", "megatron"),
    limit_seconds=900.0,
)
