"""What ``save_to_disk`` left of a data set is read as its library reads it, or refused."""

from __future__ import annotations

import json

import datasets
import pytest

from nemo_prolong.errors import DataError


@pytest.mark.parametrize("key", ["_indices_files", "_indices_data_files"])
def test_a_selection_of_rows_that_would_be_lost_is_refused(tmp_path, read, key):
    data = datasets.Dataset.from_dict({"text": ["one", "two"]})
    data.save_to_disk(str(tmp_path / "d"))
    state = json.loads((tmp_path / "d" / "state.json").read_text())
    (tmp_path / "d" / "state.json").write_text(json.dumps({**state, key: []}))
    assert read(tmp_path / "d", format="huggingface").texts == ["one", "two"]
    (tmp_path / "d" / "state.json").write_text(json.dumps({**state, key: [{"filename": "indices.arrow"}]}))
    with pytest.raises(DataError, match=rf"state\.json: selects rows by {key}, .* save flatten_indices\(\) of it"):
        read(tmp_path / "d", format="huggingface")


def test_files_beside_those_of_the_state_are_not_read(tmp_path, read):
    datasets.Dataset.from_dict({"text": ["one"]}).save_to_disk(str(tmp_path / "d"))
    datasets.Dataset.from_dict({"text": ["left over"]}).save_to_disk(str(tmp_path / "e"))
    (arrow,) = (tmp_path / "e").glob("*.arrow")
    arrow.rename(tmp_path / "d" / "data-00001-of-00002.arrow")
    assert read(tmp_path / "d", format="huggingface").texts == ["one"]


def test_two_data_sets_saved_into_one_directory_are_refused(tmp_path, read):
    data = datasets.Dataset.from_dict({"text": ["one"]})
    datasets.DatasetDict({"train": data}).save_to_disk(str(tmp_path / "d"))
    data.save_to_disk(str(tmp_path / "d"))
    with pytest.raises(DataError, match=r"has a state\.json and a dataset_dict\.json: two data sets were saved"):
        read(tmp_path / "d", format="huggingface")
