"""Tokenizers of the kinds that treat the edges of a text differently, each trained on a little JSON and prose."""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from nemo_prolong.data.tokenizer import train_tokenizer

BOS, EOS, UNKNOWN = "<s>", "</s>", "<unk>"
_BYTES = [f"<0x{number:02X}>" for number in range(256)]


def texts():
    """Return texts of the kind that recall asks about, so that merges across quotes and digits are learnt."""
    random = Random(0)
    prose = ["Below is a JSON object of keys and values. Its value is: caf\u00e9, na\u00efve, \u4e2d\u6587."] * 40
    for _ in range(60):
        words = ["".join(random.choices("bcdfghjklmnpqrstvwxz", k=4)) for _ in range(100)]
        pairs = ", ".join(f'"{word}": "{random.randint(1000, 9999)}"' for word in words)
        prose.append(f'{{{pairs}}}\n\n{{"{words[0]}": "{random.randint(1000, 9999)}"}}')
    return prose


def llama3(directory):
    """Byte-level, split by Llama-3's expression, BOS by its post-processor: the miniature's kind."""
    train_tokenizer(texts(), 700, directory)
    return AutoTokenizer.from_pretrained(str(directory), local_files_only=True)


def llama2(directory):
    """A space before every text, byte fallback, no pre-tokenizer, digits one by one."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.Metaspace(prepend_scheme="first")]
    )
    special = [UNKNOWN, BOS, EOS]
    tokenizer.train_from_iterator(
        texts(), trainers.BpeTrainer(vocab_size=800, special_tokens=[*special, *_BYTES], show_progress=False)
    )
    definition = json.loads(tokenizer.to_str())
    definition["added_tokens"] = [token for token in definition["added_tokens"] if token["content"] in special]
    definition["pre_tokenizer"] = None
    tokenizer = Tokenizer.from_str(json.dumps(definition))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, unk_token=UNKNOWN)


def metaspace(directory):
    """A space before every text by the pre-tokenizer, Unigram."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=500, special_tokens=[UNKNOWN, BOS, EOS], unk_token=UNKNOWN, show_progress=False
    )
    tokenizer.train_from_iterator(texts(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, unk_token=UNKNOWN)


def wordpiece(directory):
    """Words and punctuation apart, spaces lost, other pieces inside a word, [CLS] and [SEP] around a text."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=700, special_tokens=["[UNK]", "[CLS]", "[SEP]"], show_progress=False)
    tokenizer.train_from_iterator(texts(), trainer)
    ids = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")


def merging(directory):
    """Byte-level without a split, with trimmed offsets: quotes merge with the digits on both sides."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=1200, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts(), trainer)
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>")


KINDS: dict[str, Callable[..., PreTrainedTokenizerFast]] = {
    kind.__name__: kind for kind in (llama3, llama2, metaspace, wordpiece, merging)
}
