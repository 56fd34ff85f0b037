"""While the micro-batches of a step are computed, nobody asks for a value that a GPU would still be computing.

A rank that waits for its device between two layers leaves the device without work. CPU tensors answer at once, so what
is watched here is who asks, in a stage that really trains.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_prolong.ops import attention
from nemo_prolong.ops.attention import document_attention
from tests.support.launches import run_module

PROGRAM = "tests.engine.host_wait_program"
STEPS, MICRO_BATCHES = 4, 16

# They look at a row before it is moved to the device.
OF_HOST_ROWS = {
    "dataset.py collate_rows",
    "packed_step.py _squared_tokens",
    "packed_step.py packed_data_step",
    "partition.py of_row",
}
# With the kernel of CUDA the boundaries stay on the device: the last test below.
OF_CPU_KERNELS = {"attention.py _document_calls"}

Waits = dict[bool, dict[str, int]]


@pytest.fixture(scope="module")
def waits_by_ranks(make_config: Callable[..., Any], workspace: Path) -> dict[int, Waits]:
    """How often each place asked, outside and between the micro-batches of ``STEPS`` steps, on 1 and 2 ranks."""
    cases = {}
    for ranks in (1, 2):
        name, layout = f"waits_cp{ranks}", {"context_parallel_size": ranks}
        cfg = make_config(name=name, train={"train_iters": STEPS}, parallelism=layout)
        output = str(workspace / f"{name}.waits.json")
        cases[ranks] = {"config": cfg.model_dump(mode="json"), "ranks": ranks, "output": output}
    path = workspace / "waits.json"
    path.write_text(json.dumps(list(cases.values())))
    run_module(PROGRAM, str(path))
    rows = {ranks: json.loads(Path(case["output"]).read_text()) for ranks, case in cases.items()}
    return {
        ranks: {inside: {place: count for where, place, count in found if where == inside} for inside in (False, True)}
        for ranks, found in rows.items()
    }


@pytest.fixture(scope="module")
def one_rank(waits_by_ranks: dict[int, Waits]) -> Waits:
    return waits_by_ranks[1]


def test_between_micro_batches_only_host_rows_are_read(one_rank: Waits) -> None:
    assert one_rank[True].keys() - OF_CPU_KERNELS <= OF_HOST_ROWS
    # The mode does see what happens there: the CPU's attention in 2 layers, by two calls each.
    assert one_rank[True]["attention.py _document_calls"] == 2 * 2 * MICRO_BATCHES


def test_our_own_sums_are_asked_for_once_at_the_end_of_a_step(one_rank: Waits) -> None:
    expected = {
        "finalize_model_grads.py finalize_model_grads": STEPS,
        "step_guard.py _global_sums": STEPS,
        "step_sums.py _all_reduce": 2 * STEPS,
    }
    assert {place: one_rank[False].get(place) for place in expected} == expected


@pytest.mark.distributed
def test_nor_do_ranks_that_share_a_row_wait(waits_by_ranks: dict[int, Waits]) -> None:
    waits = waits_by_ranks[2]
    assert waits[True].keys() <= OF_HOST_ROWS
    assert waits[True]["partition.py of_row"] > 0


def test_with_the_kernel_of_cuda_no_boundary_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "flash_kernel_takes", lambda query: True)
    query, boundaries = torch.zeros(5, 2, 8, device="meta"), torch.tensor([0, 2, 5], dtype=torch.int32, device="meta")
    (call,) = attention._document_calls(query, boundaries, max_seqlen=4)
    assert call.queries.cu_seqlens is boundaries and call.queries.max_seqlen == 4
    # A tensor on the meta device has no value to ask for.
    monkeypatch.undo()
    with pytest.raises(NotImplementedError, match="meta tensor"):
        document_attention(query, query, query, boundaries)
