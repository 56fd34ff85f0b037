import dataclasses
import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import fsspec
import numpy as np
import pytest

from nemo_prolong.config.schema import EvaluateConfig
from nemo_prolong.data.mds import MdsWriter
from nemo_prolong.data.tokenizer import TextEncoder
from nemo_prolong.errors import CheckpointError, ConfigError, DataError
from nemo_prolong.evaluate.request import output_directories, require_model
from nemo_prolong.evaluate.run import evaluate
from nemo_prolong.records.checkpoint.model_description import ModelDescription
from nemo_prolong.records.data_manifest import DataManifestFile
from nemo_prolong.records.evaluation import evaluation_directory, state_of_checkpoint
from nemo_prolong.records.row_origin import RowOrigin
from nemo_prolong.stages.manifest import new_manifest
from tests.support.fake_checkpoint import seal, write_checkpoint
from tests.support.stored_rows import write_data
from tests.support.tiny import tiny_config


def config(models, data, **changes):
    values = {
        "models": models,
        "rows": str(data),
        "position_buckets": [16, 64],
        "max_documents": 3,
        "recall_lengths": [200],
        "recall_samples": 2,
    }
    return EvaluateConfig(**{**values, **changes})


def test_both_results_lie_beside_the_model_and_can_be_repeated(hf_directory, data_directory, caplog):
    cfg = config([f"hf:{hf_directory}"], data_directory)
    caplog.set_level(logging.INFO, "nemo_prolong.evaluate")
    (directory,) = evaluate(cfg)

    assert directory == hf_directory.with_name("hf_eval") == evaluation_directory(f"hf:{hf_directory}")
    assert sorted(path.name for path in directory.iterdir()) == ["evaluate.log", "perplexity.json", "recall.json"]
    perplexity = json.loads((directory / "perplexity.json").read_text())
    recall = json.loads((directory / "recall.json").read_text())
    for result, task in ((perplexity, "perplexity"), (recall, "recall")):
        assert (result["task"], result["model"], result["through"]) == (task, f"hf:{hf_directory}", "transformers")
        assert EvaluateConfig(**result["settings"]) == cfg
        assert result["seconds"] > 0
    assert perplexity["data"] == str(data_directory) and perplexity["documents"] == 3
    assert [bucket["end"] for bucket in perplexity["buckets"]] == [16, 64]
    assert [entry["length"] for entry in recall["lengths"]] == [200]
    assert f"hf:{hf_directory}: perplexity up to position 16 " in caplog.text
    assert f"hf:{hf_directory}: recall at 200 0% (loss " in caplog.text


def test_results_of_one_model_go_straight_into_the_output(tmp_path):
    cfg = config(["runs/a"], "d", output=str(tmp_path / "out"))
    assert output_directories(cfg) == {"runs/a": tmp_path / "out"}


def test_results_of_several_models_go_into_a_folder_each(tmp_path):
    cfg = config(["runs/a", "hf:export/hf"], "d", output=str(tmp_path))
    assert output_directories(cfg) == {"runs/a": tmp_path / "a", "hf:export/hf": tmp_path / "hf"}


def test_models_that_would_overwrite_each_other_are_refused(tmp_path):
    cfg = config(["x/sft", "y/sft"], "d", output=str(tmp_path))
    with pytest.raises(ConfigError, match=r"output=.*same directory name.*Leave output unset"):
        output_directories(cfg)


def test_buckets_that_do_not_ascend_are_refused(data_directory, hf_directory):
    cfg = config([f"hf:{hf_directory}"], data_directory, position_buckets=[64, 16, 64])
    with pytest.raises(ConfigError, match=r"position_buckets=\[64, 16, 64\].*position_buckets=\[16, 64\]"):
        evaluate(cfg)


def test_missing_data_is_refused_before_a_model_is_loaded(hf_directory, tmp_path):
    with pytest.raises(DataError, match=r"rows=.*nowhere: The directory does not exist.*prepare_data"):
        evaluate(config([f"hf:{hf_directory}"], tmp_path / "nowhere"))


def test_rows_without_indices_are_evaluated_as_one_document_each(hf_directory, tmp_path):
    with MdsWriter(tmp_path / "rows", {"input_ids": "ndarray:uint32", "domain": "str"}) as writer:
        for _ in range(2):
            writer.write({"input_ids": np.arange(20, dtype=np.uint32), "domain": "d"})
    (directory,) = evaluate(config([f"hf:{hf_directory}"], tmp_path / "rows", output=str(tmp_path / "out")))
    perplexity = json.loads((directory / "perplexity.json").read_text())
    assert perplexity["documents"] == 2 and sum(bucket["tokens"] for bucket in perplexity["buckets"]) == 2 * 19


