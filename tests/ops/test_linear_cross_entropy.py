"""The chunked LM head and cross-entropy, against plain torch with all logits, in float64."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_prolong.ops.linear_cross_entropy import HeadLoss, _layout, linear_cross_entropy
from tests.support.turns import turn

HIDDEN_SIZE = 5
PROGRAM = "tests.ops.cross_entropy_program"
MEMORY_PROGRAM = "tests.ops.cross_entropy_memory"


def head_inputs(tokens: int, rows: int, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> tuple[Any, ...]:
    """Return hidden, weight, labels and a mask of 0, 0.5 and 1; masked labels are no ids at all."""
    generator = torch.Generator().manual_seed(1000 * tokens + rows)
    hidden = scale * torch.randn(tokens, HIDDEN_SIZE, generator=generator, dtype=torch.float64)
    weight = torch.randn(rows, HIDDEN_SIZE, generator=generator, dtype=torch.float64)
    mask = torch.randint(0, 3, (tokens,), generator=generator) / 2
    labels = torch.randint(0, rows, (tokens,), generator=generator)
    labels = torch.where(mask > 0, labels, torch.tensor([-100, 2**40])[torch.arange(tokens) % 2])
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels, mask


def plain_head(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor) -> HeadLoss:
    """Return the losses from all logits at once."""
    labels = labels.masked_fill(mask == 0, -100)
    losses = F.cross_entropy(hidden @ weight.T, labels, reduction="none", ignore_index=-100)
    return HeadLoss((losses * mask).sum(), losses.detach())


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference, relative to the largest expected value."""
    assert actual.shape == expected.shape
    if not expected.numel():
        return 0.0
    difference = (actual.detach().double() - expected.detach().double()).abs().max()
    return float(difference / expected.detach().double().abs().max().clamp(min=1e-30))


def results(head: HeadLoss, leaves: list[torch.Tensor], factor: float = 1.0) -> dict[str, torch.Tensor]:
    """Return losses and the gradients of ``factor`` times their sum, by name."""
    hidden, weight = torch.autograd.grad(head.loss_sum * factor, leaves)
    return {**head._asdict(), "hidden gradient": hidden, "weight gradient": weight}


@settings(deadline=None, max_examples=80)
@given(
    tokens=st.integers(0, 33),
    rows=st.integers(1, 40),
    chunk_tokens=st.integers(1, 40),
    factor=st.sampled_from([1.0, -0.3, 1e-4, 0.0]),
)
def test_losses_and_gradients_are_those_of_all_logits(tokens: int, rows: int, chunk_tokens: int, factor: float) -> None:
    inputs = head_inputs(tokens, rows)
    ours = results(linear_cross_entropy(*inputs, chunk_tokens=chunk_tokens), inputs[:2], factor)
    for name, expected in results(plain_head(*inputs), inputs[:2], factor).items():
        assert relative_error(ours[name], expected) <= 1e-12, name


@pytest.mark.parametrize("scale", [1.0, 2.0**14], ids=["usual logits", "logits of ten thousands"])
def test_float32_stays_within_1e_6_of_plain_torch(scale: float) -> None:
    hidden, weight, labels, mask = head_inputs(257, 1003, torch.float32)
    # Quarters: the logits are exact in both precisions, what differs is what becomes of them.
    leaves = [
        ((x.detach() * 4).round() / 4 * factor).requires_grad_() for x, factor in ((hidden, scale), (weight, 1.0))
    ]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    ours = results(linear_cross_entropy(*leaves, labels, mask, chunk_tokens=64), leaves)
    plain, truth = results(plain_head(*leaves, labels, mask), leaves), results(plain_head(*exact, labels, mask), exact)
    for name in truth:
        assert relative_error(ours[name], plain[name]) <= 1e-6, name
        assert relative_error(ours[name], truth[name]) <= max(1e-6, relative_error(plain[name], truth[name])), name


class FreshLossSum(torch.autograd.Function):
    """The loss sum with a graph of its own for each backward pass: gradcheck goes backward several times."""

    @staticmethod
    def forward(ctx: Any, *inputs: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*inputs)
        return linear_cross_entropy(*inputs, chunk_tokens=3).loss_sum

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        with torch.enable_grad():
            inputs = [
                x.detach().requires_grad_(needed)
                for x, needed in zip(ctx.saved_tensors, ctx.needs_input_grad, strict=True)
            ]
            loss_sum = linear_cross_entropy(*inputs, chunk_tokens=3).loss_sum
        return *torch.autograd.grad(loss_sum, inputs[:2], grad), None, None


