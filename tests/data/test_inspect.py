import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from nemo_prolong.data.inspect import load_tokenizer, sample_row, show
from nemo_prolong.data.mds import MdsReader, MdsWriter
from nemo_prolong.data.row_text import View
from nemo_prolong.data.verify import verify
from nemo_prolong.errors import DataError

SCRIPT = Path(__file__).parents[2] / "scripts" / "inspect_data.py"
COLUMNS = {"input_ids": "ndarray:uint32", "indices": "ndarray:uint32", "domain": "str", "length": "uint64"}
MASKED = {**COLUMNS, "mask": "ndarray:uint8"}


def byte_tokenizer():
    """Return a tokenizer whose tokens are bytes, then BOS 256 and EOS 257."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: number for number, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<bos>", "<eos>"])
    tokenizer.encode_special_tokens = True  # text that looks like a special token stays text
    return tokenizer


TOKENIZER = byte_tokenizer()
BOS, EOS = 256, 257


def ids(text):
    return TOKENIZER.encode(text).ids


def packed(*documents, **changes):
    """Return a row of documents given as lists of ids."""
    ends = np.cumsum([len(document) for document in documents])
    row = {
        "input_ids": np.array([number for document in documents for number in document], np.uint32),
        "indices": np.stack([ends - [len(document) for document in documents], ends], axis=1).astype(np.uint32),
        "domain": "docs", "length": int(ends[-1]), **changes,
    }  # fmt: skip
    return {name: value for name, value in row.items() if value is not None}


def document(text):
    return [BOS, *ids(text), EOS]


def write_rows(directory, rows, columns=COLUMNS):
    with MdsWriter(directory, columns) as writer:
        for row in rows:
            writer.write(row)


@pytest.fixture
def data(tmp_path):
    """A data directory of two row sets, one with masks."""
    root = tmp_path / "data"
    docs = [packed(document("first one"), document("second")), packed(document("third text, alone"))]
    chat = packed(document("ask"), document("tell"), mask=np.array([0, 0, 0, 1, 1, 0, 0, 0, 0, 1, 0], np.uint8))
    write_rows(root / "docs-19", docs)
    write_rows(root / "deep" / "chat-11", [chat], MASKED)
    (root / "tokenizer").mkdir()
    TOKENIZER.save(str(root / "tokenizer" / "tokenizer.json"))
    entries = {}
    for path, rows, tokens in (("docs-19", 2, 38), ("deep/chat-11", 1, 11)):
        shards = {
            shard.raw.name: {"bytes": shard.raw.num_bytes, "sha256": shard.raw.hashes["sha256"]}
            for shard in MdsReader(root / path).shards
        }
        entries[path] = {
            "domain": "docs", "split": "train", "packing": "concat", "seq_length": tokens // rows, "rows": rows,
            "documents": 3, "tokens": tokens, "fill": 0.99951, "input_tokens": 2 * tokens,
            "dropped_tokens": {"last_row": tokens}, "shards": shards,
        }  # fmt: skip
    manifest = {"format": 2, "seed": 42, "tokenizer": "tokenizer", "vocab_size": 258, "row_sets": entries}
    (root / "manifest.json").write_text(json.dumps(manifest))
    return root


def shown(directory, *rows, **view):
    return "\n".join(show(directory, rows, View(**view)))


# ---- samples --------------------------------------------------------------------------------------------------------


def test_a_sample_has_the_text_on_both_sides_of_every_boundary():
    sample = sample_row(packed(document("one"), document("two")), 7, TOKENIZER)
    assert (sample["row"], sample["domain"], sample["tokens"]) == (7, "docs", 10)
    assert sample["spans"] == [[0, 5], [5, 10]] and sample["masked_text"] is None
    sides = [(b["position"], b["before"], b["after"]) for b in sample["boundaries"]]
    assert sides == [(0, "", "<bos>one<eos>"), (5, "<bos>one<eos>", "<bos>two<eos>"), (10, "<bos>two<eos>", "")]
    json.dumps(sample, allow_nan=False)


def test_text_like_a_special_token_is_not_marked_as_one():
    boundary = sample_row(packed(document("say <eos> twice")), 0, TOKENIZER)["boundaries"][0]
    marked = [boundary["after"][start:end] for start, end in boundary["after_special"]]
    assert boundary["after"] == "<bos>say <eos> twice<eos>"
    assert marked == ["<bos>", "<eos>"] and boundary["after_special"][1] == [20, 25]


def test_the_masked_text_of_a_sample_marks_targets():
    sample = sample_row(packed(document("ask"), mask=np.array([0, 0, 0, 1, 1], np.uint8)), 0, TOKENIZER)
    assert sample["masked_text"] == [
        {"text": "<bos>", "special": True, "target": False},
        {"text": "as", "special": False, "target": False},
        {"text": "k", "special": False, "target": True},
        {"text": "<eos>", "special": True, "target": True},
    ]


def test_long_text_and_many_boundaries_are_shortened():
    sample = sample_row(packed(*[document("x" * 50)] * 30), 0, TOKENIZER)
    assert [b["position"] for b in sample["boundaries"]] == [0, 52, 104, 156, 208, 1560]
    assert sample["boundaries"][1]["before"] == "\u2026" + "x" * 31 + "<eos>"
    assert sample["boundaries"][1]["after"] == "<bos>" + "x" * 31 + "\u2026"
    assert sample["boundaries"][1]["before_special"] == [[32, 37]]


@given(st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=6), min_size=1, max_size=5))
def test_a_sample_gives_back_short_documents_and_special_tokens(texts):
    sample = sample_row(packed(*map(document, texts)), 0, TOKENIZER)
    wrapped = [f"<bos>{text}<eos>" for text in texts]
    assert [b["after"] for b in sample["boundaries"]] == [*wrapped, ""]
    assert [b["before"] for b in sample["boundaries"]] == ["", *wrapped]
    for boundary in sample["boundaries"][1:]:
        assert [boundary["before"][a:b] for a, b in boundary["before_special"]] == ["<bos>", "<eos>"]


# ---- show -----------------------------------------------------------------------------------------------------------


def test_a_data_directory_is_shown_as_a_table_of_its_row_sets(data):
    lines = shown(data).splitlines()
    assert lines[0] == f"{data}  3 rows in 2 row sets \u00b7 tokenizer tokenizer of 258 tokens \u00b7 seed 42"
    assert lines[2].split() == "row set domain split packing seq_length rows documents tokens fill dropped".split()
    assert lines[3].split() == ["docs-19", "docs", "train", "concat", "19", "2", "3", "38", "99.95%", "50%"]
    assert f"{data / 'docs-19'} 0" in lines[-1]


def test_a_row_set_is_shown_as_a_summary(data):
    text = shown(data / "docs-19")
    for fact in ("rows               2", "input_ids (ndarray:uint32)", "tokens             38", "tokens per row     19",
                 "documents per row  1 to 2, mean 1.5", "document length    8 to 19, mean 12.7",
                 "fill               100% of 19", "shards             1, "):  # fmt: skip
        assert fact in text
    assert "targets            27.27% of the tokens" in shown(data / "deep" / "chat-11")


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
    assert "\x1b[30;42mk\x1b[0m\x1b[36;30;42m<eos>\x1b[0m" in coloured and "[[" not in coloured


def test_control_characters_never_reach_the_terminal(tmp_path):
    write_rows(tmp_path / "rows", [packed(document("a\x1b[2Jb\u202ec\nd\x9b"), domain="x\x1by")])
    path = tmp_path / "tokenizer.json"
    TOKENIZER.save(str(path))
    text = shown(tmp_path / "rows", "0", tokenizer=str(path))
    assert "a\\x1b[2Jb\\u202ec\u21b5d\\x9b" in text and "x\\x1by" in text
    assert "\x1b" not in shown(tmp_path / "rows") + shown(tmp_path / "rows", "0", full=True, tokenizer=str(path))


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
        ({"indices": np.array([[0, 2], [3, 5]], np.uint32)}, "the document spans do not tile the 5 tokens of the row."),
        ({"indices": np.array([[0, 9]], np.uint32)}, "the document spans do not tile the 5 tokens of the row."),
        ({"indices": np.array([0, 5], np.uint32)}, "indices has shape (2,), not [documents, 2]."),
        ({"mask": np.array([1, 0], np.uint8)}, "mask has shape (2,) for 5 tokens."),
    ],
)
def test_a_row_that_training_would_refuse_is_still_shown(tmp_path, change, problem):
    row = packed([1, 2, 3, 4, 5], **change)
    write_rows(tmp_path / "rows", [row], MASKED if "mask" in change else COLUMNS)
    assert problem in shown(tmp_path / "rows", "0")
    assert f"row 0: {problem}" in shown(tmp_path / "rows")


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
    with pytest.raises(
        DataError, match=r"row 0: has no one-dimensional integer column input_ids; its columns are text"
    ):
        shown(tmp_path / "texts", "0")
    (data / "manifest.json").write_text("[]")
    with pytest.raises(DataError, match=r"manifest\.json: is no manifest of a data directory"):
        shown(data)


# ---- verification ---------------------------------------------------------------------------------------------------


def test_a_whole_directory_verifies_with_a_line_per_row_set(data):
    assert list(verify(data)) == [
        f"{data / 'docs-19'}: whole, 2 rows in 1 shard, as in the manifest",
        f"{data / 'deep/chat-11'}: whole, 1 row in 1 shard, as in the manifest",
    ]
    assert "as in the manifest" in next(iter(verify(data / "docs-19")))


def test_a_changed_byte_is_found_and_checking_goes_on(data):
    shard = data / "docs-19" / "shard.00000.mds"
    content = bytearray(shard.read_bytes())
    content[-3] ^= 1
    shard.write_bytes(content)
    findings = list(verify(data))
    assert isinstance(findings[0], DataError) and "shard.00000.mds" in str(findings[0])
    assert "sha256" in str(findings[0]).lower()
    assert "chat-11: whole, 1 row in 1 shard" in findings[-1]


def test_a_row_set_written_anew_differs_from_the_manifest(data):
    for file in (data / "docs-19").iterdir():
        file.unlink()
    (data / "docs-19").rmdir()
    write_rows(data / "docs-19", [packed(document("other text"))])
    texts = [str(finding) for finding in verify(data / "docs-19") if isinstance(finding, DataError)]
    assert "index.json: lists 1 row in 1 shard, the manifest 2 in 1." in texts[0]
    assert "shard.00000.mds: has the SHA-256 " in texts[1] and ", the manifest says " in texts[1]


def test_a_missing_row_set_is_an_error_among_the_others(data):
    (data / "docs-19" / "index.json").unlink()
    findings = list(verify(data))
    assert isinstance(findings[0], DataError) and "docs-19" in str(findings[0])
    assert isinstance(findings[1], str)


# ---- the script -----------------------------------------------------------------------------------------------------


def run(*arguments):
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_the_script_shows_rows_without_colour_in_a_pipe(data):
    result = run(data / "deep" / "chat-11", "0", "--tokens", "2")
    assert result.returncode == 0 and result.stderr == ""
    assert "\u2026[[k<eos>]]" in result.stdout and "\x1b" not in result.stdout


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
