"""Trackers through fakes of the packages' documented interfaces: right calls, no waiting, no failure that matters."""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
import types
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nemo_prolong.config.schema import RunConfig
from nemo_prolong.errors import ConfigError
from nemo_prolong.records.run_directory import RunDirectory
from nemo_prolong.telemetry import trackers as trackers_module
from nemo_prolong.telemetry.names import GROUP_NAMES, STEP_NAMES, named_figures
from nemo_prolong.telemetry.trackers import Trackers, check_packages
from tests.support.tiny import tiny_config

RECORD = {
    "step": 7,
    "loss": 4.5,
    "grad_norm": 1.25,
    "loss_by_position": {
        "0-2047": {"loss_sum": 9.0, "target_tokens": 2},
        "2048-4095": {"loss_sum": 0.0, "target_tokens": 0},
    },
    "loss_by_domain": {"code": {"loss_sum": 9.0, "target_tokens": 2}},
    "mfu": 0.31,
    "time": 1.79e9,
}
FIGURES = {
    "train/loss": 4.5,
    "train/grad_norm": 1.25,
    "perf/mfu": 0.31,
    "train/loss_by_position/0-2047": 4.5,
    "train/loss_by_domain/code": 4.5,
}


class FakeWandb(types.ModuleType):
    """``wandb.init``, ``wandb.Settings``, and what ``init`` returns."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.inits: list[dict[str, Any]] = []
        self.logged: list[tuple[dict[str, float], int]] = []
        self.exit_codes: list[int] = []
        self.threads: set[str] = set()
        self.before_log = lambda: None

    def Settings(self, **settings: Any) -> dict[str, Any]:
        return settings

    def init(self, **arguments: Any) -> FakeWandb:
        self.inits.append(arguments)
        return self

    def log(self, data: dict[str, float], step: int | None = None) -> None:
        self.threads.add(threading.current_thread().name)
        self.before_log()
        assert step is not None
        self.logged.append((data, step))

    def finish(self, exit_code: int | None = None) -> None:
        assert exit_code is not None
        self.exit_codes.append(exit_code)


class FakeMlflow(types.ModuleType):
    """``mlflow.MlflowClient`` and ``mlflow.entities``, as far as they are documented."""

    def __init__(self) -> None:
        super().__init__("mlflow")
        self.entities = types.ModuleType("mlflow.entities")
        self.entities.Metric = lambda key, value, timestamp, step: ("metric", key, value, timestamp, step)
        self.entities.Param = lambda key, value: ("param", key, value)
        self.experiments: dict[str, str] = {}
        self.runs: dict[str, dict[str, Any]] = {}
        self.uris: list[str] = []

    def MlflowClient(self, tracking_uri: str) -> FakeMlflow:
        self.uris.append(tracking_uri)
        return self

    def get_experiment_by_name(self, name: str) -> Any:
        known = self.experiments.get(name)
        return types.SimpleNamespace(experiment_id=known) if known else None

    def create_experiment(self, name: str) -> str:
        self.experiments[name] = str(len(self.experiments) + 1)
        return self.experiments[name]

    def create_run(self, experiment_id: str, run_name: str, tags: dict[str, str]) -> Any:
        assert experiment_id in self.experiments.values()
        run_id = f"run{len(self.runs) + 1}"
        self.runs[run_id] = {"name": run_name, "tags": tags, "metrics": [], "params": {}, "status": "RUNNING"}
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=run_id))

    def log_batch(self, run_id: str, metrics: Any = (), params: Any = ()) -> None:
        assert len(metrics) <= 1000 and len(params) <= 100, "more than the server takes"
        self.runs[run_id]["metrics"] += metrics
        for _, key, value in params:
            assert key not in self.runs[run_id]["params"] and len(value) <= 500
            self.runs[run_id]["params"][key] = value

    def update_run(self, run_id: str, status: str) -> None:
        self.runs[run_id]["status"] = status

    def set_terminated(self, run_id: str, status: str) -> None:
        self.runs[run_id]["status"] = status


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> FakeMlflow:
    fake = FakeMlflow()
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    monkeypatch.setitem(sys.modules, "mlflow.entities", fake.entities)
    return fake


def config(tmp_path: Path, **tracker: Any) -> RunConfig:
    (tmp_path / "run").mkdir(exist_ok=True)
    return tiny_config(tmp_path / "data", tmp_path, name="run", tracker=tracker)


def track(cfg: RunConfig, *steps: int, done: int = 0, succeeded: bool = True) -> None:
    """Log a record of each step and close."""
    trackers = Trackers(cfg, RunDirectory(cfg.run_dir), done)
    for step in steps:
        trackers.log(named_figures(RECORD), step, RECORD["time"])
    trackers.close(succeeded=succeeded)


def test_a_record_becomes_named_figures():
    assert named_figures(RECORD) == FIGURES
    assert named_figures({"step": 1, "val_loss": 3.0, "val_target_tokens": 2, "time": 0.0}) == {
        "val/loss": 3.0,
        "val/target_tokens": 2.0,
    }


def test_every_metric_is_documented_under_its_own_name():
    text = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    names = [*STEP_NAMES.values(), *GROUP_NAMES.values()]
    assert len(set(names)) == len(names)
    assert [name for name in names if f"`{name}" not in text] == []
    assert [key for key in [*STEP_NAMES, *GROUP_NAMES] if f"`{key}`" not in text] == []


def test_wandb_gets_one_run_with_every_step(tmp_path, wandb):
    track(config(tmp_path, wandb={"project": "p", "entity": "team", "mode": "offline"}), 1, 2)
    (arguments,) = wandb.inits
    assert wandb.logged == [(FIGURES, 1), (FIGURES, 2)]
    assert wandb.exit_codes == [0]
    assert {key: arguments[key] for key in ("project", "entity", "mode", "name", "job_type", "resume", "dir")} == {
        "project": "p",
        "entity": "team",
        "mode": "offline",
        "name": "run",
        "job_type": "base",
        "resume": "allow",
        "dir": str(tmp_path / "run"),
    }
    assert arguments["config"]["train"]["train_iters"] == 4
    # What W&B would find out by itself could hold a secret.
    assert arguments["settings"] == {
        "console": "off",
        "disable_git": True,
        "save_code": False,
        "x_disable_meta": True,
    }


def test_a_resumed_run_keeps_its_id_and_a_new_one_does_not(tmp_path, wandb, mlflow):
    cfg = config(tmp_path, wandb={}, mlflow={"tracking_uri": "file:x"})
    track(cfg, 1, succeeded=False)
    track(cfg, 2, done=1)
    first, resumed = (arguments["id"] for arguments in wandb.inits)
    assert first == resumed and wandb.exit_codes == [1, 0]
    assert list(mlflow.runs) == ["run1"] and mlflow.runs["run1"]["status"] == "FINISHED"
    assert [step for *_, step in mlflow.runs["run1"]["metrics"]] == [1] * 5 + [2] * 5
    track(cfg, 1)
    assert wandb.inits[2]["id"] != first and list(mlflow.runs) == ["run1", "run2"]


def test_mlflow_gets_a_run_with_parameters_and_metrics(tmp_path, mlflow):
    cfg = config(tmp_path, mlflow={"tracking_uri": "http://server:5000", "experiment": "long"})
    track(cfg.model_copy(update={"parent": 900 * "x"}), 7)
    run = mlflow.runs["run1"]
    assert mlflow.uris == ["http://server:5000"] and list(mlflow.experiments) == ["long"]
    assert (run["name"], run["tags"], run["status"]) == ("run", {"stage": "base"}, "FINISHED")
    assert ("metric", "train/loss_by_position/0-2047", 4.5, 1_790_000_000_000, 7) in run["metrics"]
    assert run["params"]["train.train_iters"] == "4" and run["params"]["parent"] == 500 * "x"
    assert run["params"]["data.mixture"].startswith("[{'path': 'rows'")


def test_tensorboard_has_the_figures_under_their_names(tmp_path):
    track(config(tmp_path, tensorboard=True), 1, 2)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == sorted(FIGURES)
    assert [(event.step, event.value, event.wall_time) for event in events.Scalars("train/loss")] == [
        (1, 4.5, 1.79e9),
        (2, 4.5, 1.79e9),
    ]


def test_no_secret_reaches_a_tracker(tmp_path, wandb, mlflow):
    uri = "http://me:cAnArY@server:5000"
    track(config(tmp_path, wandb={}, mlflow={"tracking_uri": uri}), 1)
    assert mlflow.uris == [uri], "the client itself needs it"
    assert mlflow.runs["run1"]["params"]["tracker.mlflow.tracking_uri"] == "http://<hidden>@server:5000"
    assert "cAnArY" not in json.dumps([wandb.inits, mlflow.runs])


@pytest.mark.parametrize("package", ["wandb", "mlflow"])
def test_a_missing_package_is_refused_with_the_installation(tmp_path, monkeypatch, package):
    settings = {"wandb": {}, "mlflow": {"tracking_uri": "file:x"}}
    cfg = config(tmp_path, **{package: settings[package]})
    monkeypatch.delitem(sys.modules, package, raising=False)
    monkeypatch.setattr(trackers_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as refused:
        check_packages(cfg.tracker)
    assert str(refused.value) == (
        f"tracker.{package}: needs the package {package}, which is not installed. "
        f"Install it (pip install {package}), or set tracker=tensorboard or tracker=jsonl."
    )
    check_packages(config(tmp_path, tensorboard=True).tracker)


def test_a_tracker_that_fails_warns_once_and_the_others_go_on(tmp_path, wandb, mlflow, caplog, monkeypatch):
    def fail() -> None:
        raise ConnectionError("no route to http://me:pw@host")

    wandb.before_log = fail
    monkeypatch.setattr(trackers_module, "_RETRY_SECONDS", 0.0)
    with caplog.at_level(logging.WARNING):
        track(config(tmp_path, wandb={}, mlflow={"tracking_uri": "file:x"}), 1, 2, 3)
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 1
    assert warnings[0].startswith("tracker wandb: ConnectionError: no route to http://me:pw@host. Training goes on")
    assert len(mlflow.runs["run1"]["metrics"]) == 3 * len(FIGURES)


def test_a_failed_tracker_is_tried_again_after_a_while(tmp_path, wandb, monkeypatch):
    attempts: list[int] = []

    def fail_at_first() -> None:
        attempts.append(len(attempts))
        if len(attempts) == 1:
            raise ConnectionError("down")

    wandb.before_log = fail_at_first
    cfg = config(tmp_path, wandb={})
    track(cfg, 1, 2, 3)
    assert wandb.logged == [], "one minute has not passed"
    attempts.clear()
    monkeypatch.setattr(trackers_module, "_RETRY_SECONDS", 0.0)
    track(cfg, 1, 2, 3)
    assert [step for _, step in wandb.logged] == [2, 3]


def test_training_does_not_wait_for_a_slow_tracker(tmp_path, wandb, caplog, monkeypatch):
    hangs = threading.Event()
    wandb.before_log = lambda: hangs.wait(30) and None
    monkeypatch.setattr(trackers_module, "_QUEUE_RECORDS", 5)
    monkeypatch.setattr(trackers_module, "_CLOSE_SECONDS", 0.1)
    started = time.monotonic()
    with caplog.at_level(logging.WARNING):
        track(config(tmp_path, wandb={}), *range(1, 50))
    assert time.monotonic() - started < 10
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "tracker wandb: it is 5 records behind" in warning
    assert wandb.threads == {"tracker-wandb"}
    hangs.set()


def test_closing_twice_is_harmless(tmp_path, wandb):
    cfg = config(tmp_path, wandb={})
    trackers = Trackers(cfg, RunDirectory(cfg.run_dir), 0)
    trackers.log(FIGURES, 1, 0.0)
    trackers.close(succeeded=False)
    trackers.close(succeeded=True)
    assert wandb.exit_codes == [1]
