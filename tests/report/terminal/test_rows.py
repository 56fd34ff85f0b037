"""What scripts/inspect_data.py shows of a data directory, a row set and its rows."""

import json
import os
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest

from nemo_prolong.config.compose import CONFIG_DIR
from nemo_prolong.data.mds import MdsWriter
from nemo_prolong.data.row_text import load_tokenizer
from nemo_prolong.data.tokenizer.identity import definition_sha256
from nemo_prolong.errors import DataError
from nemo_prolong.records.row_origin import RowOrigin
from nemo_prolong.report.terminal.row_sets import describe
from nemo_prolong.report.terminal.rows import RowView
from tests.support.stored_rows import COLUMNS, MASKED, TOKENIZER, document, ids, packed, write_data, write_rows
from tests.support.terminal import printed

SCRIPT = CONFIG_DIR.parent / "scripts" / "inspect_data.py"


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path / "data")


def shown(directory, *rows, width=None, **view):
    """Return what a pipe gets, or a terminal if there are colours."""
    return printed(*describe(directory, rows, RowView(**view)), color=view.get("color", False), width=width)


def test_a_data_directory_is_shown_as_a_table_of_its_row_sets(data):
    lines = shown(data).splitlines()
    assert lines[0] == f"{data}  3 rows in 2 row sets \u00b7 tokenizer tokenizer of 258 tokens \u00b7 seed 42"
    assert lines[2].split() == "row set domain split packing seq_length rows documents tokens fill dropped".split()
    assert lines[3].split() == ["docs-19", "docs", "train", "concat", "19", "2", "3", "38", "99.95%", "50%"]
    assert f"{data / 'docs-19'} 0" in lines[-1]


def test_the_command_that_shows_a_row_can_be_pasted(tmp_path):
    data = write_data(tmp_path / "it's data")
    command = shlex.split(shown(data).splitlines()[-1].partition("A row: ")[2])
    assert command == ["python", "scripts/inspect_data.py", str(data / "docs-19"), "0"]


def test_a_row_set_is_shown_as_a_summary(data):
    text = shown(data / "docs-19")
    for fact in ("rows               2", "input_ids (ndarray:uint32)", "tokens             38", "tokens per row     19",
                 "documents per row  1 to 2, mean 1.5", "document length    8 to 19, mean 12.7",
                 "fill               100% of 19", "shards             1, "):  # fmt: skip
        assert fact in text
    assert "targets            27.27% of the tokens" in shown(data / "deep" / "chat-11")


def test_counted_targets_are_shown_for_the_directory_and_the_row_set(data):
    manifest = json.loads((data / "manifest.json").read_text())
    chat = manifest["row_sets"]["deep/chat-11"]
    chat |= {"target_tokens": 3, "cut_documents": 2, "cut_target_tokens": 40, "dropped_documents": {"no_target": 5}}
    (data / "manifest.json").write_text(json.dumps(manifest))
    head, docs, talk = (line.split() for line in shown(data).splitlines()[2:5])
    assert (head[-1], docs[-1], talk[-1]) == ("targets", "50%", "27.27%")
    text = shown(data / "deep" / "chat-11")
    for fact in ("rows of no target  0", "left out           5 documents without a target",
                 "cut                2 documents, which lost 40 target tokens"):  # fmt: skip
        assert fact in text


def test_a_row_without_a_target_is_said_to_teach_nothing(tmp_path):
    # The only one marked is the first of a document, which nothing predicts.
    mask = np.array([1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0], np.uint8)
    write_rows(tmp_path / "rows", [packed(document("ask"), document("tell"), mask=mask)], MASKED)
    assert "rows of no target  1" in shown(tmp_path / "rows")
    text = shown(tmp_path / "rows", "0")
    assert "0 targets (0%)" in text
    assert "no token is a target: with data.apply_instruct_masks nothing is learned from this row." in text


def test_a_summary_unpacks_one_compressed_shard_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with MdsWriter(tmp_path / "zipped", COLUMNS, shard_bytes=1, compression="zstd") as writer:
        for _ in range(3):
            writer.write(packed(document("text")))
    text = shown(tmp_path / "zipped")
    assert "shards             3, " in text and ", zstd" in text
    assert "tokens             18 (about: from 1 row)" in text


def test_a_row_is_shown_with_its_documents_and_boundaries(data):
    lines = shown(data / "docs-19", "0").splitlines()
    assert lines[0] == f"{data / 'docs-19'} row 0 of 2  19 tokens \u00b7 2 documents \u00b7 docs"
    assert lines[1].count("|") == 3 and lines[1].endswith(" 19")
    assert [line.split() for line in lines[4:6]] == [["1", "0", "11", "11"], ["2", "11", "19", "8"]]
    at = lines.index("at 11")
    assert lines[at + 1 : at + 3] == ["  <bos>first one<eos>", "  <bos>second<eos>"]


def test_context_and_full_say_how_much_text_is_shown(data):
    assert "\u2026ne<eos>\n  <bos>se\u2026" in shown(data / "docs-19", "0", context_tokens=3)
    full = shown(data / "docs-19", "0", "1", full=True)
    assert "document 2: tokens 11 to 19\n<bos>second<eos>" in full and "third text, alone" in full


