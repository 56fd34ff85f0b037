"""A run goes on with the same rows and the same losses on any number of ranks, and its settings where they are named.

The domain of every row is its number, so that ``loss_by_domain`` of ``metrics.jsonl`` names the rows of every step.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from nemo_prolong.data.mds import MdsWriter
from nemo_prolong.data.order import GlobalOrder
from nemo_prolong.records.stage_manifest import StageManifest
from tests.support.launches import run_module
from tests.support.tiny import COLUMNS, DOCUMENT_LENGTHS, read_metrics, tiny_config, write_plain_tokenizer

pytestmark = pytest.mark.distributed

PROGRAM = "tests.engine.resume_program"
STEPS, SAVED_STEP, BATCH, ROWS = 8, 4, 4, 40
CP2 = {"context_parallel_size": 2}
TP2 = {"tensor_model_parallel_size": 2}
WHOLE: dict[str, tuple[int, dict[str, Any]]] = {"dp4": (4, {}), "dp4_again": (4, {}), "cp2": (2, CP2)}
"""Runs that are not interrupted: their ranks, their layout."""

RESUMED: dict[str, tuple[str, int, dict[str, Any]]] = {
    "dp4_on_1": ("dp4", 1, {}),
    "dp4_on_2": ("dp4", 2, {}),
    "dp4_on_4": ("dp4", 4, {}),
    "dp4_on_cp2": ("dp4", 2, CP2),
    "dp4_on_tp2": ("dp4", 2, TP2),
    "cp2_on_1": ("cp2", 1, {}),
    "new_lr": ("dp4", 1, {}),
}
"""Runs that go on: the run whose checkpoint they have, their ranks, their layout."""

ALWAYS = ("dp4_on_1", "dp4_on_cp2", "dp4_on_tp2")
SAME_SETTINGS = [
    pytest.param(run, marks=[] if run in ALWAYS else pytest.mark.recipe) for run in RESUMED if run != "new_lr"
]
"""A run each, of which only some belong to the ordinary suite: 4 ranks on two cores take their time."""

LR = {"lr": 1e-3, "min_lr": 1e-4, "lr_warmup_iters": 1}
NEW_LR = {"lr": 2e-3, "min_lr": 1e-4, "lr_warmup_iters": 1, "weight_decay": 0.0}


def write_numbered_rows(root: Path) -> None:
    """Write rows that carry their number as their domain."""
    rng = np.random.default_rng(1)
    with MdsWriter(root / "rows", COLUMNS) as writer:
        for row in range(ROWS):
            bounds = np.cumsum([0, *DOCUMENT_LENGTHS[row % len(DOCUMENT_LENGTHS)]])
            ids = (rng.integers(32) + np.cumsum(rng.integers(0, 3, bounds[-1]))) % 32
            spans = np.stack([bounds[:-1], bounds[1:]], axis=1).astype(np.uint32)
            writer.write(
                {"input_ids": ids.astype(np.uint32), "indices": spans, "domain": str(row), "length": int(bounds[-1])}
            )
    write_plain_tokenizer(root / "tokenizer")


def _job(root: Path, runs: str, ranks: int, copy_of: str | None = None, **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "train": {"train_iters": STEPS, "global_batch_size": BATCH},
        "optim": LR,
        "checkpoint": {"save_interval_steps": SAVED_STEP},
        **changes,
    }
    return {
        "config": tiny_config(root / "data", root / runs, **values).model_dump(mode="json"),
        "ranks": ranks,
        "log": str(root / f"{runs}_log"),
        "copy": [str(root / copy_of), str(root / runs)] if copy_of else None,
    }


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs that the selected tests name, and what those go on from, all from one program."""
    root = tmp_path_factory.mktemp("resume")
    write_numbered_rows(root / "data")
    selected = {item.callspec.params.get("run") for item in request.session.items if hasattr(item, "callspec")}
    resumed = {name: job for name, job in RESUMED.items() if name in selected}
    needed = selected | {source for source, _, _ in resumed.values()} | {"dp4"}
    jobs = [_job(root, name, ranks, parallelism=cp) for name, (ranks, cp) in WHOLE.items() if name in needed]
    for name, (source, ranks, layout) in resumed.items():
        changes = {"optim": NEW_LR, "resume": {"allow": ["optim.lr", "optim.weight_decay"]}} if name == "new_lr" else {}
        jobs.append(_job(root, name, ranks, source, parallelism=layout, **changes))
    path = root / "jobs.json"
    path.write_text(json.dumps(jobs))
    run_module(PROGRAM, str(path))
    return root


def rows_of_steps(run_dir: Path) -> list[set[str]]:
    return [set(record["loss_by_domain"]) for record in read_metrics(run_dir)]


def hashes(run_dir: Path) -> dict[str, str]:
    """Return the hash of every file of the last checkpoint that holds state."""
    weights = run_dir / "checkpoints" / f"step_{STEPS:08d}" / "weights"
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(weights.glob("*.distcp"))}


@pytest.mark.recipe
@pytest.mark.parametrize("run", ["dp4_again"])
def test_a_run_on_four_ranks_repeats_to_the_last_bit(run: str, runs: Path) -> None:
    first, second = ([(r["loss"], r["grad_norm"]) for r in read_metrics(runs / run / "tiny")] for run in ("dp4", run))
    assert len(first) == STEPS and first == second
    assert len(hashes(runs / "dp4" / "tiny")) >= 4
    assert hashes(runs / "dp4" / "tiny") == hashes(runs / run / "tiny")