def test_rows_of_another_tokenizer_are_refused_before_any_model_loads(hf_directory, data_directory, tmp_path):
    RowOrigin(tokenizer="models/other", tokenizer_sha256="0" * 64, vocab_size=320).write(data_directory)
    with pytest.raises(DataError) as caught:
        evaluate(config([f"hf:{hf_directory}"], data_directory, output=str(tmp_path / "out")))
    assert str(caught.value).startswith(
        f"rows={data_directory}: the rows were made with models/other of 320 tokens (SHA-256 000000000000), as "
        f"{data_directory}/origin.json says, and not with that of hf:{hf_directory} ("
    )
    assert not (tmp_path / "out").exists()
    own = TextEncoder(hf_directory, "tokenizers").sha256
    RowOrigin(tokenizer_sha256=own).write(data_directory)
    assert evaluate(config([f"hf:{hf_directory}"], data_directory, output=str(tmp_path / "out")))


def test_a_run_whose_tokenizer_was_exchanged_is_refused(tmp_path, data_directory, hf_directory):
    root = write_data(tmp_path / "data")
    shutil.copyfile(hf_directory / "tokenizer.json", root / "tokenizer" / "tokenizer.json")
    own = TextEncoder(hf_directory, "tokenizers").sha256
    manifest = DataManifestFile("manifest.json", json.dumps({"tokenizer_sha256": own}).encode())
    cfg = tiny_config(root, tmp_path / "runs")
    run = Path(cfg.run_dir)
    new_manifest(cfg, None, None, "python scripts/train.py", 1, manifest).write(run)
    checkpoint = write_checkpoint(run, 4)
    (checkpoint / "model.json").write_text(json.dumps(dataclasses.asdict(ModelDescription.of_run(cfg, 4))))
    seal(checkpoint, 4)
    assert require_model(str(run)) == (root / "tokenizer", state_of_checkpoint(checkpoint))
    write_data(tmp_path / "other")
    shutil.copyfile(tmp_path / "other/tokenizer/tokenizer.json", root / "tokenizer" / "tokenizer.json")
    with pytest.raises(CheckpointError, match=rf"models={run}: {root}/tokenizer holds another tokenizer .*{own[:12]}"):
        evaluate(config([str(run)], data_directory))


def test_rows_may_lie_at_an_address(hf_directory, data_directory, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fsspec.filesystem("memory").put(str(data_directory), "/evaluated/rows", recursive=True)
    (directory,) = evaluate(config([f"hf:{hf_directory}"], "memory://evaluated/rows", output=str(tmp_path / "out")))
    assert json.loads((directory / "perplexity.json").read_text())["documents"] == 3


def test_a_data_directory_is_refused_with_a_row_set_to_name(hf_directory, tmp_path):
    data = write_data(tmp_path / "data")
    with pytest.raises(DataError, match=rf"rows={data}: is a data directory.* such as {data}/docs-19\."):
        evaluate(config([f"hf:{hf_directory}"], data))


def test_a_missing_model_is_refused_before_any_is_evaluated(hf_directory, data_directory, tmp_path):
    with pytest.raises(CheckpointError, match=r"models=runs/none: The directory does not exist"):
        evaluate(config([f"hf:{hf_directory}", "runs/none"], data_directory, output=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_a_hugging_face_directory_needs_its_prefix(hf_directory, data_directory):
    with pytest.raises(CheckpointError, match=rf"not a run\. Write models=\[hf:{hf_directory}\]"):
        evaluate(config([str(hf_directory)], data_directory))


def test_a_run_with_the_prefix_is_told_the_right_spelling(tmp_path, data_directory):
    (tmp_path / "stage.json").write_text("{}")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=rf"not a Hugging Face directory\. Write models=\[{tmp_path}\]"):
        evaluate(config([f"hf:{tmp_path}"], data_directory))


def test_a_run_without_a_checkpoint_is_refused_early(tmp_path, data_directory):
    (tmp_path / "stage.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"The run has no complete checkpoint\. Train it until"):
        evaluate(config([str(tmp_path)], data_directory))


def test_a_directory_that_is_no_model_at_all_is_refused(tmp_path, data_directory):
    with pytest.raises(CheckpointError, match=r"neither a stage\.json .* nor a config\.json"):
        evaluate(config([str(tmp_path)], data_directory))


@pytest.mark.parametrize(
    ("module", "expected", "absent"),
    [("run", "numpy", "torch"), ("transformers_scorer", "torch", "megatron")],
)
def test_only_what_is_needed_is_imported(module, expected, absent):
    code = f"import sys, nemo_prolong.evaluate.{module}; print(sorted(sys.modules))"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert f"'{expected}'" in modules and f"'{absent}'" not in modules