def test_the_gradient_is_that_of_finite_differences() -> None:
    assert torch.autograd.gradcheck(FreshLossSum.apply, head_inputs(7, 11))


@settings(deadline=None, max_examples=30)
@given(rows=st.integers(2, 40), data=st.data())
def test_padded_rows_of_the_vocabulary_take_no_part(rows: int, data: Any) -> None:
    vocab_size = data.draw(st.integers(1, rows - 1))
    hidden, weight, labels, mask = head_inputs(9, rows)
    labels = torch.where(mask > 0, labels % vocab_size, labels)
    real = weight.detach()[:vocab_size].requires_grad_()
    expected = linear_cross_entropy(hidden, real, labels, mask)
    with torch.no_grad():
        weight[vocab_size:] = math.nan
    actual = linear_cross_entropy(hidden, weight, labels, mask, vocab_size=vocab_size, chunk_tokens=4)
    got = torch.autograd.grad(actual.loss_sum, [hidden, weight])
    wanted = torch.autograd.grad(expected.loss_sum, [hidden, real])
    assert relative_error(actual.loss_sum, expected.loss_sum) <= 1e-12
    assert relative_error(got[0], wanted[0]) <= 1e-12
    assert relative_error(got[1][:vocab_size], wanted[1]) <= 1e-12
    assert not got[1][vocab_size:].any(), "a padded row got a gradient"


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_masked_token_contributes_nothing_even_as_nan(poison: float) -> None:
    hidden, weight, labels, mask = head_inputs(20, 31)
    expected = linear_cross_entropy(hidden, weight, labels, mask, chunk_tokens=6)
    wanted = torch.autograd.grad(expected.loss_sum, [hidden, weight])
    with torch.no_grad():
        hidden[mask == 0] = poison
    actual = linear_cross_entropy(hidden, weight, labels.masked_fill(mask == 0, -1), mask, chunk_tokens=6)
    got = torch.autograd.grad(actual.loss_sum, [hidden, weight])
    assert all(torch.equal(left, right) for left, right in zip((*actual, *got), (*expected, *wanted), strict=True))
    assert not got[0][mask == 0].any() and not actual.token_losses[mask == 0].any()


def test_a_row_without_target_tokens_gives_zeros() -> None:
    hidden, weight, labels, _ = head_inputs(10, 12, torch.float32)
    result = linear_cross_entropy(hidden, weight, labels.fill_(-100), torch.zeros(10), chunk_tokens=4)
    result.loss_sum.backward()
    for name, value in {
        "sum": result.loss_sum,
        "losses": result.token_losses,
        "hidden": hidden.grad,
        "weight": weight.grad,
    }.items():
        assert torch.equal(value.detach(), torch.zeros_like(value)), name


def test_in_bfloat16_the_softmax_is_that_of_float32() -> None:
    inputs = head_inputs(50, 333, torch.bfloat16)
    # Halves of at most 1: bfloat16 holds their logits exactly.
    hidden, weight = ((x.detach() * 2).round().clamp(-2, 2).div(2).requires_grad_() for x in inputs[:2])
    exact = tuple(x.detach().double().requires_grad_() for x in (hidden, weight))
    actual, expected = (
        linear_cross_entropy(hidden, weight, *inputs[2:], chunk_tokens=16),
        plain_head(*exact, *inputs[2:]),
    )
    assert actual.loss_sum.dtype == actual.token_losses.dtype == torch.float32
    assert relative_error(actual.token_losses, expected.token_losses) <= 1e-6
    assert relative_error(actual.loss_sum, expected.loss_sum) <= 1e-6
    got = torch.autograd.grad(actual.loss_sum, [hidden, weight])
    wanted = torch.autograd.grad(expected.loss_sum, exact)
    # The gradients of logits are rounded to bfloat16 for the products, and so are the results.
    assert [x.dtype for x in got] == [torch.bfloat16] * 2
    assert max(relative_error(*pair) for pair in zip(got, wanted, strict=True)) <= 2**-7


