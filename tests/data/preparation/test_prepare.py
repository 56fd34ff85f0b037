"""A folder of every local format becomes a data directory: what is in it, and that nothing is lost."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from nemo_prolong.config.schema import MixtureEntry
from nemo_prolong.config.schema.prepare import PrepareConfig
from nemo_prolong.data.dataset import PackedRowDataset
from nemo_prolong.data.mds import MdsReader, MdsWriter
from nemo_prolong.data.preparation.manifest import row_set_sha256
from nemo_prolong.data.preparation.run import prepare
from nemo_prolong.errors import DataError
from nemo_prolong.records.data_manifest import ShardFacts
from nemo_prolong.records.row_origin import ORIGIN
from tests.support.mixed import ROW_SETS

Configure = Callable[..., PrepareConfig]


def manifest_of(output: Path) -> dict[str, Any]:
    return json.loads((output / "manifest.json").read_text())


def rows_of(output: Path, row_set: str) -> list[dict[str, Any]]:
    reader = MdsReader(output / row_set)
    return [reader[number] for number in range(len(reader))]


def test_the_directory_holds_what_its_manifest_describes(prepared: Path) -> None:
    manifest = manifest_of(prepared)
    assert sorted(path.name for path in prepared.iterdir()) == sorted(
        ["manifest.json", "samples.json", "tokenizer", *(row_set["path"] for row_set in ROW_SETS)]
    )
    assert (manifest["format"], manifest["tokenizer"], manifest["vocab_size"]) == (2, "tokenizer", 300)
    assert (manifest["bos_token"], manifest["eos_token"]) == ("<|begin_of_text|>", "<|end_of_text|>")
    for path, entry in manifest["row_sets"].items():
        rows = rows_of(prepared, path)
        assert entry["rows"] == len(rows) > 0
        assert entry["tokens"] == sum(len(row["input_ids"]) for row in rows)
        assert entry["documents"] == sum(len(row["indices"]) for row in rows)
        assert all(int(row["length"]) == len(row["input_ids"]) for row in rows)
        shards = {name: ShardFacts(**shard) for name, shard in entry["shards"].items()}
        assert entry["sha256"] == row_set_sha256((prepared / path / "index.json").read_bytes(), shards)
        spans = np.concatenate([np.diff(row["indices"].astype(np.int64)) for row in rows])
        assert entry["sum_squared_lengths"] == int((spans**2).sum())
        assert entry["fill"] == pytest.approx(entry["tokens"] / (len(rows) * entry["seq_length"]), abs=1e-6)


def test_every_token_is_in_a_row_or_dropped_for_a_reason(prepared: Path) -> None:
    manifest = manifest_of(prepared)
    for path, entry in manifest["row_sets"].items():
        assert entry["input_tokens"] == entry["tokens"] + sum(entry["dropped_tokens"].values()), path
        assert min(entry["dropped_tokens"].values()) >= 0
    for path in ("web-128", "web-fit-512", "code-512", "chat-256"):
        entry = manifest["row_sets"][path]
        assert entry["input_tokens"] == manifest["domains"][entry["domain"]]["train"]["tokens"], path
    both = [manifest["row_sets"][path]["input_tokens"] for path in ("books-256", "books-64-in-256")]
    assert sum(both) == manifest["domains"]["books"]["train"]["tokens"]


def test_documents_come_back_from_the_rows_token_by_token(
    mixed_config: Configure, mixed_sources: list[dict[str, Any]], tokenizer_directory: Path, tmp_path: Path
) -> None:
    row_sets = [{"path": "web", "domain": "web", "seq_length": 8}]
    web = [source for source in mixed_sources if source["domain"] == "web" and "notes" in source["path"]]
    prepare(mixed_config(tmp_path / "data", sources=web, row_sets=row_sets, validation_fraction=0.0, shuffle=False))
    tokenizer = Tokenizer.from_file(str(tokenizer_directory / "tokenizer.json"))
    bos, eos = tokenizer.token_to_id("<|begin_of_text|>"), tokenizer.token_to_id("<|end_of_text|>")
    notes = sorted(Path(web[0]["path"]).rglob("*.md"))
    wanted = [
        token
        for note in notes
        for token in [bos, *tokenizer.encode(note.read_text(), add_special_tokens=False).ids, eos]
    ]
    packed = np.concatenate([row["input_ids"] for row in rows_of(tmp_path / "data", "web")])
    assert len(wanted) - len(packed) == manifest_of(tmp_path / "data")["row_sets"]["web"]["dropped_tokens"]["last_row"]
    assert packed.tolist() == wanted[: len(packed)] and len(packed) > 1000


def test_shards_written_one_by_one_are_the_sequential_ones(prepared: Path, tmp_path: Path) -> None:
    shards = 0
    for path in ("books-64-in-256", "web-128", "web-fit-512", "chat-256"):
        with MdsWriter(tmp_path / path, MdsReader(prepared / path).columns, 20_000) as writer:
            for row in rows_of(prepared, path):
                writer.write(row)
        names = sorted(file.name for file in (prepared / path).iterdir() if file.name != ORIGIN)
        assert names == sorted(file.name for file in (tmp_path / path).iterdir())
        shards += len(names) - 1
        for name in names:
            assert (prepared / path / name).read_bytes() == (tmp_path / path / name).read_bytes()
    assert shards > 8


def test_bos_stands_at_true_starts_only(prepared: Path) -> None:
    bos = Tokenizer.from_file(str(prepared / "tokenizer" / "tokenizer.json")).token_to_id("<|begin_of_text|>")
    pieces = [row["input_ids"] for row in rows_of(prepared, "books-256")]
    starts = sum(int(piece[0] == bos) for piece in pieces)
    assert 0 < starts < len(pieces) and not any((piece[1:] == bos).any() for piece in pieces)


def test_row_sets_that_cut_the_same_documents_share_no_text(prepared: Path) -> None:
    quarters = range(0, 256, 64)
    long = {bytes(row["input_ids"][q : q + 64]) for row in rows_of(prepared, "books-256") for q in quarters}
    assert len(long) > 20
    for row in rows_of(prepared, "books-64-in-256"):
        assert row["indices"].tolist() == [[0, 64], [64, 128], [128, 192], [192, 256]]
        assert not any(bytes(row["input_ids"][q : q + 64]) in long for q in quarters)


def test_chat_rows_begin_with_a_conversation(prepared: Path) -> None:
    tokenizer = Tokenizer.from_file(str(prepared / "tokenizer" / "tokenizer.json"))
    rows = PackedRowDataset(prepared, [MixtureEntry(path="chat-256", proportion=1.0)], 256, 0, 6, True, 300)
    for index in range(6):
        row = rows[index]
        assert tokenizer.id_to_token(int(row.tokens[0])) == "<|begin_of_text|>"
        assert 0 < row.loss_mask.sum() < 256
        targets = row.labels[row.loss_mask == 1].tolist()
        assert "user" not in tokenizer.decode(targets) and tokenizer.token_to_id("<|eot_id|>") in targets


def test_best_fit_cuts_no_document_that_fits_in_a_row(prepared: Path) -> None:
    tokenizer = Tokenizer.from_file(str(prepared / "tokenizer" / "tokenizer.json"))
    bos, eos = tokenizer.token_to_id("<|begin_of_text|>"), tokenizer.token_to_id("<|end_of_text|>")
    cut = 0
    for row in rows_of(prepared, "web-fit-512"):
        assert len(row["input_ids"]) <= 512
        for start, end in row["indices"].tolist():
            whole = row["input_ids"][start] == bos and row["input_ids"][end - 1] == eos
            cut += int(not whole and end - start not in (100, 1, 155, 512))  # spans of packed rows, full-row pieces
    longer = manifest_of(prepared)["domains"]["web"]["train"]["length_histogram"]["documents"][9:]
    assert cut <= sum(longer)


def test_the_manifest_names_every_source_file_with_its_hash(
    prepared: Path, mixed_sources: list[dict[str, Any]]
) -> None:
    sources = manifest_of(prepared)["sources"]
    assert [source["path"] for source in sources] == [source["path"] for source in mixed_sources]
    assert [len(source["files"]) for source in sources][:4] == [1, 1, 1, 1]
    assert all(len(file["sha256"]) == 64 for source in sources for file in source["files"])
    notes = next(source for source in sources if source["path"].endswith("notes"))
    assert notes["documents"] == len(notes["files"]) == 8 and notes["tokens"] > 8 * 100


def test_groups_are_held_out_in_all_row_sets_at_once(
    mixed_config: Configure, mixed_sources: list[dict[str, Any]], tmp_path: Path
) -> None:
    row_sets = [
        {"path": split, "domain": "code", "seq_length": 64, "split": split} for split in ("train", "validation")
    ]
    code = [source for source in mixed_sources if source["domain"] == "code"]
    manifest = prepare(mixed_config(tmp_path / "data", sources=code, row_sets=row_sets, validation_fraction=0.5))
    found = {split: manifest.domains["code"][split].documents for split in ("train", "validation")}
    assert sum(found.values()) == 6 and min(found.values()) > 0
    rows = {split: {bytes(r["input_ids"]) for r in rows_of(tmp_path / "data", split)} for split in found}
    assert rows["train"].isdisjoint(rows["validation"])


def test_samples_show_rows_of_every_row_set(prepared: Path) -> None:
    samples = json.loads((prepared / "samples.json").read_text())["row_sets"]
    assert set(samples) == {row_set["path"] for row_set in ROW_SETS}
    assert "<|begin_of_text|>" in json.dumps(samples["web-128"])
    assert samples["chat-256"][0]["masked_text"] is not None and samples["web-128"][0]["masked_text"] is None


def test_what_the_stages_take_is_in_the_manifest(mixed_config: Configure, tmp_path: Path) -> None:
    mixture = [{"path": "web-128", "proportion": 0.75}, {"path": "web-more-128", "proportion": 0.25}]
    data = {"root": "data", "tokenizer": "tokenizer", "mixture": mixture}
    row_sets = [{"path": path["path"], "domain": "web", "seq_length": 128} for path in mixture]
    sources = [source for source in mixed_config(tmp_path).sources if source.domain == "web"]
    cfg = mixed_config(
        tmp_path / "data", sources=sources, row_sets=row_sets, stages={"stage1": {"data": data, "tokens": 128 * 400}}
    )
    facts = prepare(cfg).stages["stage1"]
    assert {path: taken.rows_taken for path, taken in facts.row_sets.items()} == {"web-128": 300, "web-more-128": 100}
    rows = manifest_of(tmp_path / "data")["row_sets"]["web-128"]["rows"]
    assert facts.row_sets["web-128"].epochs == pytest.approx(300 / rows, abs=1e-4)


def test_too_little_text_is_refused_by_the_row_set(mixed_config: Configure, tmp_path: Path) -> None:
    row_sets = [*ROW_SETS, {"path": "huge", "domain": "web", "seq_length": "1M", "split": "validation"}]
    with pytest.raises(
        DataError, match=r"row set huge: the validation documents of web do not fill one row of 1048576"
    ):
        prepare(mixed_config(tmp_path / "data", row_sets=row_sets))
    assert not (tmp_path / "data").exists()


def test_rows_of_two_domains_come_in_turns(prepared: Path) -> None:
    counts = Counter(row["domain"] for row in rows_of(prepared, "validation-64"))
    assert set(counts) == {"books", "web"}
    assert [row["domain"] for row in rows_of(prepared, "validation-64")[:4]] == ["books", "web"] * 2