def test_targets_are_bracketed_in_text_and_coloured_on_terminals(data):
    chat = data / "deep" / "chat-11"
    assert "<bos>as[[k<eos>]]<bos>tel[[l]]<eos>" in shown(chat, "0")
    assert "3 targets (27.27%)" in shown(chat, "0")
    coloured = shown(chat, "0", color=True)
    assert "\x1b[36m<bos>\x1b[0mas\x1b[30;42mk\x1b[0m\x1b[30;42m<eos>\x1b[0m" in coloured and "[[" not in coloured


def test_control_characters_never_reach_the_terminal(tmp_path):
    write_rows(tmp_path / "rows", [packed(document("a\x1b[2Jb\u202ec\nd\x9b"), domain="x\x1by")])
    path = tmp_path / "tokenizer.json"
    TOKENIZER.save(str(path))
    text = shown(tmp_path / "rows", "0", tokenizer=str(path))
    assert "a\\x1b[2Jb\\u202ec\u21b5d\\x9b" in text and "x\\x1by" in text
    assert "\x1b" not in shown(tmp_path / "rows") + shown(tmp_path / "rows", "0", full=True, tokenizer=str(path))


def test_brackets_of_the_data_are_no_markup(tmp_path):
    text = "[b]a[/no] :smile:"
    write_rows(tmp_path / "rows", [packed(document(text), domain="[red]d[/]")])
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    for color in (False, True):
        row = shown(tmp_path / "rows", "0", tokenizer=str(tmp_path / "tokenizer.json"), color=color)
        assert text in row and "[red]d[/]" in row
    assert "[red]d[/]" in shown(tmp_path / "rows", color=True)


def test_text_keeps_its_tabs_and_is_never_wrapped(tmp_path):
    text = "a\tb" + " word" * 60
    write_rows(tmp_path / "rows", [packed(document(text))])
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    for color in (False, True):
        full = shown(tmp_path / "rows", "0", full=True, tokenizer=str(tmp_path / "tokenizer.json"), color=color)
        assert text in full


def test_every_line_of_a_target_is_coloured_by_itself(tmp_path):
    write_rows(tmp_path / "rows", [packed(ids("a\nb"), mask=np.ones(3, np.uint8))], MASKED)
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    text = shown(tmp_path / "rows", "0", full=True, tokenizer=str(tmp_path / "tokenizer.json"), color=True)
    assert "\x1b[30;42ma\x1b[0m\n\x1b[30;42mb\x1b[0m\n" in text


def test_a_narrow_terminal_folds_facts_and_leaves_tables_whole(data):
    summary = shown(data / "docs-19", color=True, width=50).splitlines()
    assert max(len(re.sub(r"\x1b\[[\d;]*m", "", line)) for line in summary[1:-3]) <= 50
    assert "99.95%      50%" in shown(data, color=True, width=50)


def test_published_rows_without_manifest_are_shown_as_ids(tmp_path):
    columns = {"input_ids": "ndarray:int32", "indices": "ndarray:uint32", "domain": "str"}
    row = packed([5, 6, 7], [8, 9], length=None)
    write_rows(tmp_path / "book", [{**row, "input_ids": row["input_ids"].astype(np.int32)}], columns)
    text = shown(tmp_path / "book", "0")
    assert "No tokenizer is known" in text and "name one with --tokenizer" in text
    assert "5 6 7" in text and "2 documents" in text
    assert "fill               100% of 5" in shown(tmp_path / "book")


def test_a_row_without_indices_is_one_document(tmp_path):
    columns = {"input_ids": "ndarray:uint32", "domain": "str"}
    write_rows(tmp_path / "raw", [packed([1, 2, 3], indices=None, length=None)], columns)
    assert "3 tokens \u00b7 1 document" in shown(tmp_path / "raw", "0")


def test_a_tokenizer_that_is_gone_leaves_the_ids(data):
    (data / "tokenizer" / "tokenizer.json").unlink()
    (data / "tokenizer").rmdir()
    text = shown(data / "docs-19", "0")
    assert f"The tokenizer {data / 'tokenizer'} is gone, so ids are shown" in text and "256 " in text


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            {"indices": np.array([[0, 2], [3, 5]], np.uint32)},
            "the row has span 1 from 3 to 5, which leaves tokens from",
        ),
        (
            {"indices": np.array([[0, 9]], np.uint32)},
            "the row has span 0 from 0 to 9, which leaves the row of 5 tokens.",
        ),
        ({"indices": np.array([0, 5], np.uint32)}, "the row has spans of shape [2] and type uint32, not integers"),
        ({"mask": np.array([1, 0], np.uint8)}, "the row has a mask of shape [2] for 5 tokens."),
    ],
)
def test_a_row_that_training_would_refuse_is_still_shown(tmp_path, change, problem):
    row = packed([1, 2, 3, 4, 5], **change)
    write_rows(tmp_path / "rows", [row], MASKED if "mask" in change else COLUMNS)
    assert problem in shown(tmp_path / "rows", "0")
    assert f"row 0: {problem}" in shown(tmp_path / "rows")


