"""Neither workers nor kills nor repetition change a byte, and a half-made directory is never in its place."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from nemo_prolong.config.schema.prepare import PrepareConfig
from nemo_prolong.data.mds import MdsReader
from nemo_prolong.data.preparation import run as run_module
from nemo_prolong.data.preparation.run import prepare
from nemo_prolong.data.tokenizer.template import LLAMA3_TRAINING
from nemo_prolong.errors import DataError

Configure = Callable[..., PrepareConfig]
PROGRAM = "tests.data.preparation.prepare_program"


def assert_same_bytes(left: Path, right: Path) -> None:
    files = sorted(path.relative_to(left) for path in left.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(right) for path in right.rglob("*") if path.is_file())
    for file in files:
        assert (left / file).read_bytes() == (right / file).read_bytes(), file


def start(cfg: PrepareConfig, directory: Path) -> subprocess.Popen[bytes]:
    described = directory / "config.json"
    described.write_text(cfg.model_dump_json())
    return subprocess.Popen([sys.executable, "-m", PROGRAM, str(described)], stderr=subprocess.PIPE)


def test_a_second_run_gives_the_same_bytes(prepared: Path, mixed_config: Configure, tmp_path: Path) -> None:
    prepare(mixed_config(tmp_path / "data"))
    assert_same_bytes(prepared, tmp_path / "data")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_four_workers_give_the_bytes_of_one(prepared: Path, mixed_config: Configure, tmp_path: Path) -> None:
    prepare(mixed_config(tmp_path / "data", workers=4))
    assert_same_bytes(prepared, tmp_path / "data")


def test_shards_of_another_plan_are_written_again(prepared: Path, mixed_config: Configure, tmp_path: Path) -> None:
    def killed(directory: Path) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(mixed_config(tmp_path / "data"), finish=killed)
    partial = tmp_path / ".data.partial"
    # As an earlier version left it, whose rows of conversations were others.
    length = partial / "rows" / "chat-256" / "length.npy"
    np.save(length, np.load(length) + 1)
    shard = partial / "data" / "chat-256" / "shard.00000.mds"
    shard.write_bytes(b"other rows")
    prepare(mixed_config(tmp_path / "data"))
    assert_same_bytes(prepared, tmp_path / "data")


def finished_work(output: Path) -> int:
    """Units and shards that a run has finished so far."""
    partial = output.with_name(f".{output.name}.partial")
    return len(list(partial.glob("units/[0-9]*"))) + len(list(partial.glob("entries/*/*.json")))


def test_a_run_killed_repeatedly_gives_the_undisturbed_bytes(
    prepared: Path, mixed_config: Configure, tmp_path: Path
) -> None:
    output, rng = tmp_path / "data", random.Random(3)
    cfg = mixed_config(output, workers=2)
    kills = 0
    for wanted in (1, rng.randint(2, 6), rng.randint(7, 11), rng.randint(12, 16)):
        process = start(cfg, tmp_path)
        while process.poll() is None and finished_work(output) < wanted:
            time.sleep(0.002)
        time.sleep(rng.random() * 0.02)
        process.kill()
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
        assert not output.exists() or process.returncode == 0
    process = start(cfg, tmp_path)
    assert (process.communicate()[1].decode(), process.returncode) == ("", 0)
    assert kills >= 3
    assert_same_bytes(prepared, output)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "data"]


@pytest.mark.parametrize("step", ["_write_shards", "_finish_row_set", "_samples", "Samples", "DataManifest"])
def test_a_run_that_stops_at_any_step_goes_on_there(
    step: str, prepared: Path, mixed_config: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    cfg = mixed_config(tmp_path / "data")

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_module, step, stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(cfg)
    assert [path.name for path in tmp_path.iterdir()] == [".data.partial"]
    with caplog.at_level(logging.INFO, logger="nemo_prolong"):
        prepare(cfg)
    assert "going on where an earlier run stopped" in caplog.text
    units, done = next(r.args[1:] for r in caplog.records if str(r.msg).startswith("tokenizing"))
    assert units == done > 5
    assert_same_bytes(prepared, tmp_path / "data")


def test_workers_end_with_a_killed_run(mixed_config: Configure, tmp_path: Path) -> None:
    process = start(mixed_config(tmp_path / "data", workers=2), tmp_path)
    children: list[int] = []
    while len(children) < 2 and process.poll() is None:
        listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True)
        children = [int(pid) for pid in listed.stdout.split()]
        time.sleep(0.05)
    process.kill()
    process.wait()  # not communicate(): workers that live on hold the pipe open
    assert len(children) >= 2
    deadline = time.monotonic() + 10
    while any(os.path.exists(f"/proc/{pid}") for pid in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(os.path.exists(f"/proc/{pid}") for pid in children)


def test_a_complete_directory_is_reused(
    prepared: Path, mixed_config: Configure, caplog: pytest.LogCaptureFixture
) -> None:
    before = {path: path.stat().st_mtime_ns for path in prepared.rglob("*")}
    with caplog.at_level(logging.INFO, logger="nemo_prolong"):
        prepare(mixed_config(prepared, workers=3))
    assert "is complete and has this configuration: reused" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in prepared.rglob("*")} == before


def test_a_directory_of_another_configuration_is_refused(prepared: Path, mixed_config: Configure) -> None:
    with pytest.raises(DataError) as refusal:
        prepare(mixed_config(prepared, seed=1))
    assert str(refusal.value) == (
        f"output={prepared}: holds data of another configuration, tokenizer or state of the sources, or "
        "conversations as an earlier version wrote them. "
        f"Remove {prepared}, or set output to another directory."
    )


def test_a_directory_whose_sources_changed_is_refused(
    mixed_config: Configure, tmp_path: Path, mixed_sources: list[dict[str, Any]]
) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.md").write_text("word " * 400)
    changes = {
        "sources": [{"domain": "web", "path": str(tmp_path / "notes")}],
        "row_sets": [{"path": "web", "domain": "web", "seq_length": 64}],
        "validation_fraction": 0.0,
    }
    prepare(mixed_config(tmp_path / "data", **changes))
    prepare(mixed_config(tmp_path / "data", **changes))
    (tmp_path / "notes" / "b.md").write_text("another " * 400)
    with pytest.raises(DataError, match="holds data of another configuration, tokenizer or state of the sources"):
        prepare(mixed_config(tmp_path / "data", **changes))


def test_a_second_preparation_reads_its_own_tokens(
    mixed_config: Configure, tokenizer_directory: Path, tmp_path: Path
) -> None:
    """The same names hold other tokens now; what the first one had open must not be read."""
    changes = {
        "sources": [{"domain": "web", "path": str(tmp_path / "notes")}],
        "row_sets": [{"path": "web", "domain": "web", "seq_length": 64}],
        "tokenizer": {"path": str(tmp_path / "tokenizer")},
        "validation_fraction": 0.0,
    }
    (tmp_path / "notes").mkdir()
    shutil.copytree(tokenizer_directory, tmp_path / "tokenizer")
    found = []
    for text, merges in (("window buffer " * 400, None), ("token length " * 400, 0)):
        (tmp_path / "notes" / "a.md").write_text(text)
        definition = json.loads((tokenizer_directory / "tokenizer.json").read_text())
        definition["model"]["merges"] = definition["model"]["merges"][:merges]
        (tmp_path / "tokenizer" / "tokenizer.json").write_text(json.dumps(definition))
        prepare(mixed_config(tmp_path / "data", **changes))
        row = MdsReader(tmp_path / "data" / "web")[0]["input_ids"]
        tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer" / "tokenizer.json"))
        found.append(row.tolist()[1:])
        assert found[-1] == tokenizer.encode(text, add_special_tokens=False).ids[:63]
        shutil.rmtree(tmp_path / "data")
    assert found[0] != found[1]


@pytest.mark.parametrize("file", ["marked.jinja", "tokenizer/tokenizer_config.json"])
def test_another_template_or_tokenizer_is_another_preparation(
    file: str, mixed_config: Configure, mixed_sources: list[dict[str, Any]], tokenizer_directory: Path, tmp_path: Path
) -> None:
    shutil.copytree(tokenizer_directory, tmp_path / "tokenizer")
    (tmp_path / "marked.jinja").write_bytes(LLAMA3_TRAINING.read_bytes())
    changes = {
        "sources": [source for source in mixed_sources if source["domain"] == "chat"],
        "row_sets": [{"path": "chat", "domain": "chat", "seq_length": 256}],
        "tokenizer": {"path": str(tmp_path / "tokenizer"), "chat_template": str(tmp_path / "marked.jinja")},
    }
    prepare(mixed_config(tmp_path / "data", **changes))
    prepare(mixed_config(tmp_path / "data", **changes))
    with (tmp_path / file).open("a") as changed:
        changed.write("\n")
    with pytest.raises(DataError, match="holds data of another configuration, tokenizer or state of the sources"):
        prepare(mixed_config(tmp_path / "data", **changes))


def test_a_directory_that_is_something_else_is_left_alone(mixed_config: Configure, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match="exists and is no complete data directory"):
        prepare(mixed_config(tmp_path))
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_two_runs_at_once_are_refused(mixed_config: Configure, tmp_path: Path) -> None:
    (tmp_path / ".data.partial").mkdir()
    with (tmp_path / ".data.partial" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DataError, match=r"another process is preparing it in .*\.data\.partial"):
            prepare(mixed_config(tmp_path / "data"))


def test_a_full_disk_says_what_to_do_and_keeps_what_is_finished(
    mixed_config: Configure, mixed_sources: list[dict[str, Any]], tmp_path: Path
) -> None:
    # The largest source last, so that there is something to keep.
    cfg = mixed_config(tmp_path / "data", sources=mixed_sources[::-1])
    described = tmp_path / "config.json"
    described.write_text(cfg.model_dump_json())

    def small_disk() -> None:
        # A file that grows beyond the limit fails as on a full disk, with "File too large".
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, resource.RLIM_INFINITY))

    command = [sys.executable, "-m", PROGRAM, str(described)]
    full = subprocess.run(command, capture_output=True, text=True, preexec_fn=small_disk)
    assert full.returncode == 1
    assert "has no space left (File too large;" in full.stderr
    assert "what was finished is kept. Free space and run the same command again" in full.stderr
    assert not (tmp_path / "data").exists() and list((tmp_path / ".data.partial" / "units").iterdir())
    prepare(cfg)
    prepare(mixed_config(tmp_path / "undisturbed", sources=mixed_sources[::-1]))
    assert_same_bytes(tmp_path / "undisturbed", tmp_path / "data")
