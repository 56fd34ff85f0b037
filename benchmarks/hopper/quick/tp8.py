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
from benchmarks.hopper.quick.measure import GIB, repeats
from benchmarks.hopper.quick.te import te_precision
from benchmarks.hopper.records import Row, attempt, measured
from benchmarks.hopper.rows import RowKind, micro_batch, short_documents
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
    kinds = [
        RowKind("one document", 1.0, [tokens]),
        RowKind("8 equal documents", 1.0, [tokens // 8] * 8),
        RowKind("short documents", 1.0, short_documents(tokens, 0, tokens)),
    ]
    for kind in kinds:
        yield from attempt(f"layer of TP 8, {kind.name}", functools.partial(_layer, bench, kind, models, built))


def _layer(bench: Bench, kind: RowKind, models: list[ModelConfig], built: list[Trainable]) -> Iterator[Row]:
    batch = micro_batch(kind.lengths, models[0].vocab_size)
    calls = [functools.partial(trainable.forward_backward, batch) for trainable in built]
    peaks = [peak_bytes(bench.device, call) for call in calls]
    sides = dict(zip(("more", "fewer"), calls, strict=True))
    taken = median_seconds(bench.device, sides, warm=True, repeats=repeats(bench))
    layers = models[0].num_layers - models[1].num_layers
    seconds = (taken["more"] - taken["fewer"]) / layers
    flops = [training_flops(model, kind.lengths) for model in models]
    rate = (flops[0] - flops[1]) / layers / seconds
    name = f"layer of TP 8, {format_tokens(sum(kind.lengths))}, {kind.name}"
    both = ", ".join(
        f"{model.num_layers} layers {time * 1e3:.4g} ms" for model, time in zip(models, taken.values(), strict=True)
    )
    note = f"{rate / 1e12:.4g} TFLOPS; {both}"
    yield measured(f"{name}: forward and backward", seconds * 1e3, "ms", note=note)
    planned = kept_bytes_per_token(models[0])
    kept = (peaks[0] - peaks[1]) / layers / sum(kind.lengths)
    note = f"without sequence parallelism; by arithmetic {planned:,}"
    yield measured(f"{name}: kept per token", kept, "bytes", peer=planned, note=note)


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
