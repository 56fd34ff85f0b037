"""``origin.json`` of a row set."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_prolong.errors import DataError
from nemo_prolong.records.row_origin import RowOrigin

SHA256 = "0123456789abcdef" * 4


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    origin = RowOrigin(tokenizer="models/llama", tokenizer_sha256=SHA256, vocab_size=128256, bos_token="<s>")
    origin.write(tmp_path)
    assert RowOrigin.parse((tmp_path / "origin.json").read_bytes(), "origin.json") == origin


@pytest.mark.parametrize(
    ("content", "reason"),
    [("{", "Expecting property name"), ("{}", "1 validation error for RowOrigin"), ("\xff", "'utf-8' codec can't")],
)
def test_a_damaged_file_is_named_with_the_first_line_of_the_reason(content: str, reason: str) -> None:
    with pytest.raises(DataError) as caught:
        RowOrigin.parse(content.encode("latin-1"), "data/rows/origin.json")
    assert str(caught.value).startswith(f"data/rows/origin.json: does not say where the rows come from ({reason}")
    assert str(caught.value).endswith("). Copy it again.") and "\n" not in str(caught.value)


def test_a_tokenizer_is_named_with_its_size_and_hash() -> None:
    named = RowOrigin(tokenizer="models/llama", tokenizer_sha256=SHA256, vocab_size=128256)
    assert named.name == "models/llama of 128,256 tokens (SHA-256 0123456789ab)"
    assert RowOrigin(tokenizer_sha256=SHA256).name == "a tokenizer of their own (SHA-256 0123456789ab)"
