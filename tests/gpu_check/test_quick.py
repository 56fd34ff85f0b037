"""The quick check: its list, its card, its command line, and what its cases make of a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.hopper.__main__ import parsed
from benchmarks.hopper.bench import Bench
from benchmarks.hopper.card import read_reports
from benchmarks.hopper.layer_memory import kept_bytes_per_token, layers_that_fit, planned_bytes, state_bytes
from benchmarks.hopper.layers import LLAMA_3_8B, USABLE_SHARE, speed_rows
from benchmarks.hopper.quick import deterministic, layers, te, tp8, worker
from benchmarks.hopper.quick.attention import random_lengths
from benchmarks.hopper.quick.card import page
from benchmarks.hopper.quick.cases import CASES
from benchmarks.hopper.quick.program import SECONDS, chosen_cases
from benchmarks.hopper.quick.supervisor import START_SECONDS
from benchmarks.hopper.records import Row, Verdict
from benchmarks.hopper.rows import RowKind
from nemo_prolong.errors import ConfigError

ROOT = Path(__file__).parents[2]
Rows = dict[str, dict[str, Row]]


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    return Bench(torch.device("cuda:0"), tmp_path)


@pytest.fixture
def cpu(tmp_path: Path) -> Bench:
    return Bench(torch.device("cpu"), tmp_path)


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return what stands in for Transformer Engine's memory of the kernel it chose."""
    memory: dict[str, Any] = {"use_flash_attention": False, "use_fused_attention": True, "fused_attention_backend": 1}
    name = "transformer_engine.pytorch.attention.dot_product_attention"
    monkeypatch.setitem(sys.modules, name, SimpleNamespace(_attention_backends=memory))
    return memory


def test_every_case_runs_on_cpu_tensors(cpu_rows: Rows) -> None:
    rows = cpu_rows["quick"]
    wrong = {bar: row for bar, row in rows.items() if row.result in (Verdict.MISSED, Verdict.FAILED)}
    assert wrong == {}
    assert [bar for bar, row in rows.items() if row.result is Verdict.NOT_RUN] == [
        "cuDNN through torch, short documents"
    ]
    beginnings = [
        ("imports of the engine", 1),
        ("first step of a thin model", 1),
        ("te bf16, no recomputation: ", 5),
        ("te bf16, full recomputation: ", 5),
        ("Transformer Engine, cuDNN, train.deterministic: 2 heads, 64 tokens, ", 2),
        ("Transformer Engine, flash-attn, train.deterministic: 2 heads, 64 tokens, ", 2),
        ("torch backend, train.deterministic: 2 heads, 64 tokens, ", 2),
        ("Transformer Engine, 4 heads, ", 4),
        ("Transformer Engine, 2 heads, ", 4),
        ("torch backend, 4 heads, ", 4),
        ("torch backend, 2 heads, ", 4),
        ("cuDNN through torch, ", 5),
        ("te fp8, no recomputation: ", 5),
        ("layer of TP 8: kept per token", 1),
        ("layer of TP 8, 64, ", 3),
        ("one layer of TP 8, 128: peak memory", 1),
        ("torch bf16, full recomputation: ", 5),
        ("256 tokens: ", 2),
    ]
    assert [(start, sum(bar.startswith(start) for bar in rows)) for start, _ in beginnings] == beginnings
    assert sum(count for _, count in beginnings) == len(rows)


def test_runs_on_a_cpu_say_what_stands_in_and_repeat_their_bits(cpu_rows: Rows) -> None:
    notes = [row.note for bar, row in cpu_rows["quick"].items() if bar.startswith("Transformer Engine, cuDNN")]
    assert len(notes) == 2 and all("two runs give the same bits" in note for note in notes)
    assert all(note.endswith("torch stands in for Transformer Engine on a CPU") for note in notes)


def test_what_a_layer_keeps_is_counted_beside_the_arithmetic(cpu_rows: Rows, cpu: Bench) -> None:
    row = cpu_rows["quick"]["layer of TP 8: kept per token"]
    # The torch backend keeps more than the arithmetic, which is Transformer Engine's.
    assert row.peer == kept_bytes_per_token(tp8.rank_of(cpu, 1)) < row.ours < 4 * row.peer


def test_the_plan_leaves_time_for_a_case_that_takes_twice_as_long() -> None:
    planned = [case.planned_seconds for case in CASES.values()]
    assert sum(planned) + START_SECONDS + max(planned) + START_SECONDS < SECONDS == 540
    assert [name for name in CASES][:4] == ["start", "te", "te_recompute", "deterministic_cudnn"]
    assert CASES["te"].limit_seconds == 2 * 35 + 20


