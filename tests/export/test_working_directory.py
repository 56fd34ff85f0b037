"""A run that was started with relative paths is exported, scored and followed from any other directory."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from nemo_prolong.config.schema import EvaluateConfig
from nemo_prolong.data.tokenizer import TextEncoder
from nemo_prolong.data.tokenizer.loading import load_tokenizer
from nemo_prolong.engine import open_megatron_scorer
from nemo_prolong.errors import CheckpointError, ExportError
from nemo_prolong.evaluate.request import require_model
from nemo_prolong.evaluate.run import evaluate
from nemo_prolong.export.model_card import read_lineage
from nemo_prolong.export.run import export
from nemo_prolong.export.serving.calibration import calibration_documents
from nemo_prolong.export.source import open_source
from nemo_prolong.records.checkpoint.manifest import checkpoint_directory
from nemo_prolong.records.run_directory import RunDirectory
from nemo_prolong.records.stage_manifest import StageManifest
from nemo_prolong.report.terminal.lineage import chain_of
from nemo_prolong.report.training.read import read_lineage as read_report
from nemo_prolong.stages.preflight import check_files
from nemo_prolong.stages.run import run_stage
from nemo_prolong.weights.hf_model import load_model
from tests.support.export_tools import export_config, write_tokenizer
from tests.support.fake_checkpoint import seal
from tests.support.tiny import tiny_config, write_data


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two stages that were started in one directory, with relative paths for everything."""
    project = tmp_path_factory.mktemp("project")
    write_data(project / "data")
    (project / "data" / "tokenizer" / "tokenizer.json").unlink()
    write_tokenizer(project / "data" / "tokenizer")
    sha256 = TextEncoder(project / "data" / "tokenizer", "tokenizers").sha256
    manifest = {"format": 2, "command": "python prepare", "tokenizer_sha256": sha256}
    (project / "data" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project)
        runs = Path("runs")
        run_stage(tiny_config(Path("data"), runs, name="base", train={"train_iters": 2}), [])
        child = {"stage": "stage1", "parent": "runs/base", "transition": "weights", "train": {"train_iters": 2}}
        run_stage(tiny_config(Path("data"), runs, name="child", **child), [])
    return project


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Another working directory, in which the relative paths name nothing."""
    directory = tmp_path / "elsewhere"
    directory.mkdir()
    monkeypatch.chdir(directory)
    return directory


@pytest.fixture
def child(project: Path) -> Path:
    return project / "runs" / "child"


@pytest.fixture
def moved(child: Path, tmp_path: Path) -> Path:
    """The run alone, on a machine without its data: what it was started in does not exist there."""
    run = tmp_path / "moved"
    shutil.copytree(child, run)
    for path in (run / "stage.json", *run.glob("checkpoints/*/model.json")):
        path.write_text(path.read_text().replace(str(child.parents[1]), "/no/such/project"))
    seal(checkpoint_directory(run, 2), 2)
    return run


def test_what_was_typed_and_where_is_recorded(project: Path, child: Path) -> None:
    manifest = StageManifest.read(child)
    assert (manifest.data.root, manifest.data.working_directory) == ("data", str(project))
    assert manifest.parent is not None
    assert (manifest.parent.path, manifest.parent.working_directory) == ("runs/base", str(project))


def test_a_run_is_exported_from_elsewhere(
    project: Path, child: Path, elsewhere: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    export(export_config(child, elsewhere / "hf"))
    assert (elsewhere / "hf" / "tokenizer.json").read_bytes() == (
        project / "data" / "tokenizer" / "tokenizer.json"
    ).read_bytes()
    assert "| base | nothing, random weights |" in (elsewhere / "hf" / "README.md").read_text()
    said = " ".join(capfd.readouterr().out.split())
    assert f"data/tokenizer is not below {elsewhere}; {project}/data/tokenizer is used" in said


def test_a_run_is_evaluated_from_elsewhere(project: Path, child: Path, elsewhere: Path) -> None:
    cfg = EvaluateConfig(
        models=[str(child)],
        rows=str(project / "data" / "rows"),
        output=str(elsewhere / "eval"),
        position_buckets=[32, 64],
        max_documents=2,
        recall_lengths=[128],
        recall_samples=1,
    )
    assert evaluate(cfg) == [elsewhere / "eval"]
    assert len(open_megatron_scorer(child).tokenizer) == 512


def test_the_chain_of_a_run_is_followed_from_elsewhere(child: Path, elsewhere: Path) -> None:
    assert [step.manifest and step.manifest.stage for step in chain_of(str(child))] == ["base", "stage1"]
    assert [manifest.stage for manifest in read_lineage(StageManifest.read(child))] == ["base", "stage1"]


def test_a_report_reads_the_data_manifest_from_elsewhere(child: Path, elsewhere: Path) -> None:
    [stage] = read_report([str(child)], None).stages
    assert stage.data_manifest["command"] == "python prepare"


def test_calibration_finds_the_rows_from_elsewhere(child: Path, elsewhere: Path) -> None:
    assert calibration_documents(StageManifest.read(child), 1, 8)


def test_a_stage_starts_from_a_run_of_another_directory(project: Path, child: Path, elsewhere: Path) -> None:
    cfg = tiny_config(project / "data", elsewhere / "runs", stage="stage2", parent=str(child), transition="weights")
    start = check_files(cfg, RunDirectory(cfg.run_dir))
    assert start.parent_checkpoint is not None
    assert start.parent is not None and Path(start.parent.data.location) == project / "data"


def test_what_exists_here_is_used_before_what_exists_there(
    project: Path, child: Path, elsewhere: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(project / "data" / "tokenizer", elsewhere / "data" / "tokenizer")
    assert open_source(str(child)).tokenizer == Path("data/tokenizer")
    assert "is used" not in capfd.readouterr().out


def test_another_tokenizer_of_the_same_name_here_is_refused(project: Path, child: Path, elsewhere: Path) -> None:
    shutil.copytree(project / "data" / "tokenizer", elsewhere / "data" / "tokenizer")
    file = elsewhere / "data" / "tokenizer" / "tokenizer.json"
    file.write_text(file.read_text().replace("<|eot_id|>", "<|end_it|>"))
    for refused, open_run in ((ExportError, open_source), (CheckpointError, require_model)):
        with pytest.raises(refused) as error:
            open_run(str(child))
        assert "data/tokenizer holds another tokenizer (SHA-256 " in str(error.value)
        assert f"run the command where the run was started ({project})." in str(error.value)


# Where nothing is found, nobody asks the Hub.


def test_an_export_without_its_tokenizer_is_refused(moved: Path, elsewhere: Path) -> None:
    with pytest.raises(ExportError) as refused:
        export(export_config(moved, elsewhere / "hf"))
    assert str(refused.value) == (
        f"run={moved}: the tokenizer that it was trained with is not in data/tokenizer, seen from {elsewhere}. "
        "Put the data directory back where it was, or run the command where the run was started (/no/such/project)."
    )


def test_an_evaluation_without_the_tokenizer_is_refused_at_once(moved: Path, elsewhere: Path) -> None:
    with pytest.raises(CheckpointError) as refused:
        require_model(str(moved))
    assert f"the tokenizer that it was trained with is not in data/tokenizer, seen from {elsewhere}." in str(
        refused.value
    )


def test_a_scorer_without_the_tokenizer_says_where_it_looked(moved: Path, elsewhere: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no directory data/tokenizer, seen from "):
        _ = open_megatron_scorer(moved).tokenizer


@pytest.mark.parametrize("load", [load_tokenizer, lambda directory: load_model(directory, "auto")])
def test_a_missing_directory_is_not_taken_for_a_name_on_the_hub(
    load: object, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert callable(load)
    with pytest.raises(FileNotFoundError, match=f"there is no directory gpt2/model, seen from {os.getcwd()}"):
        load(Path("gpt2/model"))