def test_rows_shown_with_another_tokenizer_are_said_to_be(data):
    own = definition_sha256(json.loads(TOKENIZER.to_str()))
    RowOrigin(tokenizer_sha256=own, vocab_size=258).write(data / "docs-19")
    assert "another tokenizer" not in shown(data / "docs-19", "0")
    RowOrigin(tokenizer="models/other", tokenizer_sha256="a" * 64, vocab_size=258).write(data / "docs-19")
    note = f"These rows were made with models/other of 258 tokens (SHA-256 {'a' * 12}), as "
    assert note in shown(data / "docs-19", "0") and f"{data / 'tokenizer'} is another tokenizer." in shown(
        data / "docs-19", "0"
    )


def test_a_row_set_with_a_manifest_of_its_own_is_still_a_row_set(data):
    (data / "docs-19" / "manifest.json").write_text('{"files": []}')
    assert "rows               2" in shown(data / "docs-19")


def test_a_manifest_of_another_program_above_rows_is_left_alone(data):
    (data / "manifest.json").write_text('{"files": []}')
    assert "No tokenizer is known" in shown(data / "docs-19", "0")


def test_ids_beyond_the_tokenizer_are_counted(data, tmp_path):
    write_rows(tmp_path / "foreign", [packed([1, 300, 70_000])])
    text = shown(tmp_path / "foreign", "0", tokenizer=str(data / "tokenizer"))
    assert "2 ids (up to 70,000) are beyond the 258 tokens of the tokenizer" in text


# ---- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "rows", "message"),
    [
        ("nowhere", [], "nowhere: is no directory. Give a directory that scripts/prepare_data.py wrote"),
        ("tokenizer", [], "tokenizer: is no data directory: it has neither a manifest.json nor an index.json."),
        ("docs-19", ["2"], "docs-19 has 2 rows, counted from 0. Give 0 to 1."),
        ("docs-19", ["-1"], "has 2 rows, counted from 0. Give 0 to 1."),
        ("docs-19", ["0", "one"], "row 'one': a row is named by its number. Give 0 to 1."),
        ("", ["0"], "row 0: rows are in a row set, and this directory holds several. Name one, such as "),
    ],
)
def test_what_cannot_be_shown_is_said_with_a_remedy(data, path, rows, message):
    with pytest.raises(DataError) as caught:
        shown(data / path, *rows)
    assert message in str(caught.value)


def test_an_unknown_tokenizer_is_refused(data, tmp_path):
    with pytest.raises(DataError, match=r"is no tokenizer: tokenizer\.json cannot be read \(there is no such file\)"):
        shown(data / "docs-19", "0", tokenizer=str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"cannot be read \(.*Model missing"):
        load_tokenizer(tmp_path)


def test_rows_without_tokens_and_damaged_manifests_are_refused(data, tmp_path):
    write_rows(tmp_path / "texts", [{"text": "hello"}], {"text": "str"})
    with pytest.raises(DataError, match=r"row 0: has no column input_ids; its columns are text"):
        shown(tmp_path / "texts", "0")
    (data / "manifest.json").write_text("[]")
    with pytest.raises(DataError, match=r"manifest\.json: is no manifest of a data directory"):
        shown(data)


# ---- the script -----------------------------------------------------------------------------------------------------


def run(*arguments):
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_the_script_shows_rows_without_colour_in_a_pipe(data):
    result = run(data / "deep" / "chat-11", "0", "--tokens", "2")
    assert result.returncode == 0 and result.stderr == ""
    assert "\u2026[[k<eos>]]" in result.stdout and "\x1b" not in result.stdout


def test_the_script_does_not_wrap_what_goes_into_a_pipe(data):
    environment = {**os.environ, "COLUMNS": "40"}
    command = [sys.executable, str(SCRIPT), str(data)]
    lines = subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout.splitlines()
    assert lines[2].startswith("row set") and lines[2].endswith("dropped")
    assert not any(line.endswith(" ") for line in lines)


def test_the_script_ends_with_one_line_and_its_code(data):
    result = run(data / "docs-19", "9")
    assert result.returncode == 3
    assert result.stderr == f"row 9: {data / 'docs-19'} has 2 rows, counted from 0. Give 0 to 1.\n"


def test_the_script_verifies_and_fails_on_damage(data):
    assert run(data, "--verify").returncode == 0
    (data / "docs-19" / "shard.00000.mds").write_bytes(b"short")
    result = run(data, "--verify")
    assert result.returncode == 3
    assert "docs-19/shard.00000.mds" in result.stderr and "chat-11: whole, 1 row in 1 shard" in result.stdout


def test_a_closed_pipe_ends_the_script_quietly(data):
    write_rows(data / "long", [packed(*[document("word " * 200)] * 200)])
    command = f"{sys.executable} {SCRIPT} {data / 'long'} 0 --full | head -1; echo ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert result.stderr == "" and result.stdout.splitlines()[-1] in ("0", "141")
