"""The tokens of a text that is made of pieces, and which of them are whose.

The tokens of a joined text are not those of its pieces one after the other. A tokenizer may put a space before every
text, or merge the end of one piece with the beginning of the next. A model has only seen joined text. So whatever needs
the tokens of a part, such as the answer to a prompt, encodes the whole and cuts it by the characters of its tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer


class TokenSpan(NamedTuple):
    """Tokens ``first`` to ``end`` (exclusive) of a joined text."""

    first: int
    end: int


class JoinedTokens(NamedTuple):
    """Tokens of a joined text.

    Attributes:
        ids: int64 [T], without special tokens at the beginning or the end.
        spans: For each piece, the tokens that hold one of its characters. A token across the edge of two pieces is in
            the spans of both.
    """

    ids: NDArray[np.int64]
    spans: tuple[TokenSpan, ...]

    def before(self, piece: int) -> NDArray[np.int64]:
        """Return the tokens that hold nothing of a piece or of what follows it, int64 [N]."""
        return self.ids[: self.spans[piece].first]

    def of(self, piece: int) -> NDArray[np.int64]:
        """Return the tokens that hold a character of a piece, int64 [A]."""
        first, end = self.spans[piece]
        return self.ids[first:end]


class JoinedEncoder:
    """Encodes texts that are made of pieces.

    Args:
        tokenizer: Of the ``tokenizers`` library; it is copied and stays as it is.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = copy.deepcopy(tokenizer)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # Without special tokens it changes no id; that of byte-level tokenizers takes white space out of the offsets.
        self._tokenizer.post_processor = None

    def __call__(self, pieces: Sequence[str]) -> JoinedTokens:
        """Return the tokens of the joined pieces."""
        encoding = self._tokenizer.encode("".join(pieces), add_special_tokens=False)
        ids, offsets = np.array(encoding.ids, np.int64), np.array(encoding.offsets, np.int64).reshape(-1, 2)
        starts, ends = offsets[:, 0], np.maximum(offsets[:, 1], offsets[:, 0] + 1)
        edges = np.cumsum([0, *map(len, pieces)])
        # Tokens are in the order of their characters. Several may stand for one character, and none for a space.
        firsts = np.searchsorted(ends, edges[:-1], side="right")
        stops = np.maximum(np.searchsorted(starts, edges[1:], side="left"), firsts)
        spans = (TokenSpan(first, stop) for first, stop in zip(firsts.tolist(), stops.tolist(), strict=True))
        return JoinedTokens(ids, tuple(spans))
