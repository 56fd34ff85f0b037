"""The Transformer Engine backend against the torch backend: attention, FP8, whole runs, checkpoints."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from benchmarks.hopper.attention import boundaries, dense, random_row, with_gradients
from benchmarks.hopper.bench import Bench, Stage
from benchmarks.hopper.measure import largest_error, median_seconds
from benchmarks.hopper.megatron import build_model
from benchmarks.hopper.records import Row, at_most, attempt, holds, measured, not_run
from benchmarks.hopper.rows import short_documents
from benchmarks.hopper.runs import Job, figures, largest_difference, stage_config, train
from nemo_prolong.config.schema import ModelConfig, PrecisionConfig

_BF16, _FP8 = 0.01, 0.02
"""Differences of losses from the bf16 run before it, as docs/verification/unverified.md asks for."""

# Three and two bits of mantissa, halves of which are lost; products and softmax add theirs.
_E4M3, _E5M2 = 2**-3, 2**-2

# What is faster than bf16 by less is not worth its rounding.
_FP8_TIME = 0.8

# Calls after which delayed scaling has factors from tensors that it has seen.
_SETTLING_CALLS = 2

_FP8_RECIPES = ("tensorwise", "delayed", "blockwise")

Precision = dict[str, Any]
Context = Callable[[], AbstractContextManager[Any]]


def one_layer(bench: Bench, tensor_parallel_size: int = 1) -> ModelConfig:
    """Return a model of one layer with the attention of Llama-3-8B, a thin one on a CPU.

    Args:
        bench: Where.
        tensor_parallel_size: Ranks that share its heads; the model has those of one rank.
    """
    return ModelConfig(
        name="one layer",
        nemo_config="LlamaConfig",
        num_layers=1,
        hidden_size=bench.sized(4096, 64),
        ffn_hidden_size=bench.sized(14336, 128),
        num_attention_heads=bench.sized(32, 4) // tensor_parallel_size,
        num_query_groups=bench.sized(8, 2) // tensor_parallel_size,
        kv_channels=bench.sized(128, 16),
        vocab_size=512,
        rotary_base=1e4,
    )


def core_attention(
    bench: Bench, precision: PrecisionConfig, row_tokens: int, tensor_parallel_size: int = 1
) -> torch.nn.Module:
    """Return the attention of a layer that the engine builds."""
    model = build_model(one_layer(bench, tensor_parallel_size), row_tokens, precision, bench.device)
    return model.module.decoder.layers[0].self_attention.core_attention


def called(attention: torch.nn.Module, lengths: Sequence[int], device: torch.device, context: Context) -> Any:
    """Return a function of query, key and value that calls the attention of a layer on a packed row."""
    from nemo_prolong.engine.training.packed_step import bucket_of, packed_seq_params

    equal = len(lengths) if len(set(lengths)) == 1 else None
    params = packed_seq_params(boundaries(lengths, device), bucket_of(max(lengths)), equal_documents=equal)

    def call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        with context():
            output = attention(query, key, value, None, packed_seq_params=params)
        return output.view_as(query)

    return call


def attention_rows(bench: Bench, precision: PrecisionConfig, context: Context, name: str) -> Iterator[Row]:
    """Compare the attention of a precision with float64 and with the torch backend, and time both.

    Args:
        bench: Where.
        precision: Whose attention.
        context: Entered around each call: FP8 or nothing.
        name: What to call it.
    """
    tokens = bench.sized(4096, 256)
    fp8 = precision.compute == "fp8_attention"
    lengths = [tokens // 4] * 4 if fp8 else [1, *short_documents(tokens - 1, 1, bench.sized(65_536, 2048))]
    attention = core_attention(bench, precision, tokens)
    ours = core_attention(bench, PrecisionConfig(compute="bf16", backend="torch"), tokens)
    inputs, gradient = random_row(bench, lengths, torch.bfloat16)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = with_gradients(functools.partial(dense, lengths), exact, gradient.double())
    theirs = functools.partial(with_gradients, called(attention, lengths, bench.device, context), inputs, gradient)
    for _ in range(_SETTLING_CALLS if fp8 else 0):
        theirs()
    actual = theirs()
    peer = with_gradients(called(ours, lengths, bench.device, contextlib.nullcontext), inputs, gradient)
    error = largest_error(peer, expected)
    if fp8:
        yield at_most(f"{name}: error of the output", largest_error(actual[:1], expected[:1]), _E4M3, peer=error)
        yield at_most(f"{name}: error of gradients", largest_error(actual[1:], expected[1:]), _E5M2, peer=error)
    else:
        note = "the bound is twice the error of the torch backend"
        yield at_most(f"{name}: error of output and gradients", largest_error(actual, expected), 2 * error, note=note)
    yield from _attention_times(bench, {"theirs": (attention, context), "ours": (ours, contextlib.nullcontext)}, name)


def _attention_times(bench: Bench, modules: dict[str, tuple[Any, Context]], name: str) -> Iterator[Row]:
    row = bench.sized(65_536, 512)
    for what, lengths in (("one document", [row]), ("eight equal documents", [row // 8] * 8)):
        inputs, gradient = random_row(bench, lengths, torch.bfloat16)
        sides = {
            side: functools.partial(with_gradients, called(module, lengths, bench.device, context), inputs, gradient)
            for side, (module, context) in modules.items()
        }
        seconds = median_seconds(bench.device, sides)
        ratio = seconds["theirs"] / seconds["ours"]
        note = f"{seconds['theirs'] * 1e3:.4g} ms, torch {seconds['ours'] * 1e3:.4g} ms"
        yield measured(f"{name}: time over the torch backend's, {what} of {row:,} tokens", ratio, "", note=note)


def run_rows(bench: Bench, cases: dict[str, tuple[Precision, float]], reference: str) -> Iterator[Row]:
    """Train each case from the same seed and compare its losses with those of the first.

    Args:
        bench: Where.
        cases: Name -> precision and the largest difference of losses.
        reference: Name of the first case, which has no bound.
    """
    expected: list[float] = []
    peak = 0.0
    for name, (precision, bound) in cases.items():
        config = run_config(bench, name, precision)
        rows = []
        for failure in attempt(f"run, {name}", functools.partial(_trained, bench, config)):
            rows.append(failure)
        yield from rows
        if rows:
            continue
        losses, memory = figures(config), max(figures(config, "memory_bytes"))
        if name == reference:
            expected, peak = losses, memory
            yield measured(f"run, {name}: last loss", losses[-1], "")
        elif expected:
            note = f"loss {losses[0]:.4f} to {losses[-1]:.4f}; memory {memory / peak:.3f} of it"
            yield at_most(
                f"run, {name}: difference of losses from {reference}",
                largest_difference(losses, expected),
                bound,
                note=note,
            )


def run_config(bench: Bench, name: str, precision: Precision) -> Any:
    """Return the stage of a case; FP8 attention has no backward pass that repeats bit by bit."""
    train = {"deterministic": precision["compute"] != "fp8_attention"}
    return stage_config(bench, f"run_{name}".replace(" ", "_"), precision=precision, train=train)


def _trained(bench: Bench, config: Any) -> Iterator[Row]:
    train(bench, [Job(config)])
    yield from ()


def product_rows(bench: Bench) -> Iterator[Row]:
    """Compare matrix products of every FP8 recipe with float64, and time them against bf16."""
    import transformer_engine.pytorch as te
    from transformer_engine.common import recipe as recipes

    tokens, inside, outside = 8192, 4096, 14336
    kinds = {
        "tensorwise": recipes.Float8CurrentScaling(),
        "delayed": recipes.DelayedScaling(),
        "blockwise": recipes.Float8BlockScaling(),
    }
    linear = te.Linear(inside, outside, bias=False, params_dtype=torch.bfloat16, device=bench.device)
    inputs = torch.randn(tokens, inside, dtype=torch.bfloat16, device=bench.device, requires_grad=True)
    gradient = torch.randn(tokens, outside, dtype=torch.bfloat16, device=bench.device)

    def product(recipe: Any = None) -> list[torch.Tensor]:
        with te.autocast(enabled=recipe is not None, recipe=recipe):
            output = linear(inputs)
        return [output.detach(), *torch.autograd.grad(output, [inputs, linear.weight], gradient)]

    weight, exact = linear.weight.detach().double(), inputs.detach().double()
    grad = gradient.double()
    expected = [exact @ weight.T, grad @ weight, grad.T @ exact]
    for name, recipe in kinds.items():
        yield from attempt(f"products, {name}", functools.partial(_product, bench, name, recipe, product, expected))


def _product(bench: Bench, name: str, recipe: Any, product: Any, expected: list[torch.Tensor]) -> Iterator[Row]:
    for _ in range(_SETTLING_CALLS):
        product(recipe)
    yield at_most(f"products, {name}: error of output and gradients", largest_error(product(recipe), expected), _E4M3)
    seconds = median_seconds(bench.device, {"fp8": lambda: product(recipe), "bf16": product})
    yield bench.speed_at_most(f"products, {name}: time over bf16", seconds["fp8"] / seconds["bf16"], _FP8_TIME)


def checkpoint_rows(bench: Bench, first: PrecisionConfig, second: PrecisionConfig, name: str) -> Iterator[Row]:
    """Compare what checkpoints of two precisions hold; load one of the first in the second and that in the first.

    Args:
        bench: Where.
        first: One precision.
        second: The other one.
        name: What to call it.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.validation import StrictHandling

    models = [
        build_model(one_layer(bench), 256, precision, bench.device).module for precision in (first, second, first)
    ]
    names = [checkpoint_entries(model) for model in models[:2]]
    states = [key for key in models[1].state_dict() if key.endswith("_extra_state")]
    differing = sorted(names[0].items() ^ names[1].items())
    note = f"{len(names[0])} entries, {len(states)} _extra_state in the module; {differing[:3] or 'none differ'}"
    yield holds(f"{name}: keys and shapes of checkpoints are equal", not differing, note)
    with torch.no_grad():
        for model in models[1:]:
            for parameter in model.parameters():
                parameter.zero_()
    for step, (source, target) in enumerate(itertools.pairwise(models)):
        directory = bench.scratch / f"{name.replace(' ', '_')}_{step}"
        directory.mkdir()
        dist_checkpointing.save(source.sharded_state_dict(), str(directory))
        strict = StrictHandling.ASSUME_OK_UNEXPECTED
        target.load_state_dict(dist_checkpointing.load(target.sharded_state_dict(), str(directory), strict=strict))
    pairs = zip(models[0].parameters(), models[2].parameters(), strict=True)
    yield holds(f"{name}: weights come back bit by bit", all(torch.equal(*pair) for pair in pairs))


