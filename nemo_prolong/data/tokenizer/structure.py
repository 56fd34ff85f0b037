r"""What a ``tokenizer.json`` does to text before its model: may a text be cut, and where.

A byte-level tokenizer first splits text with a regular expression. Its model never sees across the splits. So a text
may be cut, and its parts encoded apart, at a place where every text is split, whatever stands around it. Such places
are known here for the expressions of the common families, which none of these facts escapes:

- A match is a contraction, or one optional character and a run of letters, or digits, or an optional space and a run of
  other characters with line breaks after it, or white space. So no match goes on from a visible character to a space,
  from a letter or digit to a punctuation mark or a line break, or from a letter to a digit. The apostrophe is left out:
  some families match a contraction with its word.
- They look ahead only in ``\s+(?!\S)``: white space at the end of a text is split differently from white space inside.
  So no part may end in white space, with one exception: where ``\s*[\r\n]+`` comes before that alternative, white
  space that ends in a line break is matched whole either way, and what follows a line break begins a match.
- They do not look behind, and where matches end before a cut they do so for what is before it.

An NFC normalizer changes nothing of this: the characters after a cut are ASCII or CJK punctuation, which composes with
nothing. Special tokens are encoded as text. Other added tokens are found in the text first, so no cut may fall into
one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_UPPER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}"
_LOWER = r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_CONTRACTIONS = "'s|'t|'re|'ve|'m|'ll|'d"
_WORD = r"[^\r\n\p{L}\p{N}]?"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_OTHERS = r" ?[^\s\p{L}\p{N}]+"

GPT2_SPLIT = rf"{_CONTRACTIONS}| ?\p{{L}}+| ?\p{{N}}+|{_OTHERS}|\s+(?!\S)|\s+"
_BREAKING_SPLITS = (
    # Llama-3 and cl100k; Qwen 2 and 3.
    *(
        rf"(?i:{_CONTRACTIONS})|{_WORD}\p{{L}}+|{digits}|{_OTHERS}[\r\n]*|{_SPACES}"
        for digits in (r"\p{N}{1,3}", r"\p{N}")
    ),
    # o200k and Llama-4; Tekken of Mistral Nemo.
    *(
        rf"{_WORD}[{_UPPER}]*[{_LOWER}]+{tail}|{_WORD}[{_UPPER}]+[{_LOWER}]*{tail}|{digits}|{_OTHERS}[\r\n/]*|{_SPACES}"
        for tail, digits in ((f"(?i:{_CONTRACTIONS})?", r"\p{N}{1,3}"), ("", r"\p{N}"))
    ),
)

_CJK = "\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3"
_CJK_MARKS = "\u3001\u3002\uff01\uff08\uff09\uff0c\uff1a\uff1b\uff1f"
_ANY_FAMILY = (
    # U+180E was white space in old Unicode.
    "(?<=[^\\s\u180e])(?= )"
    rf"|(?<=[A-Za-z0-9{_CJK}])(?=[\r\n!-&(-/:-@\[-`{{-~{_CJK_MARKS}])"
    "|(?<=[A-Za-z])(?=[0-9])"
)
_CUTS = re.compile(_ANY_FAMILY)
_CUTS_OR_LINES = re.compile(rf"{_ANY_FAMILY}|(?<=[\r\n])(?=[!-.0-~{_CJK}])")
_FIRST_WINDOW = 64


@dataclass(frozen=True)
class Cutter:
    """Finds the places where a text may be cut.

    Attributes:
        places: Matches the empty string at every such place, but for added tokens.
        added_tokens: Contents of the added tokens that are found in text.
    """

    places: re.Pattern[str]
    added_tokens: tuple[str, ...]

    def allows(self, text: str, place: int) -> bool:
        """Return whether ``text``, or any text that it is a part of, may be cut before ``text[place]``.

        With added tokens this needs the text for their length on both sides.
        """
        return self.places.match(text, place) is not None and not self._is_inside_added_token(text, place)

    def last_place(self, text: str) -> int | None:
        """Return the last place that can be known to allow a cut when more text follows, or None."""
        # An added token may go on beyond the end.
        stop = len(text) - max(map(len, self.added_tokens), default=1) + 1
        start, window = stop, _FIRST_WINDOW
        while start > 1:
            start, end = max(1, start - window), start
            window *= 2
            for match in reversed(list(self.places.finditer(text, start, end))):
                place = match.start()
                if not self._is_inside_added_token(text, place):
                    return place
        return None

    def _is_inside_added_token(self, text: str, place: int) -> bool:
        return any(
            text.find(token, max(0, place - len(token) + 1), place + len(token) - 1) >= 0 for token in self.added_tokens
        )


def find_cutter(tokenizer: Mapping[str, Any]) -> Cutter | str:
    """Return the cutter for a ``tokenizer.json``, or in words why its texts must be encoded whole."""
    if tokenizer["model"].get("type", "BPE") != "BPE" or tokenizer["model"].get("dropout"):
        return "its model is no deterministic BPE"
    normalizer = tokenizer.get("normalizer")
    if normalizer is not None and normalizer["type"] != "NFC":
        return f"its normalizer {normalizer['type']} may look at the whole text"
    places = _places(tokenizer.get("pre_tokenizer"))
    if places is None:
        return "its pre-tokenizer is none of the byte-level families known here"
    added = [token for token in tokenizer.get("added_tokens", ()) if not token["special"]]
    for token in added:
        if token["lstrip"] or token["rstrip"] or token["single_word"] or (normalizer and token["normalized"]):
            return f"its added token {token['content']} is matched with what stands around it"
    return Cutter(places, tuple(token["content"] for token in added))


def _places(pre_tokenizer: Mapping[str, Any] | None) -> re.Pattern[str] | None:
    if pre_tokenizer is None:
        return None
    steps: Sequence[Mapping[str, Any]] = pre_tokenizer.get("pretokenizers") or [pre_tokenizer]
    byte_level = steps[-1]
    if byte_level["type"] != "ByteLevel" or byte_level["add_prefix_space"]:
        return None
    patterns = [_split_pattern(step) for step in steps[:-1]]
    if byte_level.get("use_regex", True):
        patterns.append(GPT2_SPLIT)
    if len(patterns) != 1:
        return None
    return {GPT2_SPLIT: _CUTS, **dict.fromkeys(_BREAKING_SPLITS, _CUTS_OR_LINES)}.get(patterns[0] or "")


def _split_pattern(step: Mapping[str, Any]) -> str | None:
    """Return the expression whose matches are the splits, or None."""
    if step["type"] != "Split" or (step["behavior"], step["invert"]) not in {("Isolated", False), ("Removed", True)}:
        return None
    expression: str | None = step["pattern"].get("Regex")
    return expression
