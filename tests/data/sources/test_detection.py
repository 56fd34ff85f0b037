"""``format=auto``: what is there decides, and two answers are none."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nemo_prolong.config.schema.prepare import SourceConfig, SourceFormat
from nemo_prolong.data.mds import MdsWriter
from nemo_prolong.data.sources import detect_format, plan_units
from nemo_prolong.errors import ConfigError, DataError


def _detect(path, **settings) -> str:
    return detect_format(SourceConfig(domain="d", path=str(path), **settings)).value


def _touch(root, *names) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a.jsonl"], "jsonl"),
        (["x/a.jsonl.zst", "x/b.jsonl.zst", "README.md", "LICENSE.txt"], "jsonl"),
        (["a.json.gz", ".cache/x.parquet"], "jsonl"),
        (["a.parquet", "README.md"], "parquet"),
        (["data/train-00000-of-00002.parquet", "README.md"], "huggingface"),
        (["default/train/0000.parquet"], "huggingface"),
        (["a.md", "b/c.rst", "image.png"], "text"),
        (["README.md"], "text"),
        (["state.json", "data-00000-of-00001.arrow"], "huggingface"),
        (["dataset_dict.json", "train/state.json"], "huggingface"),
        (["one/.git/HEAD", "one/a.py", "two/b.json"], "repositories"),
    ],
)
def test_the_files_tell_the_format(tmp_path, names, expected):
    _touch(tmp_path, *names)
    assert _detect(tmp_path) == expected


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["a.jsonl", "b.parquet", "c.parquet"], "could be jsonl or parquet; it holds 2 x .parquet, 1 x .jsonl."),
        (["a.jsonl", "notes.md"], "could be jsonl or text; it holds 1 x .jsonl, 1 x .md."),
        (["a/x.py", "a/readme.md"], "could be repositories; it holds 1 x .md, 1 x .py."),
        (["a.csv", "b.csv", "noend"], "is of no known format; it holds 2 x .csv, 1 x no ending."),
    ],
)
def test_several_formats_or_none_are_refused(tmp_path, names, said):
    _touch(tmp_path, *names)
    with pytest.raises(ConfigError) as caught:
        _detect(tmp_path)
    assert caught.value.what == f"path={tmp_path}, format=auto"
    assert caught.value.rule == said
    for format_ in SourceFormat:
        assert (format_.value in caught.value.remedy) == (format_ is not SourceFormat.AUTO)


def test_include_decides_between_formats(tmp_path):
    _touch(tmp_path, "a.jsonl", "b.parquet")
    assert _detect(tmp_path, include=["*.jsonl"]) == "jsonl"


def test_single_files_and_globs_are_told_by_their_names(tmp_path):
    _touch(tmp_path, "a.jsonl", "b.parquet", "c.txt")
    assert _detect(tmp_path / "a.jsonl") == "jsonl"
    assert _detect(tmp_path / "*.parquet") == "parquet"
    assert _detect(tmp_path / "c.txt") == "text"


@pytest.mark.parametrize("nested", [False, True])
def test_rows_with_spans_are_packed_and_others_tokenized(tmp_path, nested):
    ids = np.arange(3, dtype=np.uint32)
    for name, extra in (("packed", {"indices": np.array([[0, 3]], np.uint32)}), ("tokenized", {})):
        row = {"input_ids": ids, **extra}
        directory = tmp_path / name / "part" if nested else tmp_path / name
        with MdsWriter(directory, dict.fromkeys(row, "ndarray:uint32")) as writer:
            writer.write(row)
        assert _detect(tmp_path / name) == f"{name}_mds"


def test_auto_plans_and_reads_what_it_finds(tmp_path, read):
    pq.write_table(pa.table({"text": ["one"]}), tmp_path / "a.parquet")
    assert read(tmp_path).texts == ["one"]


def test_nothing_there_is_refused(tmp_path):
    with pytest.raises(DataError, match="nowhere"):
        _detect(tmp_path / "nowhere")
    with pytest.raises(DataError, match="holds no file"):
        _detect(tmp_path)
    with pytest.raises(ConfigError, match="has no path"):
        _detect("")


def test_an_installation_is_not_read_here():
    with pytest.raises(AssertionError, match="installation is not read from files"):
        plan_units(SourceConfig(domain="d", format="installation"))
