from __future__ import annotations

from pathlib import Path

import pytest

from nemo_prolong.data.mds import MdsReader, MdsWriter
from nemo_prolong.errors import DataError
from tests.support.mds_examples import SMALL_COLUMNS, numbered_row


def test_a_failed_writer_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="stop"), MdsWriter(tmp_path / "rows", SMALL_COLUMNS) as writer:
        writer.write(numbered_row(1))
        raise RuntimeError("stop")
    assert list(tmp_path.iterdir()) == []


def test_a_row_that_does_not_fit_leaves_nothing_behind(tmp_path: Path) -> None:
    with (
        pytest.raises(DataError, match=r"columns=\['domain'\]: a row has exactly the columns"),
        MdsWriter(tmp_path / "rows", SMALL_COLUMNS) as writer,
    ):
        writer.write({"domain": "x"})
    assert list(tmp_path.iterdir()) == []


def test_a_directory_appears_with_its_last_row_and_leftovers_go(
    tmp_path: Path,
) -> None:
    leftover = tmp_path / ".rows.partial" / "shard.00007.mds"
    leftover.parent.mkdir()
    leftover.write_bytes(b"half")
    with MdsWriter(tmp_path / "rows", SMALL_COLUMNS) as writer:
        writer.write(numbered_row(1))
        assert not (tmp_path / "rows").exists()
    assert sorted(path.name for path in (tmp_path / "rows").iterdir()) == ["index.json", "shard.00000.mds"]
    assert [path.name for path in tmp_path.iterdir()] == ["rows"]


def test_a_directory_that_exists_is_not_written_into(many_shards: Path) -> None:
    with pytest.raises(DataError, match="rows: exists; shards are never added"):
        MdsWriter(many_shards, SMALL_COLUMNS)


def test_a_row_larger_than_a_shard_gets_one_of_its_own(tmp_path: Path) -> None:
    with MdsWriter(tmp_path / "rows", SMALL_COLUMNS, shard_bytes=1) as writer:
        for number in range(3):
            writer.write(numbered_row(number))
    reader = MdsReader(tmp_path / "rows")
    assert [shard.rows for shard in reader.shards] == [1, 1, 1]
    assert reader[2]["domain"] == "row 2"


def test_a_directory_without_rows_is_read_as_one(tmp_path: Path) -> None:
    with MdsWriter(tmp_path / "rows", SMALL_COLUMNS):
        pass
    reader = MdsReader(tmp_path / "rows")
    reader.require_columns("input_ids")
    assert (len(reader), reader.columns, list(reader.verify())) == (0, {}, [])
