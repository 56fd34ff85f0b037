"""What only a GPU reaches, with stand-ins for the GPU: which work is chosen, and what is made of its results."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend

from benchmarks.hopper import attention, layers, resume, runs, train_program, transformer_engine
from benchmarks.hopper.bench import Bench
from benchmarks.hopper.records import Row, Verdict, measured
from benchmarks.hopper.runs import Job, jobs_of, largest, largest_difference, stage_config, train
from nemo_prolong.config.rules.attention import Platform
from nemo_prolong.config.rules.constraints import constraint_findings
from nemo_prolong.config.schema import ModelConfig, PrecisionConfig

GIB = 2**30
CONTAINER = Platform(transformer_engine=(2, 9), compute_capability=(9, 0), cudnn=(9, 18, 0), cuda=(13, 0))


@pytest.fixture
def gpu(tmp_path: Path) -> Bench:
    return Bench(torch.device("cuda:0"), tmp_path)


@pytest.fixture
def cpu(tmp_path: Path) -> Bench:
    return Bench(torch.device("cpu"), tmp_path)


def layers_chosen(gpu: Bench, monkeypatch: pytest.MonkeyPatch, gib: float, modules: set[str]) -> list[Any]:
    """Return what the stage of layers would measure, and its other rows, on a device of so much memory."""
    cached = 0.0

    def release(device: torch.device) -> None:
        nonlocal cached
        cached = 0.0

    def measure(bench: Bench, model: ModelConfig, load: layers.Load, backend: str, compute: str) -> Iterator[Row]:
        nonlocal cached
        # torch keeps what a load has used until it is told to give it back.
        cached = 0.9 * gib * GIB
        found.append((load.row_tokens, backend, compute, model.num_layers, model.vocab_size))
        yield measured("x", 1.0, "s")

    found: list[Any] = []
    monkeypatch.setattr(layers, "start", lambda device: None)
    monkeypatch.setattr(layers, "release", release)
    monkeypatch.setattr(layers, "_measure", measure)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(gib * GIB - cached), int(gib * GIB)))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in modules else None)
    return found + [row for row in layers.run(gpu) if row.result is not Verdict.MEASURED]


def test_every_length_of_row_has_the_whole_memory(gpu: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = layers_chosen(gpu, monkeypatch, 138, {"transformer_engine"})
    assert [(tokens, backend, compute) for tokens, backend, compute, *_ in chosen] == [
        (65_536, "torch", "bf16"),
        (65_536, "te", "bf16"),
        (65_536, "te", "fp8"),
        (131_072, "torch", "bf16"),
        (262_144, "torch", "bf16"),
    ]
    assert [(count, vocabulary) for *_, count, vocabulary in chosen] == [(12, 128_256)] * 3 + [
        (4, 128_256),
        (2, 128_256),
    ]


def test_a_row_that_does_not_fit_is_named_with_what_it_needs(gpu: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    *chosen, row = layers_chosen(gpu, monkeypatch, 60, set())
    assert [tokens for tokens, *_ in chosen] == [65_536, 131_072]
    assert (row.bar, row.result) == ("rows of 256K", Verdict.NOT_RUN)
    assert row.note.startswith("one layer needs 7") and row.note.endswith(" GiB, 56.4 GiB are free.")


def test_the_container_allows_every_run_of_the_check(gpu: Bench) -> None:
    configs = [
        transformer_engine.run_config(gpu, name, precision)
        for name, (precision, _) in transformer_engine.cases().items()
    ]
    configs += [stage_config(gpu, f"resumed_{i}", precision=case) for i, case in enumerate(resume._CASES.values())]
    assert [str(error) for config in configs for error in constraint_findings(config, CONTAINER)] == []
    assert [config.train.deterministic for config in configs] == [True] * 6 + [False] + [True] * 4


def test_a_loss_that_is_not_a_number_is_the_largest_difference() -> None:
    for losses in ([float("nan"), 1.0, 1.0], [1.0, float("nan"), 1.0], [1.0, 1.0, float("nan")]):
        assert torch.tensor(largest_difference(losses, [1.0, 1.0, 1.0])).isnan()
    assert torch.tensor(largest([0.5, float("nan"), 1.0])).isnan()
    assert largest_difference([1.0, 1.5], [1.0, 2.0]) == 0.25


def test_without_a_gpu_a_run_does_without_the_libraries_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("transformer_engine", "apex", "amp_C"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace())
    train_program.hide_gpu_libraries()
    for name in ("transformer_engine", "apex", "amp_C"):
        with pytest.raises(ModuleNotFoundError, match=name):
            __import__(name)


def test_jobs_reach_the_process_that_trains_them(gpu: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    config = stage_config(gpu, "name", precision={"compute": "bf16", "backend": "torch"})
    jobs = [Job(config, resume=Path("a/b")), Job(config, parent=Path("c"))]
    commands: list[Any] = []

    def run(command: list[str], **options: Any) -> SimpleNamespace:
        commands.append(
            (command[1:3], options["env"].get("CUDA_VISIBLE_DEVICES"), jobs_of(Path(command[3]).read_text()))
        )
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setattr(runs.subprocess, "run", run)
    train(gpu, jobs)
    train(gpu, jobs, on_cpu=True)
    module = ["-m", "benchmarks.hopper.train_program"]
    assert commands == [(module, "3", jobs), (module, "", jobs)]


def test_a_process_that_cannot_train_says_why(gpu: Bench) -> None:
    config = stage_config(gpu, "there_already")
    Path(config.run_dir).mkdir(parents=True)
    with pytest.raises(RuntimeError, match=r"^FileExistsError: .*there_already'$"):
        train(gpu, [Job(config)], on_cpu=True)


def test_fp8_attention_is_judged_after_its_scales_have_settled(cpu: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    class Scaled:
        """Attention that is far off until it has seen two rows."""

        def __init__(self, settled_after: int) -> None:
            self.calls, self.settled_after = 0, settled_after

        def __call__(self, lengths: list[int], *inputs: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return (1.0 if self.calls > self.settled_after else 2.0) * attention.alone(lengths, *inputs)

    monkeypatch.setattr(
        transformer_engine, "called", lambda module, lengths, device, context: lambda *qkv: module(lengths, *qkv)
    )
    precision = PrecisionConfig(compute="fp8_attention", backend="te", fp8_recipe="delayed")
    for settled_after, verdict in ((2, Verdict.MET), (3, Verdict.MISSED)):
        monkeypatch.setattr(
            transformer_engine,
            "core_attention",
            lambda bench, precision, tokens, calls=settled_after: Scaled(calls if precision.backend == "te" else 0),
        )
        rows = transformer_engine.attention_rows(cpu, precision, contextlib.nullcontext, "fp8")
        assert [next(rows).result, next(rows).result] == [verdict, verdict]


def test_attention_whose_bits_differ_between_two_runs_misses(cpu: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [row.result for row in attention._repeated_rows(cpu)] == [Verdict.MET] * 2
    modes: list[int] = []
    repeatable = attention.ours

    def noisy(lengths: list[int], device: torch.device, *inputs: torch.Tensor) -> torch.Tensor:
        modes.append(torch.get_deterministic_debug_mode())
        return repeatable(lengths, device, *inputs) * (1 + 2**-6 * len(modes))

    monkeypatch.setattr(attention, "ours", noisy)
    assert [row.result for row in attention._repeated_rows(cpu)] == [Verdict.MISSED] * 2
    assert modes == [1, 1, 0, 0] * 2


@pytest.mark.parametrize(
    ("kernels", "bars"),
    [
        (
            {SDPBackend.FLASH_ATTENTION: 1.0, SDPBackend.CUDNN_ATTENTION: 0.5},
            {"documents alone": 2.0, "cuDNN's kernel": 4.0},
        ),
        ({SDPBackend.CUDNN_ATTENTION: 0.5}, {"documents alone": None, "cuDNN's kernel": 4.0}),
        ({SDPBackend.FLASH_ATTENTION: 1.0}, {"documents alone": 2.0}),
    ],
)
def test_our_time_is_compared_with_our_own_kernel(
    gpu: Bench, monkeypatch: pytest.MonkeyPatch, kernels: dict[SDPBackend, float], bars: dict[str, float | None]
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    seconds = {"ours": 2.0, "deterministic": 3.0, **{kernel.name: taken for kernel, taken in kernels.items()}}
    rows = {row.bar: row for row in attention._time_ratios(gpu, "row", [65_536], seconds)}
    assert {bar: rows[f"row: time over that of {'its ' * (bar[0] == 'd')}{bar}"].ours for bar in bars} == bars
    assert rows["row: time with train.deterministic over that without"].ours == 1.5
    assert rows["row: rate of causal FLOPs"].ours == pytest.approx(7 * 4096 * 65_536**2 / 2.0 / 1e12)
    share = rows["row: share of the dense bf16 peak"]
    assert share.bound == 0.3 and share.ours == pytest.approx(7 * 4096 * 65_536**2 / 2.0 / 989.4e12)


def test_a_kernel_that_refuses_is_not_timed(cpu: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[dict[str, Callable[[], object]]] = []
    monkeypatch.setattr(
        attention, "median_seconds", lambda device, sides: timed.append(sides) or dict.fromkeys(sides, 1.0)
    )
    list(attention._times(cpu, "row", [32, 32]))
    # torch has no cuDNN on a CPU; ours is there twice.
    assert [list(sides) for sides in timed] == [["ours", "deterministic", "FLASH_ATTENTION"]]
    expected = timed[0]["ours"]()
    assert all(torch.equal(a, b) for a, b in zip(timed[0]["deterministic"](), expected, strict=True))
    for actual, wanted in zip(timed[0]["FLASH_ATTENTION"](), expected, strict=True):
        assert torch.allclose(actual.float(), wanted.float(), atol=2e-2)
