"""A layer as one of 8 tensor-parallel ranks has it: its time on a rank's share of stage 2, its memory on a whole row.

The rank computes everything that is not split over heads and MLP for all tokens: there is no sequence parallelism on
one GPU, and no exchange.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

from benchmarks.hopper.bench import Bench
from benchmarks.hopper.layer_memory import kept_bytes_per_token, planned_bytes
from benchmarks.hopper.layers import LLAMA_3_8B, THIN
from benchmarks.hopper.measure import median_seconds, peak_bytes, release, seconds_of
from benchmarks.hopper.megatron import Trainable
from benchmarks.hopper.quick.measure import GIB, documents_of, repeats
from benchmarks.hopper.quick.te import te_precision
from benchmarks.hopper.records import Row, attempt, measured
from benchmarks.hopper.rows import micro_batch, short_documents
from nemo_prolong.config.schema import ModelConfig
from nemo_prolong.plan.flops import training_flops
from nemo_prolong.units import format_bytes, format_tokens

_SPLIT = ("num_attention_heads", "num_query_groups", "ffn_hidden_size", "vocab_size")


def rank_of(bench: Bench, num_layers: int) -> ModelConfig:
    """Return a model with the share of one tensor-parallel rank: of 8, and on a CPU of 2."""
    whole, ranks = (LLAMA_3_8B, 8) if bench.full else (THIN, 2)
    split = {name: getattr(whole, name) // ranks for name in _SPLIT}
    return whole.model_copy(
        update={"name": f"rank of TP {ranks}", "nemo_config": "LlamaConfig", "num_layers": num_layers, **split}
    )


def layer_rows(bench: Bench) -> Iterator[Row]:
    """Take the difference of six layers and two, so that head and embedding drop out; of two and one on a CPU."""
    release(bench.device)
    tokens = bench.sized(65_536, 64)
    models = [rank_of(bench, layers) for layers in (bench.sized(6, 2), bench.sized(2, 1))]
    built = [Trainable.build(model, tokens, te_precision(bench), bench.device) for model in models]
    yield from attempt("layer of TP 8: kept per token", functools.partial(_kept, bench, tokens, models, built))
    for lengths in ([tokens], [tokens // 8] * 8, short_documents(tokens, 0, tokens)):
        name = f"layer of TP 8, {format_tokens(tokens)}, {documents_of(lengths)}: forward and backward"
        yield from attempt(name, functools.partial(_time, bench, name, lengths, models, built))


def _kept(bench: Bench, tokens: int, models: list[ModelConfig], built: list[Trainable]) -> Iterator[Row]:
    batch = micro_batch([tokens], models[0].vocab_size)
    peaks = [peak_bytes(bench.device, functools.partial(trainable.forward_backward, batch)) for trainable in built]
    kept = (peaks[0] - peaks[1]) / (models[0].num_layers - models[1].num_layers) / tokens
    planned = kept_bytes_per_token(models[0])
    note = f"without sequence parallelism; by arithmetic {planned:,}"
    yield measured("layer of TP 8: kept per token", kept, "bytes", peer=planned, note=note)


def _time(
    bench: Bench, name: str, lengths: list[int], models: list[ModelConfig], built: list[Trainable]
) -> Iterator[Row]:
    batch = micro_batch(lengths, models[0].vocab_size)
    sides = {
        f"{model.num_layers} layers": functools.partial(trainable.forward_backward, batch)
        for model, trainable in zip(models, built, strict=True)
    }
    taken = median_seconds(bench.device, sides, repeats=repeats(bench))
    more, fewer = taken.values()
    layers = models[0].num_layers - models[1].num_layers
    flops = [training_flops(model, lengths) for model in models]
    rate = (flops[0] - flops[1]) / (more - fewer)
    both = ", ".join(f"{model} {seconds * 1e3:.4g} ms" for model, seconds in taken.items())
    yield measured(name, (more - fewer) / layers * 1e3, "ms", note=f"{rate / 1e12:.4g} TFLOPS; {both}")


def memory_rows(bench: Bench) -> Iterator[Row]:
    """Take one step of one layer on a document as long as a row of stage 2."""
    release(bench.device)
    tokens = bench.sized(524_288, 128)
    model = rank_of(bench, 1)
    batch = micro_batch([tokens], model.vocab_size)
    seconds: list[float] = []

    def one_step() -> None:
        trainable = Trainable.build(model, tokens, te_precision(bench), bench.device)
        seconds.append(seconds_of(bench.device, functools.partial(trainable.step, batch)))

    peak = peak_bytes(bench.device, one_step)
    plan = planned_bytes(model, tokens, bench.device.type, recompute=False)
    note = f"the first step took {seconds[0]:.4g} s; plan {format_bytes(plan)}; no sequence parallelism"
    yield measured(
        f"one layer of TP 8, {format_tokens(tokens)}: peak memory", peak / GIB, "GiB", peer=plan / GIB, note=note
    )
