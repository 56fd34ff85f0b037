"""The quicker library, ``fastokens``: token ids of BPE tokenizers and nothing else, many times as fast.

It is used where texts can be cut, which is the family it was compared on, and only after it gave the ids of
``tokenizers`` on a text of every kind and on pieces of the vocabulary itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

_SAMPLED_TOKENS = 4096
_FRAGMENTS = (
    "def f(x):\n\n\n    return x[1:-1]  # 12345.6789e-10\n\t\tpass\r\n\r\n",
    "I'm, you're, HE'LL, we'Ve; it\u2019s 'tis don't'd \u017f'\u017f \u212aelvin  ",
    "caf\u00e9 cafe\u0301 na\u00efve \u0130stanbul \u01c5ungla \u2167 \u00bd \u0661\u0662\u0663\u0664 1234567",
    "\u4e2d\u6587\uff0c\u6ca1\u6709\u7a7a\u683c\u3002\u65e5\u672c\u8a9e\u306e\u6587\u7ae0\u3067\u3059\u3002"
    "\ud55c\uad6d\uc5b4 \u1112\u1161\u11ab",
    "\u0e44\u0e17\u0e22\u0e33 \u0939\u093f\u0928\u094d\u0926\u0940"
    " \u05e2\u05b4\u05d1\u05e8\u05d9 \u0627\u0644\u0639\u0631\u0628\u064a\u0629",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \ufe0f\u20e3 \U00020000",
    "\u00a0\u2003\u3000\u2028\x85\x0b\x0c\x1c\u200b\ufeff\u180e\x00\x7f \u00a0x\u3000\u3000y",
    " " * 70 + "a" + "\n" * 70 + "\t" * 9 + " \n \r\n \r" + "=" * 300 + "a" * 300 + "1" * 300 + "\u4e2d" * 300,
    "<|eot_id|><|begin_of_text|>a<|im_end|></s> <think>b</think>\n<|x|",
    "https://example.org/a?b=c&d=%20#e /usr/lib//x.so\\n C:\\dir {'k': [1, None]} <a href=\"x\">$\\alpha_{i}$</a>",
)


class FastLibrary:
    """Encodes with ``fastokens``.

    Args:
        tokenizer: The reference, set up to encode special tokens as text, without truncation and padding.

    Raises:
        ImportError: If it is not installed.
        ValueError: If it cannot load this tokenizer, or gave other ids than the reference.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        from fastokens import Tokenizer as FastTokenizer

        self._tokenizer = FastTokenizer.from_json_str(tokenizer.to_str())
        texts = list(_check_texts(tokenizer))
        expected = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        for text, encoding, ids in zip(texts, expected, self.encode(texts), strict=True):
            if encoding.ids != ids.tolist():
                raise ValueError(f"fastokens gives other ids than tokenizers for {ascii(text)[:60]}")

    def encode(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """Return the ids of each text, uint32 [T]."""
        ids, ends = self._tokenizer.encode_batch_flat(list(texts), split_special_tokens=True)
        flat = np.frombuffer(ids, np.dtype("<u4")).astype(np.uint32, copy=False)
        return [flat[start:end] for start, end in pairwise(np.frombuffer(ends, np.dtype("<u8")).tolist())]


def _check_texts(tokenizer: Tokenizer) -> Iterator[str]:
    """Yield texts of every kind, alone, joined in two orders, and cut at every place."""
    yield from _FRAGMENTS
    yield "".join(_FRAGMENTS)
    yield " ".join(reversed(_FRAGMENTS))
    for fragment in _FRAGMENTS:
        for place in range(0, min(len(fragment), 80), 3):
            yield fragment[place : place + 40]
    vocab_size = tokenizer.get_vocab_size()
    step = max(1, vocab_size // _SAMPLED_TOKENS)
    tokens = [tokenizer.decode([token], skip_special_tokens=False) for token in range(0, vocab_size, step)]
    yield from tokens
    yield "".join(tokens)
