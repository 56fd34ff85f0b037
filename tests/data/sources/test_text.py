"""Trees of text: whole files, huge ones in pieces that never split a character."""

from __future__ import annotations

import tracemalloc

import pytest

from nemo_prolong.config.schema.prepare import SourceConfig
from nemo_prolong.data.sources import plan_units, read_unit
from nemo_prolong.errors import DataError


def test_every_file_is_a_document_with_its_exact_text(tmp_path, read, awkward):
    names = ["a.md", "a/b.txt", "a/c/d.RST", "b.markdown", "e.txt", "f.txt", "g.txt"]
    for name, text in zip(names, awkward, strict=True):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(text.encode())
    for name in (".git/x.txt", ".hidden.md", "a/code.py", "a/.c/x.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("UNWANTED")
    for unit_bytes in (1, 60, 2**20):
        found = read(tmp_path, unit_bytes=unit_bytes, format="text")
        assert found.texts == awkward
        assert [(d.key, d.group) for d in found.documents] == [(name, name) for name in names]
    assert read(tmp_path, format="text", include=["*.py"]).texts == ["UNWANTED"]
    assert read(tmp_path, format="text", include=["a/*.txt", "*.RST"]).texts == awkward[1:3]


def test_a_mark_at_the_start_is_no_text(tmp_path, read):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone \xef\xbb\xbf")
    assert read(tmp_path, format="text").texts == ["one \ufeff"]


@pytest.mark.parametrize("shift", range(4))
def test_a_long_file_comes_in_pieces_of_whole_characters(tmp_path, shift):
    text = "x" * shift + "\U0001f600" * 700_000
    (tmp_path / "a.txt").write_text(text, "utf-8")
    source = SourceConfig(domain="d", path=str(tmp_path / "a.txt"), format="text")
    (unit,) = plan_units(source)
    (document,) = read_unit(source, unit)
    pieces = list(document.pieces)
    assert len(pieces) >= 3 and "".join(pieces) == text


@pytest.mark.parametrize("characters", [0, 3_000_000])
def test_invalid_utf8_is_found_before_any_of_the_text_is_given(tmp_path, read, characters):
    file = tmp_path / "a.txt"
    file.write_bytes("\u00e9".encode() * (characters // 2) + b"caf\xe9 au lait")
    (tmp_path / "b.txt").write_text("good")
    with pytest.raises(DataError) as caught:
        read(tmp_path, format="text")
    assert caught.value.what == str(file)
    assert f"byte {characters + 3} is 0xe9" in caught.value.rule
    found = read(tmp_path, format="text", on_bad_document="drop")
    assert found.texts == ["good"]
    assert [(r.key, r.reason, r.num_bytes) for r in found.rejected] == [("a.txt", "invalid_utf8", characters + 12)]


def test_a_file_that_changes_between_readings_is_refused(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("word " * 500_000)
    source = SourceConfig(domain="d", path=str(file), format="text")
    (unit,) = plan_units(source)
    (document,) = read_unit(source, unit)
    file.write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"a\.txt: has changed while it was read\."):
        list(document.pieces)


def test_a_character_that_is_cut_off_by_the_end_is_invalid(tmp_path, read):
    (tmp_path / "a.txt").write_bytes("caf\u00e9".encode()[:-1])
    with pytest.raises(DataError, match=r"byte 3 is 0xc3 \(unexpected end of data\)"):
        read(tmp_path, format="text")


@pytest.mark.parametrize("content", [b"", b"\xef\xbb\xbf"])
def test_an_empty_file_is_refused_or_dropped(tmp_path, read, content):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.txt: holds no text\. Remove it\. Or leave such documents out"):
        read(tmp_path, format="text")
    found = read(tmp_path, format="text", on_bad_document="drop")
    assert [rejected.reason for rejected in found.rejected] == ["empty_document"]


def test_a_huge_file_without_lines_takes_little_memory(tmp_path):
    with (tmp_path / "a.txt").open("wb") as file:
        for _ in range(30):
            file.write(b"word " * 200_000)
    source = SourceConfig(domain="d", path=str(tmp_path), format="text")
    (unit,) = plan_units(source)
    tracemalloc.start()
    characters = sum(len(piece) for document in read_unit(source, unit) for piece in document.pieces)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert characters == 30_000_000
    assert peak_bytes < 10_000_000


def test_max_bytes_takes_the_first_files_and_at_least_one(tmp_path, read):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name * 10)
    assert read(tmp_path, format="text", max_bytes=1).texts == ["a" * 10]
    assert read(tmp_path, format="text", max_bytes=20).texts == ["a" * 10, "b" * 10]
    assert read(tmp_path, format="text", max_bytes=29).texts == ["a" * 10, "b" * 10]
