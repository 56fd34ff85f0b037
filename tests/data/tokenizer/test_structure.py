"""Where a text may be cut: never a place that changes an id, for every family of tokenizers that is known."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from nemo_prolong.data.tokenizer import TextEncoder
from nemo_prolong.data.tokenizer import encoder as encoder_module
from nemo_prolong.data.tokenizer.structure import Cutter, find_cutter

# Written out as published, so that a slip in how structure.py composes them would leave a family whole.
SPLITS = {
    "gpt2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "llama3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "o200k": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "tekken": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
TRAINING = [
    "the window don't I'LL of 12 345 buffers  \n\n\n x/y\r\n\t\tpass",
    "caf\u00e9 \u4e2d\u6587\uff0c\u3002 = (a.b) <b>x</b>\n//",
] * 30
PARTS = [
    *" \t\r\n\x0b\x85\u00a0\u2003\u3000\u2028\x1c\u200b\u180e'\u2019sStTlLreaZ\u017f\u212a\u00e9\u0301\u0e33",
    *"\u4e2d\u3042\ud55c\u1112\u1161\u3002\uff0c\U0001f600\u200d1\u06699\u00bd.=<|>/_-\x00",
    *("<|eot_id|>", "<think>", "<think", "think>", "'RE", "\r\n", " \n", "\n/", "a" * 20, " " * 20, "x1y2"),
]
TEXT = st.one_of(
    st.lists(st.sampled_from(PARTS), max_size=60).map("".join),
    # Few kinds of characters meet in more ways.
    st.lists(st.sampled_from(PARTS), min_size=2, max_size=4).flatmap(
        lambda few: st.lists(st.sampled_from(few), max_size=60).map("".join)
    ),
)


def build(family: str, variant: str) -> Tokenizer:
    """A small tokenizer of a family; ``variant="qwen"`` adds NFC and tokens that are matched in text."""
    tokenizer = Tokenizer(models.BPE())
    split = Regex(SPLITS[family])
    steps: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=family == "gpt2")]
    if family == "o200k":  # as it is converted: the matches are kept, what is between them removed
        steps.insert(0, pre_tokenizers.Split(split, "removed", invert=True))
    elif family != "gpt2":
        steps.insert(0, pre_tokenizers.Split(split, "isolated"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    if variant == "qwen":
        tokenizer.normalizer = normalizers.NFC()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TRAINING, trainer)
    tokenizer.add_special_tokens(["<|eot_id|>"])
    if variant == "qwen":
        tokenizer.add_tokens([AddedToken(token, normalized=False) for token in ("<think>", "</think>")])
    return tokenizer


@pytest.fixture(scope="module", params=[(f, v) for f in SPLITS for v in ("plain", "qwen")], ids="-".join)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, TextEncoder]:
    directory = tmp_path_factory.mktemp("family")
    build(*request.param).save(str(directory / "tokenizer.json"))
    return {library: TextEncoder(directory, library) for library in ("tokenizers", "fast")}


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(text=TEXT, data=st.data())
def test_a_stream_has_the_ids_of_the_text_in_every_family(
    family: dict[str, TextEncoder], text: str, data: st.DataObject
) -> None:
    [whole] = family["tokenizers"].encode_with_offsets([text])
    places = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    pieces = [text[start:end] for start, end in zip([0, *places], [*places, len(text)], strict=True)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder_module, "_CHUNK_CHARACTERS", data.draw(st.sampled_from([1, 5, 20])))
        for encoder in family.values():
            streamed = [int(token) for part in encoder.encode_stream(pieces) for token in part]
            assert streamed == whole.ids


def check_every_cut(tokenizer: Tokenizer, cutter: Cutter, text: str) -> None:
    """What is before and after an allowed place is split as it is in the whole text, whatever the model makes of it."""
    splits = [split for split, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
    for place in range(1, len(text)):
        if cutter.allows(text, place):
            parts = [tokenizer.pre_tokenizer.pre_tokenize_str(part) for part in (text[:place], text[place:])]
            assert [split for part in parts for split, _ in part] == splits, (text, place)


@pytest.fixture(scope="module", params=list(SPLITS))
def splitter(request: pytest.FixtureRequest) -> tuple[Tokenizer, Cutter]:
    tokenizer = build(request.param, "plain")
    cutter = find_cutter(json.loads(tokenizer.to_str()))
    assert isinstance(cutter, Cutter)
    return tokenizer, cutter


def test_every_short_text_is_split_alike_around_a_cut(splitter: tuple[Tokenizer, Cutter]) -> None:
    for characters in itertools.product(" \n\r\u3000aS's1./\u4e2d\u0301", repeat=4):
        check_every_cut(*splitter, "".join(characters))


@settings(deadline=None, max_examples=200)
@given(text=TEXT)
def test_every_text_is_split_alike_on_both_sides_of_a_cut(splitter: tuple[Tokenizer, Cutter], text: str) -> None:
    check_every_cut(*splitter, text)


@pytest.mark.parametrize(
    "text",
    [
        "the window of the buffer",
        "x=1;y=2;z(x,y)",
        "\u4e2d\u6587\uff0c\u6ca1\u6709\u7a7a\u683c\u3002\u4e2d\u6587",
        "aGVsbG8gd29ybGQgMTIzNDU2",
    ],
    ids=["words", "code without spaces", "chinese", "base64"],
)
def test_texts_without_spaces_or_lines_are_cut_too(family: dict[str, TextEncoder], text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder_module, "_CHUNK_CHARACTERS", 12)
        assert len(list(family["tokenizers"].encode_stream([text * 20]))) > 10


def test_a_run_without_a_place_to_cut_is_one_part(family: dict[str, TextEncoder]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder_module, "_CHUNK_CHARACTERS", 12)
        for run in ("a" * 500, " " * 500, "." * 500):
            assert len(list(family["tokenizers"].encode_stream([run]))) == 1


def definition(**changes: object) -> dict[str, Any]:
    return json.loads(build("llama3", "plain").to_str()) | changes


def added(**changes: object) -> list[dict[str, object]]:
    return [{"content": "<t>", "special": False, "lstrip": False, "rstrip": False, "single_word": False, **changes}]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"model": {"type": "Unigram"}}, "its model is no deterministic BPE"),
        ({"model": {"type": "BPE", "dropout": 0.1}}, "its model is no deterministic BPE"),
        ({"normalizer": {"type": "NFKC"}}, "its normalizer NFKC may look at the whole text"),
        ({"pre_tokenizer": None}, "its pre-tokenizer is none of the byte-level families known here"),
        ({"pre_tokenizer": {"type": "Metaspace"}}, "its pre-tokenizer is none of the byte-level families known here"),
        (
            {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}},
            "its pre-tokenizer is none of the byte-level families known here",
        ),
        ({"added_tokens": added(rstrip=True)}, "its added token <t> is matched with what stands around it"),
        (
            {"added_tokens": added(normalized=True), "normalizer": {"type": "NFC"}},
            "its added token <t> is matched with what stands around it",
        ),
    ],
)
def test_a_tokenizer_that_looks_too_far_is_not_cut(changes: dict[str, object], why: str) -> None:
    assert find_cutter(definition(**changes)) == why


def test_no_cut_falls_into_an_added_token() -> None:
    cutter = find_cutter(json.loads(build("llama3", "qwen").to_str()))
    assert not isinstance(cutter, str)
    inside = "abc <think> def"
    assert not cutter.allows(inside, inside.index(">"))
    assert cutter.allows("abc think> def", "abc think> def".index(">"))
    # The end may be within </think>, so places there are not known yet.
    text = "some words, a</thi"
    assert Cutter(cutter.places, ()).last_place(text) == text.index("<")
    assert cutter.last_place(text) == text.index(",")
