import json

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from nemo_prolong.data.samples import sample_row
from tests.support.stored_rows import TOKENIZER, document, packed
from tests.support.tokenizers import KINDS


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


def test_a_target_that_begins_with_a_space_keeps_it(tmp_path):
    tokenizer = KINDS["llama2"](tmp_path).backend_tokenizer
    ids = tokenizer.encode("of keys and values", add_special_tokens=False).ids
    first = next(n for n, token in enumerate(ids) if n and tokenizer.id_to_token(token).startswith("\u2581"))
    row = {"input_ids": np.array(ids, np.uint32), "mask": (np.arange(len(ids)) >= first).astype(np.uint8)}
    parts = sample_row(row, 0, tokenizer)["masked_text"]
    assert [part["target"] for part in parts] == [False, True]
    assert parts[1]["text"].startswith(" ") and "".join(part["text"] for part in parts) == "of keys and values"
