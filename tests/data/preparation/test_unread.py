"""What is not read of a source is in the manifest, the card and, where it changes what is learned, the log."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemo_prolong.config.schema.prepare import PrepareConfig
from nemo_prolong.data.preparation.catalog import fingerprint
from nemo_prolong.data.preparation.run import prepare
from nemo_prolong.errors import ConfigError
from nemo_prolong.records.data_manifest import DataManifest, SourceFacts
from nemo_prolong.report.data_card.write import write_card

TALK = [
    {"role": "user", "content": "window buffer? " * 10},
    {"role": "assistant", "content": "token length. " * 10, "id": 7},
]


@pytest.fixture
def facts_of(mixed_config: Callable[..., PrepareConfig], tmp_path: Path) -> Callable[..., SourceFacts]:
    """A function from records and settings of their source to what the manifest says of it."""

    def prepare_records(records: list[dict[str, Any]], **source: Any) -> SourceFacts:
        path = tmp_path / "a.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        cfg = mixed_config(
            tmp_path / "data",
            sources=[{"domain": "d", "path": str(path), **source}],
            row_sets=[{"path": "rows", "domain": "d", "seq_length": 64}],
            validation_fraction=0.0,
        )
        return prepare(cfg, finish=write_card).sources[0]

    return prepare_records


def test_unread_columns_and_dropped_keys_are_in_the_manifest(
    facts_of: Callable[..., SourceFacts], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    records = [
        {"messages": TALK, "prompt_id": "a", "images": ["b.png"]},
        {"messages": TALK, "prompt_id": "b", "images": None},
    ]
    with caplog.at_level(logging.WARNING):
        facts = facts_of(records, messages_field="messages", on_unknown_key="drop")
    assert facts.unread_columns == {"prompt_id": 2, "images": 1}
    assert facts.columns_to_check == ["images"]
    assert facts.dropped_keys == {"id": 2}
    assert (
        f"{tmp_path / 'a.jsonl'}: not read, and may change what is to be learned: images (1); if that is meant, set "
        in (caplog.text)
    )
    written = DataManifest.model_validate_json((tmp_path / "data" / "manifest.json").read_bytes())
    assert written.sources[0] == facts
    for name in ("card.html", "card.md"):
        card = (tmp_path / "data" / name).read_text("utf-8")
        assert "Columns and keys that were not read" in card
        assert "prompt" in card


def test_names_with_half_characters_reach_the_manifest(facts_of: Callable[..., SourceFacts]) -> None:
    talk = [TALK[0], {**TALK[1], "\udc00": 1}]
    facts = facts_of([{"messages": talk, "\ud800": 1}], messages_field="messages", on_unknown_key="drop")
    assert (facts.unread_columns, facts.dropped_keys) == ({"\\ud800": 1}, {"\\udc00": 1, "id": 1})


def test_columns_that_are_left_unread_on_purpose_are_no_warning(
    facts_of: Callable[..., SourceFacts], caplog: pytest.LogCaptureFixture
) -> None:
    text = {"text": "window buffer token " * 20}
    with caplog.at_level(logging.WARNING):
        facts = facts_of([{**text, "tools": [], "Label": 3, "url": "x"}] * 2, ignore_fields=["tools", "Label"])
    assert facts.unread_columns == {"Label": 2, "tools": 2, "url": 2}
    assert facts.columns_to_check == []
    assert "not read" not in caplog.text


def test_a_source_of_text_warns_of_messages_beside_the_text(facts_of: Callable[..., SourceFacts]) -> None:
    facts = facts_of([{"text": "window buffer token " * 20, "messages": TALK, "Label": 3}])
    assert facts.columns_to_check == ["Label", "messages"]


def test_fields_that_a_found_format_has_not_are_refused(
    mixed_config: Callable[..., PrepareConfig], tmp_path: Path
) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.md").write_text("window")
    cfg = mixed_config(
        tmp_path / "data",
        sources=[{"domain": "d", "path": str(tmp_path / "notes"), "messages_field": "messages"}],
        row_sets=[{"path": "rows", "domain": "d", "seq_length": 16}],
    )
    with pytest.raises(ConfigError, match=r"messages_field=messages: format=text has no such columns\."):
        prepare(cfg)


def test_another_reading_of_the_same_files_is_another_result(
    mixed_config: Callable[..., PrepareConfig], tmp_path: Path
) -> None:
    row_sets = [{"path": "rows", "domain": "d", "seq_length": 16}]
    source = {"domain": "d", "path": "a.jsonl", "messages_field": "messages"}
    changes: list[dict[str, Any]] = [
        {},
        {"on_unknown_key": "drop"},
        {"ignore_fields": ["tools"]},
        {"messages_field": None, "tokens_field": "input_ids"},
        {"messages_field": None, "prompt_field": "a", "completion_field": "b"},
    ]
    configs = [mixed_config(tmp_path, sources=[{**source, **change}], row_sets=row_sets) for change in changes]
    assert len({fingerprint(cfg, None, []) for cfg in configs}) == len(changes)
