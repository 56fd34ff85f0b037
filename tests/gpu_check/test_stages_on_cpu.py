"""Every stage of the GPU check on CPU tensors: what it says of code that is right, and of code that is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.hopper import attention, loss_head
from benchmarks.hopper.bench import Bench
from benchmarks.hopper.layer_memory import layers_that_fit, planned_bytes, state_bytes
from benchmarks.hopper.layers import LLAMA_3_8B, model_that_fits
from benchmarks.hopper.records import Row, Verdict
from benchmarks.hopper.rows import prolong_mix, short_documents

Rows = dict[str, dict[str, Row]]
H100_FREE_BYTES = int(0.94 * 78 * 2**30)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(torch.device("cpu"), tmp_path)


def verdicts(rows: dict[str, Row]) -> set[Verdict]:
    return {row.result for row in rows.values()}


@pytest.mark.parametrize("stage", ["engine", "layers", "data_loader", "resume", "fp8_export"])
def test_a_stage_that_needs_nemo_meets_its_bounds_on_a_cpu(cpu_rows: Rows, stage: str) -> None:
    assert Verdict.NOT_RUN not in verdicts(cpu_rows[stage])
    wrong = {bar: row for bar, row in cpu_rows[stage].items() if row.result in (Verdict.MISSED, Verdict.FAILED)}
    assert wrong == {}


def test_the_engine_is_compared_in_every_precision(cpu_rows: Rows) -> None:
    rows = cpu_rows["engine"]
    assert [row.ours for bar, row in rows.items() if not bar.startswith("bf16")] == [0.0] * 4
    bf16 = rows["bf16: difference of losses from fp32 on a CPU"]
    assert 0 < bf16.ours < bf16.bound == 0.01


def test_the_plan_of_memory_is_within_five_percent_of_the_profiler(cpu_rows: Rows) -> None:
    ratios = [row.ours for bar, row in cpu_rows["layers"].items() if bar.endswith("peak memory over the plan")]
    assert len(ratios) == 2 and all(0.95 < ratio < 1.05 for ratio in ratios)


def test_shares_of_kernels_name_attention_and_matrix_products(cpu_rows: Rows) -> None:
    notes = [row.note for bar, row in cpu_rows["layers"].items() if "share outside" in bar]
    assert len(notes) == 5 and all("attention " in note and "matrix products " in note for note in notes)


def test_a_length_of_rows_leaves_nothing_behind(cpu_rows: Rows) -> None:
    assert cpu_rows["after layers"]["models held"].ours == 0


def test_speed_has_no_bound_on_a_cpu(cpu_rows: Rows) -> None:
    rates = cpu_rows["data_loader"]
    assert verdicts(rates) == {Verdict.MEASURED}
    assert all("bounds of speed are for a GPU" in row.note for row in rates.values())


def test_without_a_gpu_the_te_stage_says_why_it_did_not_run(cpu_rows: Rows) -> None:
    assert list(cpu_rows["transformer_engine"].values()) == [
        Row("Transformer Engine", Verdict.NOT_RUN, note="Transformer Engine computes on a GPU.")
    ]


def test_the_parts_of_the_te_stage_agree_on_the_torch_backend(cpu_rows: Rows) -> None:
    rows = cpu_rows["torch for both"]
    same = rows["attention: error of output and gradients"]
    assert same.result is Verdict.MET and same.ours == pytest.approx(same.bound / 2)
    checkpoint = rows["torch and torch: keys and shapes of checkpoints are equal"]
    assert checkpoint.result is Verdict.MET and "13 entries" in checkpoint.note
    assert rows["torch and torch: weights come back bit by bit"].result is Verdict.MET
    assert rows["run, torch bf16: difference of losses from torch fp32"].result is Verdict.MET


def test_a_run_that_fails_is_a_failed_row(cpu_rows: Rows) -> None:
    row = cpu_rows["torch for both"]["run, no kernels"]
    assert row.result is Verdict.FAILED
    assert row.note == "ModuleNotFoundError: No module named 'transformer_engine'"


def test_attention_into_other_documents_misses_every_bound(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def leaking(query: Any, key: Any, value: Any, cu_seqlens: torch.Tensor, **arguments: Any) -> torch.Tensor:
        return attention.alone([len(query)], query, key, value)

    assert {row.result for row in attention._error_rows(bench)} == {Verdict.MET}
    monkeypatch.setattr(attention, "document_attention", leaking)
    rows = list(attention._error_rows(bench))
    assert [row.result for row in rows] == [Verdict.MISSED] * 4
    assert all("one document" not in row.note.rsplit(":", 1)[1] for row in rows)


def test_times_of_attention_come_with_the_rate_of_causal_flops(bench: Bench) -> None:
    lengths = [32, 32]
    ratio, _, rate = attention._times(bench, "two documents", lengths)
    milliseconds = float(ratio.note.split("; ")[2].split(" ms, ")[0])
    # Two products forward and five backward, each two FLOPs for half of a square, by 4 heads of 16 channels.
    flops = 7 * 2 * (32 * 32 / 2) * 2 * 64
    assert rate.ours == pytest.approx(flops / milliseconds / 1e9, rel=1e-2)


def test_a_loss_head_with_a_wrong_gradient_misses_its_bounds(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    assert {row.result for row in loss_head._error_rows(bench)} == {Verdict.MET}
    monkeypatch.setattr(loss_head, "chunked", lambda *inputs: 1.01 * loss_head.all_logits(*inputs[:-1]))
    assert {row.result for row in loss_head._error_rows(bench)} == {Verdict.MISSED}


def test_memory_of_the_loss_head_is_the_arithmetic(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    assert next(loss_head.cost_rows(bench, 1024)).result is Verdict.MET
    monkeypatch.setattr(loss_head, "chunked", lambda *inputs: loss_head.all_logits(*inputs[:-1]))
    assert next(loss_head.cost_rows(bench, 1024)).result is Verdict.MISSED


def test_as_many_layers_fit_as_the_plan_has_room_for() -> None:
    layers = layers_that_fit(LLAMA_3_8B, 65_536, H100_FREE_BYTES)
    assert 1 < layers < 32
    fits, too_many = (LLAMA_3_8B.model_copy(update={"num_layers": n}) for n in (layers, layers + 1))
    assert planned_bytes(fits, 65_536, "cuda") <= H100_FREE_BYTES < planned_bytes(too_many, 65_536, "cuda")
    assert layers_that_fit(LLAMA_3_8B, 65_536, state_bytes(LLAMA_3_8B) // 10) == 0


def test_the_state_of_llama_3_8b_is_18_bytes_a_parameter() -> None:
    assert state_bytes(LLAMA_3_8B) == 18 * 8_030_261_248


def test_a_long_row_leaves_out_the_vocabulary_first() -> None:
    assert model_that_fits(65_536, H100_FREE_BYTES).vocab_size == 128_256
    assert model_that_fits(262_144, H100_FREE_BYTES).vocab_size < 128_256
    assert model_that_fits(262_144, 40 * 2**30) is None


def test_the_mix_of_rows_is_that_of_the_recipe() -> None:
    assert [(kind.name, kind.share) for kind in prolong_mix(65_536)] == [
        ("one document", 0.63),
        ("short documents", 0.37),
    ]
    stage2 = prolong_mix(524_288)
    assert [kind.share for kind in stage2] == [0.23, 0.40, 0.37]
    assert [kind.lengths for kind in stage2[:2]] == [[524_288], [65_536] * 8]
    assert all(sum(kind.lengths) == 524_288 for kind in stage2)


def test_short_documents_are_as_long_as_the_paper_says() -> None:
    lengths = torch.tensor(short_documents(2**24, seed=0))
    assert int(lengths.sum()) == 2**24 and int(lengths.max()) <= 65_536
    for longer, share in ((4096, 0.109), (32_768, 0.008)):
        assert float((lengths > longer).double().mean()) == pytest.approx(share, rel=0.15)
