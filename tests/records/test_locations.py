"""A recorded path is found from here, or from where its run was started."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from nemo_prolong.records.checkpoint.model_description import ModelDescription
from nemo_prolong.records.locations import recorded_path
from nemo_prolong.records.stage_manifest import DataRecord, ParentRecord


@pytest.fixture(autouse=True)
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the run was started, with ``runs/base`` and ``data`` in it. The test runs in another directory."""
    (tmp_path / "started" / "runs" / "base").mkdir(parents=True)
    (tmp_path / "started" / "data").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "started"


def test_what_is_not_here_is_found_where_the_run_was_started(started: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="nemo_prolong"):
        assert recorded_path("data", str(started)) == started / "data"
    assert f"data is not below {Path.cwd()}; {started / 'data'} is used, where the run was started" in caplog.text


def test_what_is_here_is_used(started: Path) -> None:
    Path("data").mkdir()
    assert recorded_path("data", str(started)) == Path("data")


def test_what_is_nowhere_is_named_as_it_was_typed(started: Path) -> None:
    assert recorded_path("gone", str(started)) == Path("gone")
    assert recorded_path("gone", "/no/such/directory") == Path("gone")


def test_absolute_paths_and_older_files_are_taken_as_they_are(started: Path) -> None:
    assert recorded_path("/data", str(started)) == Path("/data")
    assert recorded_path("data", None) == Path("data")


def test_an_address_is_no_path(started: Path) -> None:
    record = DataRecord(
        root="s3://data", tokenizer="t", mixture=[], manifest_sha256=None, working_directory=str(started)
    )
    assert record.location == "s3://data"
    assert record.tokenizer_directory == Path("t")


def test_the_tokenizer_of_a_directory_lies_below_it(started: Path) -> None:
    record = DataRecord(root="data", tokenizer="t", mixture=[], manifest_sha256=None, working_directory=str(started))
    assert record.tokenizer_directory == started / "data" / "t"
    model = ModelDescription(
        step=1, model={}, seq_length=64, tokenizer="data", compute="fp32", working_directory=str(started)
    )
    assert model.tokenizer_directory == started / "data"


def test_a_directory_of_hugging_face_is_found_without_its_prefix(started: Path) -> None:
    record = ParentRecord(path="hf:runs/base", step=0, transition="weights", working_directory=str(started))
    assert record.directory == started / "runs" / "base"
