from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from nemo_prolong.config.schema import MixtureEntry
from nemo_prolong.data.dataset import PackedRowDataset, RowFormat, ValidationRowDataset, build_row, collate_rows
from nemo_prolong.data.mds import MdsWriter
from nemo_prolong.errors import ConfigError, DataError

COLUMNS = {"input_ids": "ndarray:uint32", "indices": "ndarray:uint32", "domain": "str", "length": "uint64"}
MIXTURE = [MixtureEntry(path="long", proportion=0.7), MixtureEntry(path="short", proportion=0.3)]


def stored_row(lengths: list[int], first_token: int = 1, **columns: Any) -> dict[str, Any]:
    """A row of documents of these lengths; tokens count up, so that any shift shows."""
    edges = np.cumsum([0, *lengths])
    return {
        "input_ids": np.arange(first_token, first_token + edges[-1]).astype(np.uint32),
        "indices": np.stack([edges[:-1], edges[1:]], axis=1).astype(np.uint32),
        "domain": "test",
        **columns,
    }


def write_rows(directory: Path, rows: list[dict[str, Any]]) -> None:
    columns = {**COLUMNS, "mask": "ndarray:uint8"} if rows and "mask" in rows[0] else COLUMNS
    with MdsWriter(directory, columns) as writer:
        for row in rows:
            writer.write({**row, "length": len(row["input_ids"])})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """``long``: 10 rows of one document; ``short``: 4 rows of four documents; 16 tokens each, every token once."""
    write_rows(tmp_path / "long", [stored_row([16], 16 * n, domain="long") for n in range(10)])
    write_rows(tmp_path / "short", [stored_row([1, 2, 3, 10], 1000 + 16 * n, domain="short") for n in range(4)])
    return tmp_path


@pytest.mark.parametrize(
    "lengths", [[16], [1, 15], [15, 1], [1] * 16, [2] * 8, [3, 5, 7, 1], [16 - 3, 3]], ids=lambda lengths: str(lengths)
)
def test_labels_stay_inside_their_document(lengths: list[int]) -> None:
    row = build_row(stored_row(lengths), RowFormat(16), "row")
    last_tokens = np.cumsum(lengths) - 1
    expected_labels = np.arange(2, 18)
    expected_labels[last_tokens] = 0
    assert row.labels.tolist() == expected_labels.tolist()
    assert row.loss_mask.tolist() == (expected_labels > 0).astype(float).tolist()
    assert row.position_ids.tolist() == [place for length in lengths for place in range(length)]
    assert row.cu_seqlens.tolist() == [0, *np.cumsum(lengths).tolist()]
    assert row.real_tokens == 16


def test_the_types_are_those_that_the_engine_expects() -> None:
    row = build_row(stored_row([7, 5]), RowFormat(16), "row")
    dtypes = {name: value.dtype for name, value in vars(row).items() if isinstance(value, torch.Tensor)}
    assert dtypes == {
        "tokens": torch.int64,
        "labels": torch.int64,
        "loss_mask": torch.float32,
        "position_ids": torch.int64,
        "cu_seqlens": torch.int32,
    }
    assert (type(row.domain), type(row.real_tokens)) == (str, int)


def test_a_short_row_is_padded_with_what_nothing_learns_from() -> None:
    row = build_row(stored_row([7, 5]), RowFormat(16), "row")
    assert row.cu_seqlens.tolist() == [0, 7, 12, 16]
    assert row.tokens[12:].tolist() == row.labels[11:].tolist()[:4] == [0] * 4
    assert row.loss_mask[11:].sum() == 0
    assert row.position_ids[12:].tolist() == [0, 1, 2, 3]
    assert row.real_tokens == 12


def test_a_row_without_indices_is_one_document() -> None:
    stored = stored_row([4, 12])
    del stored["indices"]
    assert build_row(stored, RowFormat(16), "row").cu_seqlens.tolist() == [0, 16]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=9), st.integers(0, 5), st.data())
def test_only_masked_tokens_are_targets_but_never_the_first(
    lengths: list[int], padding: int, data: st.DataObject
) -> None:
    total = sum(lengths)
    mask = np.array(data.draw(st.lists(st.integers(0, 1), min_size=total, max_size=total)), np.uint8)
    row = build_row(stored_row(lengths, mask=mask), RowFormat(total + padding, True), "row")
    starts = set(np.cumsum([0, *lengths]).tolist())
    targets = [i + 1 for i in range(total - 1) if mask[i + 1] and i + 1 not in starts]
    assert (torch.nonzero(row.loss_mask).flatten() + 1).tolist() == targets
    assert row.labels[row.loss_mask == 1].tolist() == [target + 1 for target in targets]
    assert row.labels[row.loss_mask == 0].sum() == 0


