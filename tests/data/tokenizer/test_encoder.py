"""Any text has the ids of ``transformers``, whole or in a stream, with the reference or the quicker library."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from nemo_prolong.config.schema.prepare import TokenizerConfig
from nemo_prolong.data.tokenizer import TextEncoder
from nemo_prolong.data.tokenizer import encoder as encoder_module
from nemo_prolong.errors import DataError

AWKWARD = st.text(
    alphabet=st.sampled_from(
        list(
            " \t\r\n\x0b\x85\u00a0\u2003\u3000\u200b'sSdtTlLaZ\u017f\u00e9\u0301\u4e2d\U0001f600\u200d1\u06690.=<|>_eot"
        )
    ),
    max_size=200,
)
TEXTS = st.lists(
    st.one_of(AWKWARD, st.text(max_size=60), st.sampled_from(["<|eot_id|>", " " * 40, "a" * 50])), max_size=6
)


@pytest.fixture(scope="module", params=["tokenizers", "fast"])
def encoder(tokenizer_directory: Path, request: pytest.FixtureRequest) -> TextEncoder:
    return TextEncoder(tokenizer_directory, request.param)


@pytest.fixture(scope="module")
def tokenizer(tokenizer_directory: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(tokenizer_directory)


def reference_ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


def clean(text: str) -> str:
    return text.encode("utf-8", "ignore").decode()


@settings(deadline=None)
@given(parts=TEXTS)
@example(parts=["don", "'", "t  ", "\n", " x"])
@example(parts=["\n   ", "\n x", "\r", "\n"])
def test_a_stream_in_pieces_has_the_ids_of_the_whole(
    encoder: TextEncoder, tokenizer: PreTrainedTokenizerFast, parts: list[str]
) -> None:
    pieces = [clean(part) for part in parts]
    whole = reference_ids(tokenizer, "".join(pieces))
    before = encoder_module._CHUNK_CHARACTERS
    try:
        for chunk in (1, 7, 64):
            encoder_module._CHUNK_CHARACTERS = chunk
            streamed = [int(token) for part in encoder.encode_stream(pieces) for token in part]
            assert streamed == whole
            assert encoder.encode_texts(["".join(pieces)])[0].tolist() == whole
    finally:
        encoder_module._CHUNK_CHARACTERS = before


@pytest.mark.parametrize(
    "text", ["", "a" * 100_000, " " * 50_000 + "x", "\n" * 50_000, "\u4e2d" * 50_000, "1" * 50_000]
)
def test_long_runs_have_the_ids_of_the_reference(
    encoder: TextEncoder, tokenizer: PreTrainedTokenizerFast, text: str
) -> None:
    assert encoder.encode_texts([text])[0].tolist() == reference_ids(tokenizer, text)


def test_the_quicker_library_is_taken_for_the_same_ids(tokenizer_directory: Path) -> None:
    assert TextEncoder(tokenizer_directory).library == "fast"
    assert TextEncoder(tokenizer_directory, "tokenizers").library == "tokenizers"


def test_a_huge_text_streams_in_little_memory(tokenizer_directory: Path) -> None:
    encoder = TextEncoder(tokenizer_directory)
    piece = "window buffer token length, shard order value branch.\n" * 2000
    tracemalloc.start()
    tokens = sum(len(part) for part in encoder.encode_stream(piece for _ in range(200)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # 21 million characters; numpy and Python objects are traced.
    assert tokens > 4_000_000 and peak < 30 * 2**20


def sentencepiece_like(directory: Path) -> TextEncoder:
    """A tokenizer whose ids at one place depend on text far away: no pre-tokenizer, a normalizer."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("_"), normalizers.Replace(" ", "_")])
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(["the window of the buffer is a token " * 30], trainer)
    directory.mkdir()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": {"content": "</s>"}}))
    return TextEncoder(directory)


def test_a_tokenizer_that_needs_whole_texts_gets_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = sentencepiece_like(tmp_path / "sp")
    assert (encoder.cutter, encoder.library) == (None, "tokenizers")
    monkeypatch.setattr(encoder_module, "_CHUNK_CHARACTERS", 8)
    text = "the window of the buffer"
    reference = Tokenizer.from_file(str(tmp_path / "sp" / "tokenizer.json"))
    streamed = [int(token) for part in encoder.encode_stream([text[:5], text[5:]]) for token in part]
    assert streamed == reference.encode(text, add_special_tokens=False).ids
    monkeypatch.setattr(encoder_module, "_WHOLE_CHARACTERS", 20)
    with pytest.raises(DataError, match=r"must encode a document whole, because .* more than 20 characters"):
        list(encoder.encode_stream([text]))


def test_bos_and_eos_are_the_tokenizers_but_end_of_text_ends_documents(
    tokenizer_directory: Path, tmp_path: Path
) -> None:
    llama = TextEncoder(tokenizer_directory)
    assert llama.resolve_bos_eos(TokenizerConfig()) == ("<|begin_of_text|>", "<|end_of_text|>")
    assert llama.resolve_bos_eos(TokenizerConfig(eos_token="<|eot_id|>", add_bos=False)) == (None, "<|eot_id|>")
    other = sentencepiece_like(tmp_path / "sp")
    assert other.resolve_bos_eos(TokenizerConfig()) == ("<s>", "</s>")
    with pytest.raises(DataError) as refusal:
        other.resolve_bos_eos(TokenizerConfig(eos_token="<|none|>"))
    assert str(refusal.value) == (
        f"tokenizer.eos_token=<|none|>: the tokenizer {tmp_path}/sp has no such token. "
        "Set tokenizer.eos_token to one of <unk>, <s>, </s>, or tokenizer.add_eos=false."
    )


def test_an_eos_that_ends_a_turn_does_not_end_documents(tokenizer_directory: Path, tmp_path: Path) -> None:
    for path in tokenizer_directory.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": "<|eot_id|>"}))
    assert TextEncoder(tmp_path).resolve_bos_eos(TokenizerConfig())[1] == "<|end_of_text|>"


def test_the_hash_is_of_what_decides_ids_not_of_the_layout(tokenizer_directory: Path, tmp_path: Path) -> None:
    content = json.loads((tokenizer_directory / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(content, indent=None))
    assert TextEncoder(tmp_path).sha256 == TextEncoder(tokenizer_directory).sha256
    content["model"]["merges"] = content["model"]["merges"][:-1]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert TextEncoder(tmp_path).sha256 != TextEncoder(tokenizer_directory).sha256


def test_ids_are_uint32_and_no_text_gives_no_ids(encoder: TextEncoder) -> None:
    assert [ids.dtype for ids in encoder.encode_texts(["window", ""])] == [np.uint32, np.uint32]
    assert len(encoder.encode_texts([""])[0]) == 0 and list(encoder.encode_stream([])) == []


def test_gpt2s_pre_tokenizer_may_be_cut_too(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        ["the window don't of 12 buffers  \n\n x" * 30],
        trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert TextEncoder(tmp_path, "tokenizers").cutter is not None
