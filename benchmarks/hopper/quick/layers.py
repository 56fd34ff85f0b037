"""Layers of Llama-3-8B with their optimizer on rows of stage 1: the speed of each backend and precision."""

from __future__ import annotations

import functools
import importlib.util
import time
from collections.abc import Iterator

import torch

from benchmarks.hopper.bench import Bench
from benchmarks.hopper.layer_memory import layers_that_fit, planned_bytes
from benchmarks.hopper.layers import LLAMA_3_8B, THIN, USABLE_SHARE, speed_rows
from benchmarks.hopper.measure import median_seconds, peak_bytes, release, seconds_of
from benchmarks.hopper.megatron import RECOMPUTE, Trainable, start
from benchmarks.hopper.quick.measure import GIB, documents_of, repeats
from benchmarks.hopper.quick.te import te_precision
from benchmarks.hopper.records import Row, measured, not_run
from benchmarks.hopper.rows import RowKind, micro_batch, prolong_mix
from nemo_prolong.config.schema import ModelConfig, PrecisionConfig
from nemo_prolong.units import format_bytes

_LAYERS = 8


def start_rows(bench: Bench) -> Iterator[Row]:
    """Import everything and take the first step of a thin model, with all that is compiled on the way."""
    started = time.perf_counter()
    start(bench.device)
    has_te = importlib.util.find_spec("transformer_engine") is not None
    if bench.full and has_te:
        importlib.import_module("transformer_engine.pytorch")
    yield measured("imports of the engine", time.perf_counter() - started, "s")
    sizes = {"num_layers": 1, "vocab_size": 2048, "hidden_size": 1024, "ffn_hidden_size": 3584}
    heads = {"num_attention_heads": 8, "num_query_groups": 2, "kv_channels": 128}
    model = LLAMA_3_8B.model_copy(update={"nemo_config": "LlamaConfig", **sizes, **heads}) if bench.full else THIN
    precision = te_precision(bench) if has_te else PrecisionConfig(compute="bf16", backend="torch")
    tokens = bench.sized(2048, 64)
    batch = micro_batch([tokens // 2] * 2, model.vocab_size)

    def first_step() -> None:
        Trainable.build(model, tokens, precision, bench.device).step(batch)

    yield measured("first step of a thin model", seconds_of(bench.device, first_step), "s")


def te_rows(bench: Bench) -> Iterator[Row]:
    """Measure Transformer Engine in bf16, every layer keeping what it needs."""
    return _mix_rows(bench, "te bf16, no recomputation", te_precision(bench))


def te_recompute_rows(bench: Bench) -> Iterator[Row]:
    """Measure Transformer Engine in bf16, every layer computed again."""
    return _mix_rows(bench, "te bf16, full recomputation", te_precision(bench, recompute=RECOMPUTE))


def te_fp8_rows(bench: Bench) -> Iterator[Row]:
    """Measure FP8 matrix products."""
    return _mix_rows(bench, "te fp8, no recomputation", te_precision(bench, "fp8"))


def torch_rows(bench: Bench) -> Iterator[Row]:
    """Measure the torch backend; its steps are long, so that one of each kind is timed."""
    precision = PrecisionConfig(compute="bf16", backend="torch", recompute=RECOMPUTE)
    return _mix_rows(bench, "torch bf16, full recomputation", precision, most_repeats=1)


def _mix_rows(bench: Bench, name: str, precision: PrecisionConfig, most_repeats: int | None = None) -> Iterator[Row]:
    """Yield memory, then the time of a step on a row of each kind, then the rates of the mix."""
    release(bench.device)
    row_tokens = bench.sized(65_536, 64)
    kinds = prolong_mix(row_tokens, row_tokens)
    recompute = precision.recompute.recompute_granularity == "full"
    model = _model(bench, row_tokens, recompute=recompute)
    if model is None:
        yield not_run(name, f"not one layer fits into {format_bytes(torch.cuda.mem_get_info(bench.device)[0])}.")
        return
    batches = [micro_batch(kind.lengths, model.vocab_size) for kind in kinds]
    built: list[Trainable] = []

    def first_steps() -> None:
        built.append(Trainable.build(model, row_tokens, precision, bench.device))
        for batch in batches:
            built[0].step(batch)

    yield _memory_row(bench, name, model, row_tokens, peak_bytes(bench.device, first_steps), recompute=recompute)
    seconds: dict[str, float] = {}
    for kind, batch in zip(kinds, batches, strict=True):
        step = {kind.name: functools.partial(built[0].step, batch)}
        seconds |= median_seconds(bench.device, step, warm=True, repeats=most_repeats or repeats(bench))
        yield _step_row(name, kind, seconds[kind.name])
    yield from speed_rows(bench, name, model, kinds, seconds, precision.compute)


def _model(bench: Bench, row_tokens: int, *, recompute: bool) -> ModelConfig | None:
    """Return eight layers, or as many as fit; None where not one does."""
    if not bench.full:
        return THIN
    model = LLAMA_3_8B.model_copy(update={"num_layers": _LAYERS})
    free = int(USABLE_SHARE * torch.cuda.mem_get_info(bench.device)[0])
    layers = layers_that_fit(model, row_tokens, free, recompute=recompute)
    return model.model_copy(update={"num_layers": layers}) if layers else None


def _memory_row(bench: Bench, name: str, model: ModelConfig, row_tokens: int, peak: int, *, recompute: bool) -> Row:
    plan = planned_bytes(model, row_tokens, bench.device.type, recompute=recompute)
    note = f"{model.num_layers} layers, vocabulary {model.vocab_size:,}; plan {format_bytes(plan)}"
    return measured(f"{name}: peak memory", peak / GIB, "GiB", peer=plan / GIB, note=note)


def _step_row(name: str, kind: RowKind, seconds: float) -> Row:
    rate = sum(kind.lengths) / seconds
    note = f"{documents_of(kind.lengths)}, {seconds:.4g} s a step"
    return measured(f"{name}: {kind.name}", rate, "tokens/s", note=note)
