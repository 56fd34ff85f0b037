"""Tokens of a joined text, and which piece of it each belongs to."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from nemo_prolong.data.tokenizer.joined import JoinedEncoder, TokenSpan
from tests.support.tokenizers import KINDS


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request, tmp_path_factory):
    return KINDS[request.param](tmp_path_factory.mktemp(request.param) / "tokenizer")


PIECES = st.lists(st.text(st.sampled_from('ab19 "{}:,\n\u00e9\u4e2d'), max_size=8), min_size=1, max_size=5)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pieces=PIECES)
def test_the_ids_are_those_of_the_joined_text(tokenizer, pieces):
    joined = JoinedEncoder(tokenizer.backend_tokenizer)(pieces)
    assert joined.ids.tolist() == tokenizer("".join(pieces), add_special_tokens=False)["input_ids"]


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pieces=PIECES)
def test_a_piece_has_every_token_that_holds_one_of_its_characters(tokenizer, pieces):
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.post_processor = None
    encoding = backend.encode("".join(pieces), add_special_tokens=False)
    joined, start = JoinedEncoder(tokenizer.backend_tokenizer)(pieces), 0
    for number, piece in enumerate(pieces):
        end = start + len(piece)
        held = [n for n, (first, last) in enumerate(encoding.offsets) if first < end and last > start]
        assert joined.of(number).tolist() == [encoding.ids[n] for n in held]
        first, stop = joined.spans[number]
        assert held == list(range(first, stop))
        assert joined.before(number).tolist() == encoding.ids[:first]
        start = end


def test_a_token_across_an_edge_belongs_to_both_pieces(tmp_path):
    tokenizer = KINDS["merging"](tmp_path)
    text = '{"bdfg": "'
    joined = JoinedEncoder(tokenizer.backend_tokenizer)([text, "4821", '"}'])
    first, second, third = joined.spans
    assert first.end > second.first and second.end > third.first
    assert tokenizer.decode(joined.of(1)).strip().startswith('"4') or '"4' in tokenizer.decode(joined.of(1))
    assert tokenizer.decode(joined.ids) == '{"bdfg": "4821"}'


def test_a_space_that_no_token_holds_is_in_no_span(tmp_path):
    tokenizer = KINDS["wordpiece"](tmp_path)
    joined = JoinedEncoder(tokenizer.backend_tokenizer)(["of", " ", "keys"])
    assert joined.spans[1] == TokenSpan(joined.spans[0].end, joined.spans[0].end)
    assert joined.spans[2].first == joined.spans[0].end


def test_the_tokenizer_is_left_as_it_was(tmp_path):
    tokenizer = KINDS["llama3"](tmp_path / "t")
    before = tokenizer.backend_tokenizer.to_str()
    JoinedEncoder(tokenizer.backend_tokenizer)(["a", "b"])
    assert tokenizer.backend_tokenizer.to_str() == before and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id


def test_truncation_of_the_tokenizer_does_not_cut_a_long_text(tmp_path):
    tokenizer = KINDS["llama2"](tmp_path)
    tokenizer.backend_tokenizer.enable_truncation(8)
    tokenizer.backend_tokenizer.enable_padding(length=64)
    joined = JoinedEncoder(tokenizer.backend_tokenizer)(["a value of one " * 30, "9"])
    assert joined.spans[1].end == len(joined.ids) > 60