def test_a_mask_column_is_ignored_unless_asked_for() -> None:
    row = build_row(stored_row([16], mask=np.zeros(16, np.uint8)), RowFormat(16), "row")
    assert row.loss_mask.sum() == 15


def test_a_row_is_a_function_of_its_index_alone(root: Path) -> None:
    short = PackedRowDataset(root, MIXTURE, 16, seed=3, num_rows=20)
    long = PackedRowDataset(root, MIXTURE, 16, seed=3, num_rows=2000)
    backwards = [short[index].tokens for index in reversed(range(20))]
    for index in range(20):
        assert torch.equal(long[index].tokens, backwards[19 - index])
    assert len(long) == 2000


@pytest.mark.parametrize("index", [-1, 20])
def test_an_index_outside_the_stage_is_no_row(root: Path, index: int) -> None:
    with pytest.raises(IndexError, match=f"^row {index} of 20$"):
        PackedRowDataset(root, MIXTURE, 16, seed=3, num_rows=20)[index]


def test_a_row_of_the_stage_is_named_by_where_it_is_stored(root: Path) -> None:
    # As users write directories, with a slash at the end.
    dataset = PackedRowDataset(f"{root}/", MIXTURE, 16, seed=3, num_rows=20)
    for index in range(20):
        row = dataset[index]
        number = int(row.tokens[0]) // 16 if row.domain == "long" else (int(row.tokens[0]) - 1000) // 16
        assert dataset.place(index) == f"{root}/{row.domain} row {number}"


def test_the_mixture_and_its_epochs_are_kept(root: Path) -> None:
    dataset = PackedRowDataset(root, MIXTURE, 16, seed=3, num_rows=100)
    domains = [dataset[index].domain for index in range(100)]
    assert (domains.count("long"), domains.count("short")) == (70, 30)
    assert dataset.epochs() == {"long": 7.0, "short": 7.5}


def test_validation_goes_through_every_row_once(root: Path) -> None:
    dataset = ValidationRowDataset(root, ["long", "short"], 16)
    assert len(dataset) == 14
    firsts = [int(dataset[index].tokens[0]) for index in range(14)]
    assert firsts[:4] == [0, 1000, 16, 1016]
    assert sorted(firsts) == sorted([16 * n for n in range(10)] + [1000 + 16 * n for n in range(4)])


@pytest.mark.parametrize(("num_workers", "context"), [(0, None), (2, "fork"), (1, "spawn")])
def test_loader_processes_of_either_kind_give_the_same_batches(root: Path, num_workers: int, context: str) -> None:
    dataset = PackedRowDataset(root, MIXTURE, 16, seed=3, num_rows=12)
    expected = [dataset[index] for index in range(12)]
    loader = DataLoader(dataset, collate_fn=collate_rows, num_workers=num_workers, multiprocessing_context=context)
    batches = list(loader)
    assert [batch.domain for batch in batches] == [row.domain for row in expected]
    assert all(torch.equal(batch.tokens[0], row.tokens) for batch, row in zip(batches, expected, strict=True))


def test_a_batch_is_one_row_and_its_longest_document() -> None:
    batch = collate_rows([build_row(stored_row([3, 9, 4]), RowFormat(16), "row")])
    shapes = {name: tuple(value.shape) for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    assert shapes == {
        "tokens": (1, 16),
        "labels": (1, 16),
        "loss_mask": (1, 16),
        "position_ids": (1, 16),
        "cu_seqlens": (4,),
    }
    assert batch.max_seqlen == 9 and type(batch.max_seqlen) is int
    assert (batch.domain, batch.real_tokens) == ("test", 16)


def test_more_than_one_row_per_batch_is_refused() -> None:
    row = build_row(stored_row([16]), RowFormat(16), "row")
    with pytest.raises(ConfigError, match=r"a packed row already fills a forward pass. Use train.micro_batch_size=1"):
        collate_rows([row, row])


def test_rows_that_are_too_long_are_refused_at_once(root: Path) -> None:
    with pytest.raises(DataError, match=r"seq_length=8: .*long row 0 has 16 tokens. Set seq_length=16"):
        PackedRowDataset(root, MIXTURE, 8, seed=0, num_rows=1)


def test_rows_that_are_too_short_are_padded_with_a_warning(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="nemo_prolong"):
        ValidationRowDataset(root, ["long"], 32)
    assert "has rows of 16 tokens; each is padded to seq_length=32" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="nemo_prolong"):
        ValidationRowDataset(root, ["long"], 16)
    assert not caplog.text


