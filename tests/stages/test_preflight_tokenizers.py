"""A tokenizer that does not fit rows, model or parent is refused before training starts."""

from __future__ import annotations

import json
import shutil

import pytest

from nemo_prolong.data.tokenizer import TextEncoder, train_tokenizer
from nemo_prolong.errors import DataError
from nemo_prolong.records.data_manifest import DataManifestFile
from nemo_prolong.records.row_origin import RowOrigin
from nemo_prolong.stages.preflight import Start
from tests.support.preflight import refusal, start_of
from tests.support.tiny import write_plain_tokenizer

DATA = DataManifestFile("", None)
"""The rows of these tests have no manifest."""


def test_a_missing_tokenizer_is_refused_with_its_place(make_config, data_root):
    assert refusal(DataError, make_config(data={"tokenizer": "llama"})) == (
        f"data.tokenizer=llama: there is no tokenizer in {data_root}/llama. "
        f"Write it with: python scripts/prepare_data.py +exp=data/NAME output={data_root}"
    )


def test_a_directory_without_tokenizer_json_is_no_tokenizer(make_config, data_root):
    (data_root / "tokenizer" / "tokenizer.json").unlink()
    assert f"there is no tokenizer in {data_root}/tokenizer." in refusal(DataError, make_config())


def test_a_tokenizer_may_be_named_by_its_absolute_path(make_config, data_root, tmp_path):
    elsewhere = (data_root / "tokenizer").rename(tmp_path / "elsewhere")
    assert start_of(make_config(data={"tokenizer": str(elsewhere)})) == Start(DATA)


def test_a_row_set_of_another_tokenizer_is_refused_by_name(make_config, data_root):
    train_tokenizer(["window buffer token " * 400], 280, data_root / "tokenizer")
    own = TextEncoder(data_root / "tokenizer").sha256
    RowOrigin(tokenizer_sha256=own).write(data_root / "rows")
    assert start_of(make_config()) == Start(DATA)
    RowOrigin(tokenizer="models/other", tokenizer_sha256="f" * 64, vocab_size=300).write(data_root / "rows")
    message = f"data.mixture path=rows: the rows were made with models/other of 300 tokens (SHA-256 {'f' * 12}), as "
    assert message in refusal(DataError, make_config())
    validated = make_config(data={"validation": ["held-out"]})
    RowOrigin(tokenizer_sha256=own).write(data_root / "rows")
    shutil.copytree(data_root / "rows", data_root / "held-out")
    RowOrigin(tokenizer_sha256="f" * 64).write(data_root / "held-out")
    assert "data.validation=held-out: the rows were made with a tokenizer of their own" in refusal(DataError, validated)


def test_rows_of_another_tokenizer_than_the_parents_are_refused(make_config, make_run, make_child, data_root, tmp_path):
    train_tokenizer(["window buffer token " * 400], 280, data_root / "tokenizer")
    parent = make_run(make_config(), "complete", (4,))
    other = tmp_path / "other"
    shutil.copytree(data_root, other)
    child = make_child(parent, data={"root": str(other)})
    assert start_of(child).parent_record is not None
    shutil.rmtree(other / "tokenizer")
    train_tokenizer(["another text of words " * 400], 280, other / "tokenizer")
    message = refusal(DataError, child)
    assert f"tokens of {parent} have other ids in {other}/tokenizer: " in message
    assert "Prepare the data with the tokenizer of the model that the stage starts from." in message


def test_another_tokenizer_than_that_of_the_rows_is_refused(make_config, data_root):
    train_tokenizer(["the window of the buffer " * 20], 280, data_root / "tokenizer")
    made_with = TextEncoder(data_root / "tokenizer").sha256
    (data_root / "manifest.json").write_text(json.dumps({"tokenizer_sha256": made_with}))
    assert start_of(make_config()).data.tokenizer_sha256 == made_with
    (data_root / "manifest.json").write_text(json.dumps({"tokenizer_sha256": "0" * 64}))
    assert refusal(DataError, make_config()) == (
        f"data.tokenizer=tokenizer: the tokenizer in {data_root}/tokenizer is not the one that the rows in {data_root} "
        "were made with. Use the tokenizer of the data directory (data.tokenizer=tokenizer), or prepare the data again."
    )


def test_the_tokenizer_of_remote_rows_is_a_local_directory(make_config):
    assert refusal(DataError, make_config(data={"root": "s3://bucket/rows", "tokenizer": "nowhere"})) == (
        "data.tokenizer=nowhere: there is no tokenizer in nowhere. "
        "Copy the tokenizer to this machine and set data.tokenizer to its directory."
    )


@pytest.mark.parametrize(
    ("parent", "remedy"),
    [
        (None, "Set model.vocab_size=513."),
        (
            "hf:models/llama",
            "Set model.vocab_size=513: embedding and LM head get new rows, which start as the mean of the others.",
        ),
        (
            "runs/base",
            "Set model.vocab_size=513. A run's vocabulary is fixed, so export the parent "
            "(scripts/export.py run=runs/base output=DIR) and start with parent=hf:DIR transition=weights.",
        ),
    ],
)
def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(parent, remedy, make_config, make_child, data_root):
    write_plain_tokenizer(data_root / "tokenizer", pad_token="[PAD]")
    cfg = make_config() if parent is None else make_child(parent)
    for rank in (0, 1):
        assert refusal(DataError, cfg, rank) == (
            f"data.tokenizer=tokenizer: {data_root}/tokenizer: it has 513 tokens, the model's vocabulary 512. {remedy}"
        )


def test_a_larger_vocabulary_than_the_tokenizers_is_accepted(make_config, data_root):
    write_plain_tokenizer(data_root / "tokenizer", 300)
    assert start_of(make_config()) == Start(DATA)


def test_a_tokenizer_that_cannot_be_exported_is_refused(make_config, data_root):
    config = write_plain_tokenizer(data_root / "tokenizer", eos_token=None) / "tokenizer_config.json"
    assert refusal(DataError, make_config()) == (
        f"data.tokenizer=tokenizer: {data_root}/tokenizer: it has no eos_token. "
        f"Set eos_token in {config}, each to a token that it has."
    )


def test_a_run_that_has_begun_goes_on_with_its_tokenizer(make_config, make_run, data_root):
    make_run(make_config(), "running", (2,))
    write_plain_tokenizer(data_root / "tokenizer", eos_token=None)
    for rank in (0, 1):
        assert start_of(make_config(), rank).refused == ()
