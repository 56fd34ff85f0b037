"""Small tokenizers of several families, as ``transformers`` directories, and chat templates for them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

_WORDS = "window buffer token Paris length caf\u00e9 shard order value branch record is the capital of France".split()

LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
LLAMA2_TRAINING = LLAMA2.replace(
    " {{ m['content'] }}{{ eos_token }}", "{% generation %} {{ m['content'] }}{{ eos_token }}{% endgeneration %}"
)
LLAMA2_TRAINING_WITHOUT_SPACE = LLAMA2.replace(
    " {{ m['content'] }}{{ eos_token }}", " {% generation %}{{ m['content'] }}{{ eos_token }}{% endgeneration %}"
)


def _texts() -> list[str]:
    rng = random.Random(0)
    return [" ".join(rng.choices(_WORDS, k=12)) + ", [INST] 0123456789 [/INST]: (x)!" for _ in range(200)]


def _save(tokenizer: dict[str, Any], directory: Path, tokenizer_class: str = "PreTrainedTokenizerFast") -> Path:
    directory.mkdir(parents=True)
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False))
    config = {
        "tokenizer_class": tokenizer_class,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        "chat_template": LLAMA2,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


_SPECIAL = ["<unk>", "<s>", "</s>"]


def llama2_tokenizer(directory: Path) -> Path:
    """BPE with byte fallback; a normalizer puts the space before a text."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    special = [*_SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator(
        _texts(), trainers.BpeTrainer(vocab_size=420, special_tokens=special, show_progress=False)
    )
    saved = json.loads(tokenizer.to_str())
    saved["added_tokens"] = [token for token in saved["added_tokens"] if token["id"] < len(_SPECIAL)]
    saved["normalizer"] = {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": "\u2581"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
        ],
    }
    saved["pre_tokenizer"] = None
    return _save(saved, directory, "LlamaTokenizerFast")


def metaspace_tokenizer(directory: Path) -> Path:
    """BPE with byte fallback, NFKC and Metaspace."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    special = [*_SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator(
        _texts(), trainers.BpeTrainer(vocab_size=420, special_tokens=special, show_progress=False)
    )
    saved = json.loads(tokenizer.to_str())
    saved["added_tokens"] = [token for token in saved["added_tokens"] if token["id"] < len(_SPECIAL)]
    return _save(saved, directory)


def unigram_tokenizer(directory: Path) -> Path:
    """SentencePiece's other model, with NFKC and lower case."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=_SPECIAL, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(_texts(), trainer)
    return _save(json.loads(tokenizer.to_str()), directory)


def wordpiece_tokenizer(directory: Path) -> Path:
    """BERT's kind: lower case without accents, words and marks apart."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=_SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(_texts(), trainer)
    return _save(json.loads(tokenizer.to_str()), directory)


def add_special_tokens(directory: Path, *tokens: str, **flags: bool) -> None:
    """Add special tokens to a saved tokenizer."""
    path = directory / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False, **flags) for token in tokens])
    path.write_text(tokenizer.to_str())