def test_a_missing_directory_is_named(root: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere: has no index.json"):
        PackedRowDataset(root, [MixtureEntry(path="nowhere", proportion=1.0)], 16, seed=0, num_rows=1)


def test_a_slash_at_the_end_of_a_remote_root_is_not_doubled(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []

    def open_reader(directory: str, cache: str | None) -> None:
        opened.append(directory)
        raise DataError(directory, "is not read here.", "")

    monkeypatch.setattr("nemo_prolong.data.dataset.MdsReader", open_reader)
    with pytest.raises(DataError, match="is not read here"):
        ValidationRowDataset("s3://bucket/TAX/", ["long"], 16)
    assert opened == ["s3://bucket/TAX/long"]


def test_an_empty_row_set_is_refused(root: Path) -> None:
    write_rows(root / "empty", [])
    with pytest.raises(DataError, match=r"empty: has no rows. Prepare more text for it, or leave it out.$"):
        ValidationRowDataset(root, ["empty"], 16)


def test_token_ids_beyond_the_vocabulary_are_refused(root: Path) -> None:
    message = (
        r"short row 0: has token ids from 1000 to 1015, model.vocab_size is 1015. "
        r"Use the tokenizer of the model to prepare the data.$"
    )
    with pytest.raises(DataError, match=message):
        PackedRowDataset(root, MIXTURE, 16, seed=0, num_rows=1, vocab_size=1015)
    assert len(PackedRowDataset(root, MIXTURE, 16, seed=0, num_rows=1, vocab_size=1016)) == 1


def test_instruct_masks_without_a_mask_column_are_refused(root: Path) -> None:
    message = (
        r"data.apply_instruct_masks=true: .*long row 0 has no mask column. "
        r"Use chat rows, or set data.apply_instruct_masks=false.$"
    )
    with pytest.raises(DataError, match=message):
        PackedRowDataset(root, MIXTURE, 16, seed=0, num_rows=1, apply_instruct_masks=True)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"indices": np.array([[0, 8], [9, 16]])}, "has span 1 from 9 to 16, which leaves tokens from 8 to 9 to no"),
        ({"indices": np.array([[0, 9], [8, 16]])}, "has span 1 from 8 to 16, which begins before the end of the one"),
        ({"indices": np.array([[0, 8], [8, 17]])}, "has span 1 from 8 to 17, which leaves the row of 16 tokens"),
        ({"indices": np.array([[0, 8], [8, 8], [8, 16]])}, "has span 1 from 8 to 8, which holds no token"),
        ({"indices": np.array([[0, 8]])}, "has no span for its tokens from 8 to 16"),
        ({"indices": np.zeros((0, 2), int)}, r"has spans of shape \[0, 2\]"),
        ({"indices": np.array([0, 16])}, r"has spans of shape \[2\]"),
        ({"input_ids": np.zeros(16, np.float32)}, r"has input_ids of shape \[16\] and type float32, not integers"),
        ({"input_ids": np.zeros((4, 4), np.int32)}, r"has input_ids of shape \[4, 4\] and type int32, not integers"),
        ({"input_ids": np.full(16, -1, np.int32)}, "has token ids from -1 to -1"),
        ({"mask": np.ones(15, np.uint8)}, r"has a mask of shape \[15\] for 16 tokens"),
        ({"mask": np.full(16, 9, np.uint8)}, "has 9 in its mask, which is of 0 and 1"),
        ({"length": 15}, "says length=15 and has 16 tokens"),
    ],
)
def test_a_damaged_row_is_refused_by_name(columns: dict[str, Any], message: str) -> None:
    stored = {**stored_row([16], mask=np.ones(16, np.uint8)), **columns}
    with pytest.raises(DataError, match=f"here: {message}"):
        build_row(stored, RowFormat(16, apply_instruct_masks=True), "here")
