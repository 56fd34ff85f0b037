"""The program around the stages: verdicts, processes that die, the card, the command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.hopper import all_stages as program
from benchmarks.hopper import machine, measure, runner
from benchmarks.hopper.all_stages import chosen_stages
from benchmarks.hopper.bench import Bench, Stage
from benchmarks.hopper.card import page, read_reports, write_card
from benchmarks.hopper.machine import check_device
from benchmarks.hopper.measure import (
    kernel_seconds,
    kind_of,
    largest_error,
    median_seconds,
    peak_bytes,
    seconds_by_kind,
    seconds_of,
)
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


def test_what_is_not_a_number_misses_its_bound() -> None:
    for row in (at_most("x", float("nan"), 1.0), at_least("x", float("nan"), 1.0)):
        assert row.result is Verdict.MISSED
        assert row.as_json()["ours"] is None and row.as_json()["note"] == "the figure is nan."
    assert (at_most("x", 1.0, 1.0).result, at_most("x", 1.1, 1.0).result) == (Verdict.MET, Verdict.MISSED)
    assert (at_least("x", 1.0, 1.0).result, at_least("x", 0.9, 1.0).result) == (Verdict.MET, Verdict.MISSED)


def test_a_record_has_every_field_and_comes_back() -> None:
    row = at_most("bar", 2.0, 3.0, "s", peer=4.0)
    record = json.loads(json.dumps(row.as_json()))
    assert {"bar", "ours", "peer", "unit", "ratio", "bound", "met"} <= record.keys()
    assert (record["ratio"], record["met"]) == (0.5, True)
    assert Row.from_json(record) == row
    assert measured("bar", 2.0, "s").as_json()["met"] is None


def test_a_part_that_raises_is_a_failed_row(capsys: pytest.CaptureFixture[str]) -> None:
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
    stand_in(monkeypatch, program)
    stage = Stage("z", "Title", "Shows.", lambda bench: iter(()))
    result = runner.run_stage(stage, "cpu", "python -m x")
    assert [row["result"] for row in result["rows"]] == ["measured", "failed"]
    assert result["rows"][1]["note"] == "the process ended with status -9." and result["commit"] == "abc"
    assert "last words" in capsys.readouterr().err


def stand_in(monkeypatch: pytest.MonkeyPatch, program: Path) -> None:
    """Run a program in the place of every stage; its last argument is where records go."""
    run = runner._run
    monkeypatch.setattr(
        runner, "_run", lambda command, log, limit: run([sys.executable, str(program), command[-1]], log, limit)
    )


def test_an_interruption_ends_its_stage_and_leaves_out_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [json.dumps({"commit": "abc"}), json.dumps(measured("first", 1.0, "s").as_json())]
    program = tmp_path / "interrupt.py"
    program.write_text(
        f"import os, pathlib, signal, sys, time\npathlib.Path(sys.argv[-1]).write_text({chr(10).join(lines)!r})\n"
        "os.kill(os.getppid(), signal.SIGINT)\ntime.sleep(60)\n"
    )
    stand_in(monkeypatch, program)
    stages = [Stage(name, "Title", "Shows.", lambda bench: iter(())) for name in "yz"]
    done: list[str] = []
    # A shell has what it starts in the background ignore interruptions.
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        reports = runner.run_stages(stages, "cpu", lambda stage: "", lambda stage, report: done.append(stage.name))
    finally:
        signal.signal(signal.SIGINT, previous)
    assert done == ["y"] == list(reports)
    assert [(row["result"], row["note"]) for row in reports["y"]["rows"]] == [
        ("measured", ""),
        ("failed", "asked to stop; what it had shown by then is above."),
    ]


def test_the_card_is_written_after_every_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "card.json"
    write_card(path, {"engine": report("Third", measured("old", 1.0, "s"))})
    found: list[list[str]] = []

    def run_stage(stage: Stage, *_: Any) -> dict[str, Any]:
        found.append(list(read_reports(path)))
        return report(stage.title, measured("new", 1.0, "s"))

    monkeypatch.setattr(runner, "run_stage", run_stage)
    assert program.run(Namespace(stages="loss_head,attention", device="cpu", json=path)) == 0
    assert found == [["engine"], ["loss_head", "engine"]] and list(read_reports(path)) == [
        "attention",
        "loss_head",
        "engine",
    ]


def test_a_page_says_of_a_stage_that_it_ran_on_a_cpu(tmp_path: Path) -> None:
    on_cpu = {
        **report("First", measured("x", 1.0, "s")),
        "command": "python -m benchmarks.hopper --device cpu --stages attention",
    }
    said = "**This stage ran at small sizes on a CPU: it shows that the program works, and nothing about a GPU.**"
    assert said in page({"a": on_cpu}) and said not in page({"a": report("First")})


def test_a_stage_that_takes_too_long_ends_with_its_children(tmp_path: Path) -> None:
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
    first, second = (
        report("First", at_least("new", 1.0, 2.0, "GiB", note="a|b")),
        report("Second", at_most("old", 1.0, 2.0)),
    )
    write_card(path, {"loss_head": second})
    write_card(path, {"attention": first, **read_reports(path)})
    text = path.with_suffix(".md").read_text()
    assert text.index("## First (`attention`)") < text.index("## Second (`loss_head`)")
    assert (
        "| new | 1 GiB | at least 2 | **missed** | a\\|b |" in text and "| old | 1 | at most 2 | **met** |  |" in text
    )
    assert "| First (`attention`) | NVIDIA H100 | abc | 1 missed | 1.5 |" in text and "torch 2.11" in text


def test_the_page_in_the_documents_is_the_one_made_of_its_json() -> None:
    path = ROOT / "docs" / "verification" / "hopper.json"
    assert path.with_suffix(".md").read_text() == page(read_reports(path))
    assert "No stage has run on a GPU yet." in page({})


def test_there_are_eight_stages_and_no_other_name_is_one() -> None:
    assert len(STAGES) == 8
    assert [stage.name for stage in chosen_stages("engine, attention")] == ["engine", "attention"]
    with pytest.raises(ConfigError, match=r"^--stages engine,z: 'z' is no stage; there are attention, loss_head, "):
        chosen_stages("engine,z")


def test_a_stage_has_the_name_of_its_module() -> None:
    assert [stage.run.__module__ for stage in STAGES.values()] == [f"benchmarks.hopper.{name}" for name in STAGES]


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
    command = [
        sys.executable,
        "-m",
        "benchmarks.hopper",
        "--device",
        "cpu",
        "--stages",
        "loss_head",
        "--json",
        str(card),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL
    )
    assert result.returncode == 0, result.stdout + result.stderr
    reports = read_reports(card)
    (loss_head,) = reports.values()
    assert loss_head["command"] == "python -m benchmarks.hopper --device cpu --stages loss_head"
    results = [row["result"] for row in loss_head["rows"]]
    assert (results.count("met"), results.count("measured"), len(results)) == (4, 2, 6)
    assert "Loss head (loss_head)" in result.stdout and "MET" in result.stdout


def test_peak_memory_is_counted_to_the_byte_and_frees_count() -> None:
    def call() -> None:
        first = torch.empty(1000, dtype=torch.float32)
        second = first.clone()
        del first
        third = second.clone()
        del second, third

    assert peak_bytes(CPU, call) == 8000


def test_kernels_are_told_apart() -> None:
    matrix = torch.ones(64, 64)
    seconds = kernel_seconds(CPU, lambda: (matrix @ matrix).relu())
    assert seconds.keys() == {"matrix products", "the rest"} and 0 < seconds["matrix products"] < 60
    names = ("flash_bwd_kernel", "sm90_xmma_gemm_bf16", "nvjet_tst_256x128", "vectorized_elementwise_kernel")
    assert [kind_of(name) for name in names] == ["attention", "matrix products", "matrix products", "the rest"]


def test_an_error_is_relative_to_the_largest_entry() -> None:
    expected = [torch.tensor([1.0, -4.0]), torch.tensor([2.0])]
    assert largest_error([torch.tensor([1.0, -3.0]), torch.tensor([2.2])], expected) == pytest.approx(0.25)
    for wrong in ([float("nan"), 2.0], [1.0, float("nan")]):
        error = largest_error([torch.tensor([wrong[0], -4.0]), torch.tensor([wrong[1]])], expected)
        assert torch.tensor(error).isnan()


def test_medians_leave_out_the_first_run_of_each_side() -> None:
    calls: list[str] = []
    sides = {name: lambda name=name: calls.append(name) for name in "ab"}
    assert median_seconds(CPU, sides).keys() == {"a", "b"} and calls == ["a", "b"] * 6
    calls.clear()
    median_seconds(CPU, sides, warm=True)
    assert calls == ["a", "b"] * 5


def test_a_median_is_of_the_runs_that_count(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = iter([100.0, 1.0, 2.0, 9.0, 4.0, 3.0])
    monkeypatch.setattr(measure, "seconds_of", lambda device, call: next(taken))
    assert median_seconds(CPU, {"a": lambda: None}) == {"a": 3.0}


def test_sizes_are_those_of_the_recipe_on_a_gpu_alone(tmp_path: Path) -> None:
    assert Bench(CPU, tmp_path).sized(full=2, small=1) == 1
    assert Bench(torch.device("cuda:0"), tmp_path).sized(full=2, small=1) == 2
    assert not_run("x", "y").result is Verdict.NOT_RUN


class FakeGpu:
    """Stands in for what the measurements ask of ``torch.cuda``, and writes down in which order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        calls = self.calls

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                calls.append("record")

            def elapsed_time(self, end: Event) -> float:
                return 1500.0

        answers = {"synchronize": None, "empty_cache": None, "reset_peak_memory_stats": None}
        answers |= {"memory_allocated": 100, "max_memory_allocated": 350, "get_device_name": "NVIDIA H100 80GB HBM3"}
        for name, answer in answers.items():
            monkeypatch.setattr(torch.cuda, name, lambda *_, name=name, answer=answer: self.say(name, answer))
        monkeypatch.setattr(torch.cuda, "Event", Event)

    def say(self, name: str, answer: Any) -> Any:
        self.calls.append(name)
        return answer


