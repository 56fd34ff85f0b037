"""The program around the stages: verdicts, processes that die, the card, the command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.hopper import runner
from benchmarks.hopper.__main__ import check_device, chosen_stages
from benchmarks.hopper.bench import Bench, Stage
from benchmarks.hopper.card import page, read_reports, write_card
from benchmarks.hopper.measure import kernel_shares, kind_of, largest_error, median_seconds, peak_bytes
from benchmarks.hopper.records import Row, Verdict, at_least, at_most, attempt, measured, not_run
from benchmarks.hopper.stage_program import write_stage
from benchmarks.hopper.stages import STAGES
from nemo_prolong.errors import ConfigError

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def report(title: str, *rows: Row) -> dict[str, Any]:
    about = {"title": title, "shows": "Something.", "command": "python -m x", "finished_at": "now", "seconds": 1.5}
    where = {"machine": {"device": "NVIDIA H100"}, "versions": {"torch": "2.11"}, "commit": "abc"}
    return {**about, **where, "rows": [row.as_json() for row in rows]}


def test_what_is_not_a_number_misses_its_bound_and_is_null_in_json() -> None:
    for row in (at_most("x", float("nan"), 1.0), at_least("x", float("nan"), 1.0)):
        assert row.result is Verdict.MISSED
        assert row.as_json()["ours"] is None and row.as_json()["note"] == "the figure is nan."
    assert (at_most("x", 1.0, 1.0).result, at_most("x", 1.1, 1.0).result) == (Verdict.MET, Verdict.MISSED)
    assert (at_least("x", 1.0, 1.0).result, at_least("x", 0.9, 1.0).result) == (Verdict.MET, Verdict.MISSED)


def test_a_record_has_the_fields_of_every_benchmark_and_comes_back() -> None:
    row = at_most("bar", 2.0, 3.0, "s", peer=4.0)
    record = json.loads(json.dumps(row.as_json()))
    assert {"bar", "ours", "peer", "unit", "ratio", "bound", "met"} <= record.keys()
    assert (record["ratio"], record["met"]) == (0.5, True)
    assert Row.from_json(record) == row
    assert measured("bar", 2.0, "s").as_json()["met"] is None


def test_a_part_that_raises_is_a_failed_row_after_those_before_it(capsys: pytest.CaptureFixture[str]) -> None:
    def part():
        yield measured("first", 1.0, "s")
        raise ValueError("no memory\nand more")

    rows = list(attempt("part", part))
    assert [(row.bar, row.result, row.note) for row in rows] == [
        ("first", Verdict.MEASURED, ""),
        ("part", Verdict.FAILED, "ValueError: no memory"),
    ]
    assert "Traceback" in capsys.readouterr().err


def test_a_stage_whose_modules_are_missing_did_not_run(tmp_path: Path) -> None:
    stage = Stage("z", "Title", "", lambda bench: iter(()), needs=("json", "no_such_module"))
    with (tmp_path / "records").open("w") as file:
        write_stage(stage, CPU, file)
    environment, row = map(json.loads, (tmp_path / "records").read_text().splitlines())
    assert environment["versions"]["torch"] == torch.__version__ and environment["machine"]["cpus"] == os.cpu_count()
    assert (row["result"], row["note"]) == ("not run", "no_such_module is not installed.")


def test_a_stage_that_dies_keeps_its_rows_and_says_how(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = tmp_path / "die.py"
    lines = [json.dumps({"commit": "abc"}), json.dumps(measured("first", 1.0, "s").as_json())]
    program.write_text(
        f"import os, sys, pathlib\npathlib.Path(sys.argv[-1]).write_text({chr(10).join(lines)!r})\n"
        "print('last words', flush=True)\nos.kill(os.getpid(), 9)\n"
    )
    run = runner._run
    monkeypatch.setattr(
        runner, "_run", lambda command, log, limit: run([sys.executable, str(program), command[-1]], log, limit)
    )
    stage = Stage("z", "Title", "Shows.", lambda bench: iter(()))
    result = runner.run_stage(stage, "cpu", "python -m x")
    assert [row["result"] for row in result["rows"]] == ["measured", "failed"]
    assert result["rows"][1]["note"] == "the process ended with status -9." and result["commit"] == "abc"
    assert "last words" in capsys.readouterr().err


def test_a_stage_that_takes_too_long_is_ended_with_its_children(tmp_path: Path) -> None:
    child = f"import time, os; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    started = time.monotonic()
    assert runner._run([sys.executable, "-c", parent], tmp_path / "log", 3.0) == "stopped after 3 s."
    assert time.monotonic() - started < 30
    pid = int((tmp_path / "pid").read_text())
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists() or " Z " in Path(f"/proc/{pid}/stat").read_text():
            return
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    pytest.fail(f"process {pid} outlived its stage")


def test_the_card_keeps_stages_that_did_not_run_again(tmp_path: Path) -> None:
    path = tmp_path / "card.json"
    write_card(path, {"b": report("Second", at_most("old", 1.0, 2.0))})
    write_card(path, {**read_reports(path), "a": report("First", at_least("new", 1.0, 2.0, "GiB", note="a|b"))})
    text = path.with_suffix(".md").read_text()
    assert text.index("## a. First") < text.index("## b. Second")
    assert (
        "| new | 1 GiB | at least 2 | **missed** | a\\|b |" in text and "| old | 1 | at most 2 | **met** |  |" in text
    )
    assert "| a. First | NVIDIA H100 | 1 missed | 1.5 |" in text and "torch 2.11" in text


def test_the_page_in_the_documents_is_the_one_made_of_its_json() -> None:
    path = ROOT / "docs" / "verification" / "hopper.json"
    assert path.with_suffix(".md").read_text() == page(read_reports(path))
    assert "No stage has run on a GPU yet." in page({})


def test_there_are_eight_stages_and_no_other_letter_is_one() -> None:
    assert "".join(STAGES) == "abcdefgh"
    assert [stage.letter for stage in chosen_stages("c, a")] == ["c", "a"]
    with pytest.raises(ConfigError, match=r"^--stages a,z: 'z' is no stage; there are a \(Document attention\), b "):
        chosen_stages("a,z")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_machine_without_a_gpu_is_refused_with_the_way_out() -> None:
    with pytest.raises(ConfigError) as error:
        check_device("cuda:0")
    rule = f"torch {torch.__version__} finds no GPU here."
    remedy = "Run it on an H100 or H200, or add --device cpu for small sizes."
    assert str(error.value) == f"--device cuda:0: {rule} {remedy}"
    assert check_device("cpu") is None


def test_the_command_runs_a_stage_on_a_cpu_and_writes_its_card(tmp_path: Path) -> None:
    card = tmp_path / "card.json"
    command = [sys.executable, "-m", "benchmarks.hopper", "--device", "cpu", "--stages", "b", "--json", str(card)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert result.returncode == 0, result.stdout + result.stderr
    reports = read_reports(card)
    assert list(reports) == ["b"] and reports["b"]["command"] == "python -m benchmarks.hopper --device cpu --stages b"
    results = [row["result"] for row in reports["b"]["rows"]]
    assert (results.count("met"), results.count("measured"), len(results)) == (4, 2, 6)
    assert "b. Loss head" in result.stdout and "MET" in result.stdout


def test_peak_memory_is_counted_to_the_byte_and_frees_count() -> None:
    def call() -> None:
        first = torch.empty(1000, dtype=torch.float32)
        second = first.clone()
        del first
        third = second.clone()
        del second, third

    assert peak_bytes(CPU, call) == 8000


def test_shares_sum_to_one_and_kernels_are_told_apart() -> None:
    matrix = torch.ones(64, 64)
    shares = kernel_shares(CPU, lambda: (matrix @ matrix).relu())
    assert sum(shares.values()) == pytest.approx(1.0) and shares["matrix products"] > 0
    names = ("flash_bwd_kernel", "sm90_xmma_gemm_bf16", "nvjet_tst_256x128", "vectorized_elementwise_kernel")
    assert [kind_of(name) for name in names] == ["attention", "matrix products", "matrix products", "the rest"]


def test_an_error_is_relative_to_the_largest_entry_and_keeps_what_is_not_a_number() -> None:
    expected = [torch.tensor([1.0, -4.0]), torch.tensor([2.0])]
    assert largest_error([torch.tensor([1.0, -3.0]), torch.tensor([2.2])], expected) == pytest.approx(0.25)
    for wrong in ([float("nan"), 2.0], [1.0, float("nan")]):
        error = largest_error([torch.tensor([wrong[0], -4.0]), torch.tensor([wrong[1]])], expected)
        assert torch.tensor(error).isnan()


def test_medians_leave_out_the_first_run_of_each_side() -> None:
    calls: list[str] = []
    seconds = median_seconds(CPU, {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=3)
    assert calls == ["a", "b"] * 4 and seconds.keys() == {"a", "b"}


def test_sizes_are_those_of_the_recipe_on_a_gpu_alone(tmp_path: Path) -> None:
    assert Bench(CPU, tmp_path).sized(full=2, small=1) == 1
    assert Bench(torch.device("cuda:0"), tmp_path).sized(full=2, small=1) == 2
    assert not_run("x", "y").result is Verdict.NOT_RUN


@pytest.mark.gpu
@pytest.mark.parametrize("letter", list(STAGES))
def test_a_stage_meets_its_bounds_on_this_gpu(letter: str) -> None:
    result = runner.run_stage(STAGES[letter], "cuda:0", "pytest -m gpu tests/gpu_check")
    wrong = [row for row in result["rows"] if row["result"] in ("missed", "failed")]
    assert wrong == []