def checkpoint_entries(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Return key -> global shape of everything that a distributed checkpoint of the model holds."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

    found = {}
    for part in model.sharded_state_dict().values():
        built = part.build() if isinstance(part, ShardedTensorFactory) else part
        for piece in built.values() if isinstance(built, dict) else built if isinstance(built, list) else [built]:
            found[piece.key] = tuple(piece.global_shape)
    return found


def cases() -> dict[str, tuple[Precision, float]]:
    """Return the runs to compare, the reference first."""
    te = {"backend": "te"}
    offload = {"cpu_offloading": True, "cpu_offloading_num_layers": 3}
    recipes = {f"fp8 {recipe}": ({**te, "compute": "fp8", "fp8_recipe": recipe}, _FP8) for recipe in _FP8_RECIPES}
    return {
        "torch bf16": ({"backend": "torch", "compute": "bf16"}, 0.0),
        "te bf16": ({**te, "compute": "bf16"}, _BF16),
        "te bf16 with activation offload": ({**te, "compute": "bf16", "offload": offload}, _BF16),
        **recipes,
        "fp8 attention": ({**te, "compute": "fp8_attention", "fp8_recipe": "delayed"}, _FP8),
    }


def fp8_attention_context() -> AbstractContextManager[Any]:
    """Return FP8 as ``precision=fp8_attention`` has it around a layer."""
    import transformer_engine.pytorch as te
    from transformer_engine.common.recipe import DelayedScaling

    return te.autocast(enabled=True, recipe=DelayedScaling(fp8_dpa=True))


def run(bench: Bench) -> Iterator[Row]:
    """Run everything that needs Transformer Engine and a GPU."""
    if not bench.full or importlib.util.find_spec("transformer_engine") is None:
        reason = "Transformer Engine computes on a GPU." if not bench.full else "Transformer Engine is not installed."
        yield not_run("Transformer Engine", reason)
        return
    plain = PrecisionConfig(compute="bf16", backend="torch")
    bf16, fp8 = (PrecisionConfig(compute=c, backend="te", fp8_recipe="delayed") for c in ("bf16", "fp8_attention"))
    parts: dict[str, Callable[[], Iterator[Row]]] = {
        "packed attention": lambda: attention_rows(bench, bf16, contextlib.nullcontext, "packed attention, bf16"),
        "FP8 attention": lambda: attention_rows(bench, fp8, fp8_attention_context, "attention of equal documents, fp8"),
        "products": lambda: product_rows(bench),
        "checkpoints, bf16": lambda: checkpoint_rows(bench, plain, bf16, "torch and te bf16"),
        "checkpoints, fp8": lambda: checkpoint_rows(bench, plain, fp8, "torch and te fp8"),
        "runs": lambda: run_rows(bench, cases(), "torch bf16"),
    }
    for name, part in parts.items():
        yield from attempt(name, part)


STAGE = Stage(
    name="transformer_engine",
    title="Transformer Engine backend",
    shows="Attention of packed rows and FP8 attention of equal documents against float64; matrix products of every FP8 "
    "recipe; whole runs of every precision against the torch backend; keys and weights of checkpoints both ways.",
    run=run,
    needs=("nemo", "megatron"),
    limit_seconds=900.0,
)