def test_two_deterministic_runs_are_bitwise_equal() -> None:
    inputs = head_inputs(100, 77, torch.float32)
    torch.use_deterministic_algorithms(True)
    try:
        runs = []
        for _ in range(2):
            result = linear_cross_entropy(*inputs, chunk_tokens=13)
            runs.append((*result, *torch.autograd.grad(result.loss_sum, inputs[:2])))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(left, right) for left, right in zip(*runs, strict=True))


class Operations(TorchDispatchMode):
    """Counts matrix products and remembers the number of elements of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.products += func.overloadpacket.__name__ in ("mm", "addmm", "addmm_")
        for output in result if isinstance(result, tuple | list) else (result,):
            if isinstance(output, torch.Tensor):
                self.largest = max(self.largest, output.numel())
        return result


@pytest.mark.parametrize(
    ("hidden_grad", "weight_grad", "grad_mode", "products"),
    [
        (True, True, True, 3),
        (True, False, True, 2),
        (False, True, True, 2),
        (False, False, True, 1),
        (True, True, False, 1),
    ],
    ids=["training", "frozen weight", "frozen body", "both frozen", "no grad"],
)
def test_a_chunk_takes_only_the_products_someone_needs(
    hidden_grad: bool, weight_grad: bool, grad_mode: bool, products: int
) -> None:
    hidden, weight, labels, mask = head_inputs(12, 9)
    hidden, weight = hidden.detach().requires_grad_(hidden_grad), weight.detach().requires_grad_(weight_grad)
    with torch.set_grad_enabled(grad_mode), Operations() as operations:
        result = linear_cross_entropy(hidden, weight, labels, mask, chunk_tokens=4)
        assert result.loss_sum.requires_grad == (grad_mode and (hidden_grad or weight_grad))
        if result.loss_sum.requires_grad:
            result.loss_sum.backward()
    assert operations.products == 3 * products
    expected = plain_head(hidden, weight, labels, mask)
    assert relative_error(result.loss_sum, expected.loss_sum) <= 1e-12
    leaves = [x.detach().requires_grad_() for x in (hidden, weight)]
    wanted = torch.autograd.grad(plain_head(*leaves, labels, mask).loss_sum, leaves)
    for leaf, is_needed, gradient in zip((hidden, weight), (hidden_grad, weight_grad), wanted, strict=True):
        if grad_mode and is_needed:
            assert relative_error(leaf.grad, gradient) <= 1e-12
        else:
            assert leaf.grad is None


def test_at_512k_tokens_no_tensor_is_larger_than_a_chunk_of_logits() -> None:
    tokens, rows, hidden_size, chunk_tokens = 2**19, 128256, 4096, 2048
    with torch.device("meta"):
        hidden = torch.empty(tokens, hidden_size, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.empty(rows, hidden_size, dtype=torch.bfloat16, requires_grad=True)
        labels, mask = torch.empty(tokens, dtype=torch.int64), torch.empty(tokens)
        with Operations() as operations:
            linear_cross_entropy(hidden, weight, labels, mask, chunk_tokens=chunk_tokens).loss_sum.backward()
    assert operations.products == 3 * tokens // chunk_tokens
    assert operations.largest == hidden.numel()
    assert chunk_tokens * rows < hidden.numel()


def test_peak_memory_does_not_depend_on_the_number_of_tokens() -> None:
    vocab_size, chunk_tokens = 20_000, 256
    command = [sys.executable, "-m", MEMORY_PROGRAM, str(vocab_size), "512", "4096"]
    # Below this size the C library keeps freed memory and may fragment it; logits of full size are far above it.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120, env=environment).stdout
    few, many = (int(line) for line in output.split())
    logits = 4 * vocab_size * chunk_tokens
    assert few >= logits, f"{few} bytes cannot hold one chunk of logits: nothing was measured"
    assert many <= few + logits / 16, f"{few} bytes for 512 tokens, {many} for 4096"
    # A second chunk at a time would show; an eighth is for what has the size of the weight or the tokens.
    assert many <= 1.125 * logits, f"{many / logits} times the logits of a chunk"


def test_token_losses_refuse_a_gradient() -> None:
    inputs = head_inputs(6, 8)
    result = linear_cross_entropy(*inputs)
    with pytest.raises(RuntimeError) as caught:
        (result.loss_sum + result.token_losses.square().sum()).backward()
    assert str(caught.value) == "token_losses carry no gradient, their sum does: differentiate loss_sum instead."


def test_loss_sum_refuses_a_second_backward_pass() -> None:
    inputs = head_inputs(6, 8)
    loss_sum = linear_cross_entropy(*inputs).loss_sum
    loss_sum.backward(retain_graph=True)
    with pytest.raises(RuntimeError) as caught:
        loss_sum.backward()
    assert str(caught.value) == "loss_sum was differentiated before: its gradients were scaled in place and are gone."


@pytest.mark.parametrize("label", [-100, -1, 8, 2**40])
def test_a_label_that_counts_and_is_no_id_is_refused(label: int) -> None:
    hidden, weight, labels, mask = head_inputs(6, 8)
    labels[4], mask[4] = label, 0.0
    linear_cross_entropy(hidden, weight, labels, mask)
    mask[4] = 1.0
    with pytest.raises(RuntimeError, match="outside the vocabulary of 8 ids"):
        linear_cross_entropy(hidden, weight, labels, mask)


@pytest.mark.parametrize("known_to_megatron", [False, True])
def test_the_weight_gradient_goes_into_main_grad_when_asked(known_to_megatron: bool) -> None:
    hidden, weight, labels, mask = head_inputs(9, 14, torch.float32)
    expected = torch.autograd.grad(0.5 * linear_cross_entropy(hidden, weight, labels, mask).loss_sum, weight)[0]
    weight.main_grad = torch.ones_like(weight)
    if known_to_megatron:
        weight.grad_added_to_main_grad = False
    for _ in range(2):
        result = linear_cross_entropy(hidden, weight, labels, mask, accumulate_into_main_grad=True)
        (0.5 * result.loss_sum).backward()
    torch.testing.assert_close(weight.main_grad, 1 + 2 * expected, rtol=1e-6, atol=1e-6)
    if known_to_megatron:
        assert weight.grad_added_to_main_grad and torch.equal(weight.grad, torch.zeros_like(weight))
    else:
        assert weight.grad is None


def test_a_weight_without_main_grad_gets_its_gradient_from_autograd() -> None:
    hidden, weight, labels, mask = head_inputs(9, 14)
    expected = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels, mask).loss_sum, weight)[0]
    linear_cross_entropy(hidden, weight, labels, mask, accumulate_into_main_grad=True).loss_sum.backward()
    assert torch.equal(weight.grad, expected)


@pytest.mark.parametrize(
    ("ranks", "sequence_parallel", "chunk_tokens", "rows"),
    [(1, True, 8, 8), (4, False, 8, 8), (4, True, 8, 2), (4, True, 11, 2), (4, True, 3, 1), (1, False, 1, 1)],
)
def test_a_chunk_is_of_the_tokens_of_all_ranks_together(
    ranks: int, sequence_parallel: bool, chunk_tokens: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    group: Any = object()
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: ranks)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group: ranks - 1)
    hidden, weight, _, _ = head_inputs(9, 14)
    layout = _layout(hidden, weight, chunk_tokens, None, None, group, sequence_parallel)
    assert (layout.rows, layout.sources) == (rows, ranks if sequence_parallel else 1)
    assert (layout.start, layout.vocab_size, layout.columns) == ((ranks - 1) * 14, ranks * 14, 14)
    # One rank has nobody to exchange anything with.
    assert layout.group is (group if ranks > 1 else None)


def test_main_grad_is_left_alone_unless_asked_for() -> None:
    hidden, weight, labels, mask = head_inputs(9, 14)
    weight.main_grad = torch.zeros_like(weight)
    linear_cross_entropy(hidden, weight, labels, mask).loss_sum.backward()
    assert not weight.main_grad.any() and weight.grad.any()


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [2, 4])
def test_vocabulary_and_tokens_over_ranks_give_the_whole_result(ranks: int) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    with turn():
        result = subprocess.run(
            [*launcher, "-m", PROGRAM],
            capture_output=True,
            text=True,
            timeout=120,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
        )
    assert result.returncode == 0, result.stderr[-6000:]