@pytest.mark.parametrize("name", list(CASES))
def test_a_case_names_a_function_and_cases_before_it(name: str) -> None:
    case, before = CASES[name], list(CASES)[: list(CASES).index(name)]
    assert callable(case.load()) and case.after in ["", *before]


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch, gpu: Bench) -> None:
    monkeypatch.setattr(worker, "not_run", lambda bar, reason: (bar, reason))
    monkeypatch.setattr(
        "benchmarks.hopper.quick.case.importlib.util.find_spec",
        lambda name: None if name in ("nemo", "transformer_engine") else name,
    )
    assert list(worker.case_rows(CASES["te"], gpu)) == [
        ("Transformer Engine, bf16, no recomputation", "nemo, transformer_engine is not installed.")
    ]
    assert CASES["te"].missing(on_gpu=False) == ["nemo"]


def test_eight_layers_fit_an_h200_without_recomputation_and_fewer_an_h100() -> None:
    assert kept_bytes_per_token(LLAMA_3_8B) == 139_392
    model = LLAMA_3_8B.model_copy(update={"num_layers": 8})
    h200, h100 = (int(USABLE_SHARE * size * 2**20) for size in (143_771 - 1024, 81_559 - 1024))
    assert layers_that_fit(model, 65_536, h200, recompute=False) == 8
    assert layers_that_fit(model, 65_536, h100, recompute=False) == 4
    kept = 8 * 65_536 * 139_392
    assert planned_bytes(model, 65_536, "cuda", recompute=False) == (
        state_bytes(model) + kept + 65_536 * 2 * (3 * 14_336 + 4096)
    )


def test_a_rank_of_tp_8_has_an_eighth_of_heads_mlp_and_vocabulary(gpu: Bench) -> None:
    rank = tp8.rank_of(gpu, 6)
    assert (rank.num_attention_heads, rank.num_query_groups, rank.ffn_hidden_size) == (4, 1, 1792)
    assert (rank.vocab_size, rank.hidden_size, rank.num_layers, rank.kv_channels) == (16_032, 4096, 6, 128)


def test_mfu_is_of_the_bf16_peak_and_fp8_has_its_own_beside_it(gpu: Bench) -> None:
    kinds = [RowKind("one document", 1.0, [65_536])]
    for compute, peaks in (("bf16", [989.4]), ("fp8", [989.4, 1978.9])):
        rows = list(speed_rows(gpu, "te", LLAMA_3_8B, kinds, {"one document": 10.0}, compute))
        tokens, flops, *shares = [row.ours for row in rows]
        assert tokens == 6553.6 and flops is not None
        assert shares == [pytest.approx(flops / peak) for peak in peaks]
    assert [row.bar for row in rows][2:] == ["te: causal MFU of the mix", "te: share of FP8's own peak"]