@pytest.mark.parametrize("run", ["dp4", *SAME_SETTINGS])
def test_every_step_has_the_global_rows_on_any_ranks(run: str, runs: Path) -> None:
    order = GlobalOrder([ROWS], [1.0], 42)
    expected = [{str(order.locate(step * BATCH + row)[1]) for row in range(BATCH)} for step in range(STEPS)]
    assert all(len(rows) == BATCH for rows in expected)
    assert rows_of_steps(runs / run / "tiny") == expected


@pytest.mark.parametrize("run", SAME_SETTINGS)
def test_losses_after_a_resume_on_other_ranks_are_the_same(run: str, runs: Path) -> None:
    whole, resumed = read_metrics(runs / RESUMED[run][0] / "tiny"), read_metrics(runs / run / "tiny")
    # Tensor-parallel ranks add up products of matrices in another order.
    rel = 1e-5 if RESUMED[run][2] == TP2 else 1e-6
    assert [record["step"] for record in resumed] == list(range(1, STEPS + 1))
    for before, after in zip(whole, resumed, strict=True):
        assert after["loss"] == pytest.approx(before["loss"], rel=rel, abs=0.0)
        for row, (loss_sum, targets) in ((row, value.values()) for row, value in before["loss_by_domain"].items()):
            assert list(after["loss_by_domain"][row].values()) == [pytest.approx(loss_sum, rel=rel, abs=0.0), targets]


@pytest.mark.parametrize("run", ["dp4"])
def test_a_stage_says_its_time_limits_when_it_starts(run: str, runs: Path) -> None:
    said = "asked to stop 120 s before the end of a job, hang after 1800 s, process groups time out after 1920 s"
    assert said in (runs / run / "tiny" / "train.log").read_text()


@pytest.mark.parametrize("run", ["dp4"])
def test_every_rank_saves_the_elements_it_keeps_and_gathers_none(run: str, runs: Path) -> None:
    weights = runs / run / "tiny" / "checkpoints" / f"step_{SAVED_STEP:08d}" / "weights"
    metadata = FileSystemReader(weights).read_metadata()
    written: Counter[str] = Counter()
    starts: set[int] = set()
    for index in metadata.storage_data:
        entry = metadata.state_dict_metadata[index.fqn]
        if index.fqn.startswith("optimizer.state.exp_avg."):
            (chunk,) = (chunk for chunk in entry.chunks if chunk.offsets == index.offset)
            rank = metadata.storage_data[index].relative_path.split("_")[2]
            written[rank] += chunk.sizes.numel()
            starts.add(chunk.offsets[-1])
    # Buffers are padded, so that the last rank keeps less.
    assert len(written) == 4 and max(written.values()) < 1.05 * written.total() / 4
    assert starts - {0}, "no rank has saved a part of a tensor that several keep"


@pytest.mark.recipe
@pytest.mark.parametrize("run", ["dp4_on_4"])
def test_a_resume_on_the_same_ranks_has_the_same_bits(run: str, runs: Path) -> None:
    assert hashes(runs / run / "tiny") == hashes(runs / "dp4" / "tiny")


@pytest.mark.parametrize("run", SAME_SETTINGS)
def test_every_resume_was_one_and_says_on_how_many_ranks(run: str, runs: Path) -> None:
    ranks = RESUMED[run][1]
    events = [json.loads(line) for line in (runs / run / "tiny" / "events.jsonl").read_text().splitlines()]
    resumed = [event["detail"] for event in events if event["event"] == "resumed"]
    assert resumed == [f"from step_{SAVED_STEP:08d}, on {ranks} rank{'' if ranks == 1 else 's'}"]


@pytest.mark.parametrize("run", ["new_lr"])
def test_a_named_learning_rate_counts_from_the_first_step_on(run: str, runs: Path) -> None:
    old, new = read_metrics(runs / "dp4" / "tiny"), read_metrics(runs / run / "tiny")
    # Same schedule, another peak: what is above the floor scales.
    floor = LR["min_lr"]
    for before, after in zip(old[SAVED_STEP:], new[SAVED_STEP:], strict=True):
        cosine = (before["learning_rate"] - floor) / (LR["lr"] - floor)
        assert after["learning_rate"] == pytest.approx(floor + cosine * (NEW_LR["lr"] - floor), rel=1e-6)
    assert new[SAVED_STEP]["loss"] == pytest.approx(old[SAVED_STEP]["loss"], rel=1e-6)
    assert new[-1]["loss"] != pytest.approx(old[-1]["loss"], rel=1e-4)


@pytest.mark.parametrize("run", ["new_lr"])
def test_a_named_weight_decay_replaces_the_saved_one(run: str, runs: Path) -> None:
    decays = []
    for directory in (runs / "dp4" / "tiny", runs / run / "tiny"):
        common = torch.load(
            directory / "checkpoints" / f"step_{STEPS:08d}" / "weights" / "common.pt", weights_only=True
        )
        groups = common["optimizer"][0]["optimizer"]["param_groups"]
        decays.append(sorted({group["weight_decay"] for group in groups}))
    assert decays == [[0.0, 0.1], [0.0]]


@pytest.mark.parametrize("run", ["new_lr"])
def test_a_change_of_settings_is_in_events_and_manifest(run: str, runs: Path) -> None:
    run_dir = runs / run / "tiny"
    changes = ["optim.lr (0.001 -> 0.002)", "optim.weight_decay (0.1 -> 0.0)"]
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    changed = [event for event in events if event["event"] == "setting_changed"]
    assert [(event["step"], event["detail"]) for event in changed] == [(SAVED_STEP, change) for change in changes]
    assert [str(change) for change in StageManifest.read(run_dir).changes] == changes
