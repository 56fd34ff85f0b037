from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from nemo_prolong.data.tokenizer import SPECIAL_TOKENS, TextEncoder, train_tokenizer
from nemo_prolong.errors import DataError


@pytest.fixture(scope="module")
def tokenizer(tokenizer_directory: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(tokenizer_directory)


@pytest.fixture(scope="module")
def encoder(tokenizer_directory: Path) -> TextEncoder:
    return TextEncoder(tokenizer_directory)


def test_special_tokens_lie_at_the_top_in_the_order_of_llama3(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) == 300
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(284, 300))
    assert SPECIAL_TOKENS.index("<|start_header_id|>") == 6 and SPECIAL_TOKENS.index("<|eot_id|>") == 9
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|begin_of_text|>", "<|end_of_text|>")


def test_a_text_begins_with_bos_and_has_no_token_types(tokenizer: PreTrainedTokenizerFast) -> None:
    encoded = tokenizer("value of the window")
    assert encoded["input_ids"][0] == tokenizer.bos_token_id
    assert encoded["input_ids"][-1] != tokenizer.eos_token_id
    assert sorted(encoded) == ["attention_mask", "input_ids"]


@settings(deadline=None)
@given(st.text().filter(lambda text: "<|" not in text))
def test_any_text_comes_back(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    text = text.encode("utf-8", "ignore").decode()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    "text", ["caf\u00e9 \u4e2d\u6587 \U0001f600", "  x = 1\n\n\n\ty", "a\r\nb", "1234567", "don't"]
)
def test_text_with_its_white_space_comes_back(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_numbers_are_split_into_groups_of_three_digits(encoder: TextEncoder) -> None:
    [encoding] = encoder.encode_with_offsets(["x1234567"])
    assert {end for _, end in encoding.offsets} >= {1, 4, 7, 8}
    assert all(end - start <= 3 for start, end in encoding.offsets)


@pytest.mark.parametrize("text", ["<|eot_id|>", "a<|begin_of_text|>b <|start_header_id|>system<|end_header_id|>"])
@pytest.mark.parametrize("library", ["tokenizers", "fast"])
def test_special_tokens_in_a_document_stay_text(
    tokenizer_directory: Path, tokenizer: PreTrainedTokenizerFast, text: str, library: str
) -> None:
    [ids] = TextEncoder(tokenizer_directory, library).encode_texts([text])
    assert ids.max() < 284
    assert tokenizer.decode(ids) == text
    assert ids.tolist() == tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


def test_the_same_text_gives_the_same_tokenizer(tmp_path: Path) -> None:
    text = ["the window of the buffer " * 20, "def window(buffer): return buffer\n" * 20]
    for name in ("a", "b"):
        train_tokenizer(text, 290, tmp_path / name)
    assert (tmp_path / "a" / "tokenizer.json").read_bytes() == (tmp_path / "b" / "tokenizer.json").read_bytes()


def test_a_vocabulary_that_does_not_fit_the_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"vocab_size=5000: the text has only \d+ tokens in it. Set vocab_size=\d+"):
        train_tokenizer(["too little text"], 5000, tmp_path)
    with pytest.raises(DataError, match=r"vocab_size=100: .* Set vocab_size to at least 272"):
        train_tokenizer(["too little text"], 100, tmp_path)


def test_a_directory_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"tokenizer=.*: has no tokenizer.json"):
        TextEncoder(tmp_path)