def test_attention_out_of_memory_is_an_outcome_and_not_a_failure(cpu: Bench) -> None:
    def attention(*inputs: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 512.00 GiB.\nGPU 0 has")

    rows = list(deterministic._rows(cpu, "te", lambda lengths: attention, lambda: "cuDNN"))
    assert {(row.result, row.ours, row.note) for row in rows} == {
        (Verdict.MEASURED, None, "does not run: CUDA out of memory. Tried to allocate 512.00 GiB.")
    }
    assert not torch.are_deterministic_algorithms_enabled()


def test_flash_attn_that_is_missing_is_said(gpu: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deterministic.importlib.util, "find_spec", lambda name: None)
    (row,) = deterministic.flash_rows(gpu)
    assert (row.result, row.note) == (Verdict.NOT_RUN, "neither flash_attn nor flash_attn_3 is installed.")


def test_one_kind_of_kernel_is_left_and_all_come_back(
    gpu: Bench, chosen: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("NVTE_FUSED_ATTN", "NVTE_FLASH_ATTN", "NVTE_UNFUSED_ATTN")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NVTE_FLASH_ATTN", "1")
    for kernel, switches in (("cudnn", ["1", "0", "0"]), ("flash", ["0", "1", "0"])):
        with te.only_kernel(gpu, kernel):
            assert [os.environ[name] for name in names] == switches
            assert chosen.pop("backend_selection_requires_update")
        assert [os.environ.get(name) for name in names] == [None, "1", None]
        assert chosen.pop("backend_selection_requires_update")


def test_the_kernel_that_ran_is_named(gpu: Bench, chosen: dict[str, Any]) -> None:
    assert te.kernel_of_last_call(gpu) == "cuDNN, sub-backend 1"
    chosen.update(use_fused_attention=False)
    assert te.kernel_of_last_call(gpu) == "no fused kernel"
    chosen.update(use_flash_attention=True, flash_attention_backend="2.8.1")
    assert te.kernel_of_last_call(gpu) == "flash-attn 2.8.1"


def test_precisions_of_the_backend_are_torch_on_a_cpu_alone(gpu: Bench, cpu: Bench) -> None:
    found = [te.te_precision(bench, "fp8", layers.RECOMPUTE) for bench in (gpu, cpu)]
    assert [(precision.backend, precision.compute) for precision in found] == [("te", "fp8"), ("torch", "bf16")]
    assert {precision.recompute.recompute_granularity for precision in found} == {"full"}


def test_documents_cut_at_random_fill_the_row() -> None:
    for count in (300, 700):
        lengths = random_lengths(65_536, count)
        assert (sum(lengths), len(lengths)) == (65_536, count) and min(lengths) > 0
        assert len(set(lengths)) > 100


def test_a_model_that_fits_nowhere_is_a_row_that_says_so(gpu: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (8 * 2**30, 80 * 2**30))
    monkeypatch.setattr(layers, "release", lambda device: None)
    (row,) = layers.te_rows(gpu)
    assert (row.result, row.note) == (Verdict.NOT_RUN, "not one layer fits into 8.0 GiB.")


def test_the_page_in_the_documents_is_the_one_made_of_its_json() -> None:
    path = ROOT / "docs" / "verification" / "hopper_quick.json"
    assert path.with_suffix(".md").read_text() == page(read_reports(path))
    said = page({})
    assert "No case has run on a GPU yet." in said and "989.4 TFLOPS on an H200" in said and "1,978.9" in said


def test_settings_of_one_check_are_refused_for_the_other() -> None:
    with pytest.raises(ConfigError, match=r"^--stages: the quick check has cases and no stages\. Name them with"):
        parsed(["--quick", "--stages", "layers"])
    for setting in (["--cases", "te"], ["--seconds", "60"]):
        with pytest.raises(ConfigError, match=f"^{setting[0]}: it is a setting of the quick check. Add --quick, or"):
            parsed(setting)
    assert parsed(["--quick", "--cases", "te", "--seconds", "60"]).seconds == 60


def test_cases_come_in_their_order_and_no_other_name_is_one() -> None:
    assert [case.name for case in chosen_cases("te_fp8, te")] == ["te", "te_fp8"]
    with pytest.raises(ConfigError, match=r"^--cases te,x: 'x' is no case; there are start, te, te_recompute, "):
        chosen_cases("te,x")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_worker_without_a_gpu_refuses(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["worker", "cuda:0", "1"])
    with pytest.raises(SystemExit) as ended:
        worker.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: --device cuda:0: torch ")


@pytest.fixture
def without_pydantic(tmp_path: Path) -> Iterator[Path]:
    """Yield a directory that hides pydantic from programs that have it first on their path."""
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "pydantic.py").write_text("raise ModuleNotFoundError('No module named pydantic', name='pydantic')\n")
    yield hidden


def test_the_command_writes_its_card_without_pydantic(tmp_path: Path, without_pydantic: Path) -> None:
    card = tmp_path / "card.json"
    card.write_text(json.dumps({"format": 1, "stages": {"te": {**read_report(), "title": "Kept"}}}))
    command = [sys.executable, "-m", "benchmarks.hopper", "--quick", "--device", "cpu", "--cases", "loss_head"]
    result = subprocess.run(
        [*command, "--json", str(card)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(without_pydantic)},
        stdin=subprocess.DEVNULL,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert list(read_reports(card)) == ["te", "loss_head"]
    report = read_reports(card)["loss_head"]
    assert [row["result"] for row in report["rows"]] == ["met", "measured"]
    assert report["command"] == "python -m benchmarks.hopper --device cpu --quick --cases loss_head"
    assert report["versions"]["torch"] == torch.__version__ and report["planned_seconds"] == 8
    assert card.with_suffix(".md").read_text() == page(read_reports(card))
    assert "Loss head (loss_head)" in result.stdout and result.stdout.endswith(f"card: {card.with_suffix('.md')}\n")


def read_report() -> dict[str, Any]:
    """Return a report without rows."""
    return {"title": "", "shows": "", "command": "x", "finished_at": "", "seconds": 1.0, "rows": []}