def test_on_a_gpu_time_is_between_events_of_an_idle_device(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu(monkeypatch)
    assert seconds_of(torch.device("cuda:0"), lambda: gpu.calls.append("call")) == 1.5
    assert gpu.calls == ["synchronize", "record", "call", "record", "synchronize"]


def test_on_a_gpu_peak_memory_counts_from_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu(monkeypatch)
    assert peak_bytes(torch.device("cuda:0"), lambda: gpu.calls.append("call")) == 250
    before, after = gpu.calls[: gpu.calls.index("call")], gpu.calls[gpu.calls.index("call") + 1 :]
    assert before == ["synchronize", "empty_cache", "memory_allocated", "reset_peak_memory_stats"]
    assert after == ["synchronize", "max_memory_allocated"]


def test_of_a_gpu_only_its_kernels_count() -> None:
    def event(key: str, device: str, seconds: float, *, is_range: bool = False) -> SimpleNamespace:
        kind = getattr(torch.autograd.DeviceType, device)
        times = {"self_device_time_total": seconds * 1e6, "self_cpu_time_total": 1e9}
        return SimpleNamespace(key=key, device_type=kind, is_user_annotation=is_range, **times)

    events = [
        event("flash_fwd_kernel", "CUDA", 3.0),
        event("nvjet_tst_128x256", "CUDA", 2.0),
        event("multi_tensor_apply_kernel", "CUDA", 1.0),
        event("Optimizer.step#GroupStepAdam.step", "CUDA", 1.0, is_range=True),
        event("aten::mm", "CPU", 2.0),
    ]
    seconds = seconds_by_kind(events, on_gpu=True)
    assert seconds == {"attention": 3.0, "matrix products": 2.0, "the rest": 1.0}


def test_a_share_of_the_peak_is_for_known_devices_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeGpu(monkeypatch)
    bench = Bench(torch.device("cuda:0"), tmp_path)
    (row,) = bench.shares_of_peak("share", 0.5 * 989.4e12, 0.4)
    assert (row.result, row.ours, row.bound) == (Verdict.MET, pytest.approx(0.5), 0.4)
    (row,) = bench.shares_of_peak("share", 0.5 * 989.4e12, None)
    assert row.result is Verdict.MEASURED
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA X1")
    (row,) = bench.shares_of_peak("share", 1.0, 0.4)
    assert (row.result, row.note) == (Verdict.NOT_RUN, "no bf16 peak is known of NVIDIA X1.")
    assert list(Bench(CPU, tmp_path).shares_of_peak("share", 1.0, 0.4)) == []


def test_driver_and_power_limit_are_those_of_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\n[ $3 = --id=GPU-12ab ] && echo '580.95.05, 700.00 W'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert machine._driver("12ab") == {"driver": "580.95.05", "power_limit": "700.00 W"}
    assert machine._driver("other") == {}
    tool.unlink()
    assert machine._driver("12ab") == {}


@pytest.mark.gpu
@pytest.mark.parametrize("name", list(STAGES))
def test_a_stage_meets_its_bounds_on_this_gpu(name: str) -> None:
    result = runner.run_stage(STAGES[name], "cuda:0", "pytest -m gpu tests/gpu_check")
    wrong = [row for row in result["rows"] if row["result"] in ("missed", "failed")]
    assert wrong == []
