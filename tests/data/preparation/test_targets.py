"""Conversations of which packing leaves nothing to learn are no rows, and are counted."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemo_prolong.config.schema.prepare import PrepareConfig
from nemo_prolong.data.dataset import RowFormat, build_row
from nemo_prolong.data.mds import MdsReader, MdsWriter
from nemo_prolong.data.preparation.run import prepare
from nemo_prolong.errors import DataError
from nemo_prolong.records.data_manifest import DataManifest, RowSetFacts

SEQ_LENGTH = 128
MASKED = {"input_ids": "ndarray:uint32", "mask": "ndarray:uint8"}
Prepare = Callable[..., DataManifest]


@pytest.fixture
def pack(mixed_config: Callable[..., PrepareConfig], tmp_path: Path) -> Prepare:
    """Prepare sources of the domain ``chat`` as row sets of 128 tokens."""

    def prepare_rows(*sources: dict[str, Any], **row_sets: dict[str, Any]) -> DataManifest:
        cfg = mixed_config(
            tmp_path / "data",
            sources=[{"domain": "chat", **source} for source in sources],
            row_sets=[
                {"path": path, "domain": "chat", "seq_length": SEQ_LENGTH, **row_set}
                for path, row_set in row_sets.items()
            ],
            validation_fraction=0.0,
            shuffle=False,
        )
        return prepare(cfg)

    return prepare_rows


def talks(path: Path, *lengths: tuple[int, int]) -> dict[str, Any]:
    """Write conversations of so many words in the question and in the answer; return their source."""
    texts = [("window " * question, "buffer " * answer) for question, answer in lengths]
    lines = [
        json.dumps({"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]})
        for q, a in texts
    ]
    path.write_text("\n".join(lines) + "\n")
    return {"path": str(path), "messages_field": "messages"}


def masked_documents(path: Path, *masks: list[int]) -> dict[str, Any]:
    """Write tokenized documents with masks; return their source. BOS and EOS come on top."""
    with MdsWriter(path, MASKED) as writer:
        for mask in masks:
            writer.write({"input_ids": np.full(len(mask), 65, np.uint32), "mask": np.array(mask, np.uint8)})
    return {"path": str(path), "format": "tokenized_mds"}


def piece_targets(directory: Path) -> list[int]:
    """Return the tokens with a loss of every document of every row, as training counts them."""
    reader = MdsReader(directory)
    found: list[int] = []
    for number in range(len(reader)):
        row = build_row(reader[number], RowFormat(SEQ_LENGTH, apply_instruct_masks=True), f"row {number}")
        ends = [end for end in row.cu_seqlens.tolist() if end <= row.real_tokens]
        found += np.add.reduceat(row.loss_mask.numpy(), ends[:-1])[: len(ends) - 1].astype(int).tolist()
    return found


def test_prompts_longer_than_a_row_are_refused(pack: Prepare, tmp_path: Path) -> None:
    source = talks(tmp_path / "long.jsonl", (60, 4), (70, 4), (80, 4))
    rule = (
        r"row set rows: no target token is left of 3 train documents of chat: intact keeps pieces of 128 tokens, and "
        r"the first target comes after \d+ tokens or more\. Set seq_length=256, which holds the longest document whole "
        r"\(\d+ tokens\), or give shorter documents\."
    )
    with pytest.raises(DataError, match=rule):
        pack(source, rows={})
    assert not (tmp_path / "data").exists()


def test_pieces_that_all_miss_the_answer_are_refused_for_whole_rows(pack: Prepare, tmp_path: Path) -> None:
    source = masked_documents(tmp_path / "tokenized", *[[0] * 140 + [1] * 4] * 3)
    with pytest.raises(
        DataError, match=r"split keeps pieces of 64 tokens.* Set packing=intact and seq_length=256, which"
    ):
        pack(source, rows={"document_length": 64})


@pytest.mark.parametrize("packing", ["intact", "concat", "best_fit", "split"])
def test_rows_are_refused_where_no_token_is_a_target(pack: Prepare, tmp_path: Path, packing: str) -> None:
    columns = {**MASKED, "indices": "ndarray:uint32"}
    with MdsWriter(tmp_path / "rows_of_others", columns) as writer:
        for _ in range(3):
            row = {"input_ids": np.full(128, 65, np.uint32), "mask": np.zeros(128, np.uint8)}
            writer.write({**row, "indices": np.array([[0, 128]], np.uint32)})
    row_set = {"packing": packing, **({"document_length": 64} if packing == "split" else {})}
    with pytest.raises(DataError, match="there is no target token in 3 train documents of chat, as their masks say"):
        pack({"path": str(tmp_path / "rows_of_others"), "format": "packed_mds"}, rows=row_set)


def test_conversations_without_a_target_in_reach_are_counted(
    pack: Prepare, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = talks(tmp_path / "some.jsonl", (4, 20), (80, 4), (4, 20), (90, 4), (4, 30), (4, 30))
    with caplog.at_level(logging.WARNING):
        manifest = pack(source, rows={})
    facts = manifest.row_sets["rows"]
    assert facts.dropped_documents["no_target"] == 2
    assert facts.input_tokens == facts.tokens + sum(facts.dropped_tokens.values())
    assert facts.input_documents == 6
    assert "rows: packing leaves 2 of 6 documents no target token, so they are left out." in caplog.text
    assert min(piece_targets(tmp_path / "data" / "rows")) > 0


def test_a_conversation_cut_before_its_answer_begins_the_next_row(pack: Prepare, tmp_path: Path) -> None:
    facts = pack(talks(tmp_path / "tail.jsonl", (4, 20), (30, 20), (30, 30)), rows={}).row_sets["rows"]
    reader = MdsReader(tmp_path / "data" / "rows")
    assert [len(reader[number]["indices"]) for number in range(len(reader))] == [1, 1]
    assert facts.fill < 1 and facts.dropped_documents == {"truncated": 0, "last_row": 1, "no_target": 0}


@pytest.mark.parametrize("packing", ["intact", "concat", "best_fit", "split"])
def test_facts_count_the_targets_that_training_sees(pack: Prepare, tmp_path: Path, packing: str) -> None:
    rng = np.random.default_rng(4)
    masks = [(rng.random(rng.integers(2, 400)) < rng.choice([0.0, 0.02, 0.4])).astype(int).tolist() for _ in range(60)]
    row_set = {"packing": packing, **({"document_length": 64} if packing == "split" else {})}
    facts = pack(masked_documents(tmp_path / "tokenized", *masks), rows=row_set).row_sets["rows"]
    found = piece_targets(tmp_path / "data" / "rows")
    assert facts.target_tokens == sum(found) and min(found) > 0
    # BOS comes first, so that the first of the mask counts, and EOS is a target.
    assert facts.input_target_tokens == sum(map(sum, masks)) + len(masks)
    assert facts.input_tokens == facts.tokens + sum(facts.dropped_tokens.values())
    assert facts.cut_documents and facts.cut_target_tokens
    assert facts.target_tokens + facts.cut_target_tokens <= facts.input_target_tokens


def test_targets_in_another_row_set_of_the_documents_are_not_lost(pack: Prepare, tmp_path: Path) -> None:
    source = masked_documents(tmp_path / "tokenized", *[[1] * 190] * 4)
    row_sets = {"long": {"document_length": 128}, "short": {"document_length": 64}}
    manifest = pack(source, **row_sets)
    # 192 tokens with BOS and EOS are a piece of 128 and one of 64; the first token of the second is no target any more.
    for path, targets in (("long", 4 * 127), ("short", 4 * 63)):
        facts = manifest.row_sets[path]
        assert (facts.target_tokens, facts.cut_documents, facts.cut_target_tokens) == (targets, 4, 4)


def test_text_row_sets_count_no_targets(pack: Prepare, tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text((json.dumps({"text": "window buffer " * 200}) + "\n") * 3)
    facts = pack({"path": str(tmp_path / "text.jsonl")}, rows={}).row_sets["rows"]
    assert (facts.target_tokens, facts.target_share, facts.cut_documents) == (None, None, None)
    assert "no_target" not in facts.dropped_tokens


def test_facts_of_before_targets_were_counted_can_be_read(pack: Prepare, tmp_path: Path) -> None:
    facts = pack(talks(tmp_path / "some.jsonl", *[(4, 20)] * 6), rows={}).row_sets["rows"]
    names = {"target_tokens", "input_target_tokens", "cut_documents", "cut_target_tokens"}
    assert RowSetFacts.model_validate(facts.model_dump(exclude=names)).target_share is None
