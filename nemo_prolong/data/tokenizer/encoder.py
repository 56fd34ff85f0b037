"""Text to token ids, exactly those of ``transformers``, for documents of any length."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from nemo_prolong.config.schema.prepare import TokenizerConfig
from nemo_prolong.data.tokenizer.fast import FastLibrary
from nemo_prolong.data.tokenizer.identity import definition_sha256
from nemo_prolong.data.tokenizer.saved import CONFIG_FILE, MAP_FILE, read_object
from nemo_prolong.data.tokenizer.special_tokens import named_tokens
from nemo_prolong.data.tokenizer.structure import find_cutter
from nemo_prolong.errors import ConfigError, DataError

END_OF_TEXT = "<|end_of_text|>"
_CHUNK_CHARACTERS = 2**15
"""Texts are cut into about this much: larger strings are copied more slowly, and one character beyond Latin-1 widens
all the others."""
_GROUP_CHARACTERS = 2**21
"""The reference is given this much at once, to use all cores."""
_WHOLE_CHARACTERS = 2**24
"""Longest text of a tokenizer whose texts cannot be cut: about 2 GiB of memory."""


class TextEncoder:
    """Encodes text with a saved tokenizer, without special tokens.

    Text that looks like a special token is encoded as the text that it is, as ``transformers`` does with
    ``add_special_tokens=False, split_special_tokens=True``.

    Args:
        directory: A ``transformers`` directory with a ``tokenizer.json``.
        library: ``tokenizers`` is the reference, ``fast`` is fastokens, ``auto`` takes the second where it can.

    Attributes:
        directory: As given.
        library: ``tokenizers`` or ``fast``: what is in use.
        cutter: Finds where texts may be cut, or None where they must be encoded whole.

    Raises:
        DataError: If there is no such tokenizer.
        ConfigError: If ``library="fast"`` cannot be had.
    """

    def __init__(self, directory: str | Path, library: Literal["auto", "tokenizers", "fast"] = "auto") -> None:
        self.directory = Path(directory)
        self._reference = _load(self.directory)
        self.definition: dict[str, Any] = json.loads(self._reference.to_str())
        cutter = find_cutter(self.definition)
        self._why_whole = cutter if isinstance(cutter, str) else ""
        self.cutter = None if isinstance(cutter, str) else cutter
        self._fast = None if library == "tokenizers" else self._load_fast(required=library == "fast")
        self.library: Literal["tokenizers", "fast"] = "tokenizers" if self._fast is None else "fast"

    def _load_fast(self, required: bool) -> FastLibrary | None:
        try:
            if self.cutter is None:
                raise ValueError(f"the fast library is not used for {self.directory}, because {self._why_whole}")
            return FastLibrary(self._reference)
        except (ImportError, ValueError) as error:
            if not required:
                return None
            remedy = "Install fastokens, or set tokenizer.library=auto to use it only where it gives the same ids."
            raise ConfigError("tokenizer.library=fast", f"{error}.", remedy) from error

    @cached_property
    def vocab_size(self) -> int:
        """One more than the highest token id, added tokens included."""
        highest: int = max((token["id"] for token in self.definition["added_tokens"]), default=-1)
        size: int = self._reference.get_vocab_size()
        return max(size, highest + 1)

    @cached_property
    def sha256(self) -> str:
        """Hash of all that decides the ids of a text (``identity``)."""
        return definition_sha256(self.definition)

    @cached_property
    def special_tokens(self) -> tuple[str, ...]:
        """The special tokens in the order of their ids."""
        added = sorted(self.definition["added_tokens"], key=lambda token: token["id"])
        return tuple(token["content"] for token in added if token["special"])

    @cached_property
    def unknown_id(self) -> int | None:
        """The id that stands for text without a token, None where every text has tokens."""
        model = self.definition["model"]
        unknown = model.get("unk_token")
        token_id = model.get("unk_id") if unknown is None else self._reference.token_to_id(unknown)
        return None if token_id is None else int(token_id)

    @cached_property
    def named_tokens(self) -> dict[str, str | list[str]]:
        """The special tokens by the names that ``transformers`` has for them, such as ``bos_token``."""
        return named_tokens(*(read_object(self.directory / file) for file in (CONFIG_FILE, MAP_FILE)))

    def named_token(self, name: str) -> str | None:
        """Return the token that the tokenizer calls ``name``, such as ``bos_token``, or None."""
        token = self.named_tokens.get(name)
        return token if isinstance(token, str) else None

    def special_id(self, token: str) -> int:
        """Return the id of a token.

        Raises:
            DataError: If the tokenizer has no such token.
        """
        token_id = self._reference.token_to_id(token)
        if token_id is None:
            raise DataError(
                f"tokenizer={self.directory}",
                f"has no token {token}.",
                f"Its special tokens are {_listed(self.special_tokens)}; set one of them, or take another tokenizer.",
            )
        return int(token_id)

    def resolve_bos_eos(self, config: TokenizerConfig) -> tuple[str | None, str | None]:
        """Return the tokens put before and after a document; None where the configuration wants none.

        By default ``<|end_of_text|>`` ends a document if the tokenizer has it: the ``eos_token`` of an instruct
        tokenizer may be ``<|eot_id|>``, which ends a turn and not a document.

        Raises:
            DataError: If a token that is wanted does not exist.
        """
        eos = END_OF_TEXT if self._reference.token_to_id(END_OF_TEXT) is not None else self.named_token("eos_token")
        bos = config.bos_token or self.named_token("bos_token")
        return (
            self._existing("bos", bos) if config.add_bos else None,
            self._existing("eos", config.eos_token or eos) if config.add_eos else None,
        )

    def _existing(self, name: str, token: str | None) -> str:
        if token is not None and self._reference.token_to_id(token) is not None:
            return token
        raise DataError(
            f"tokenizer.{name}_token={token or 'null'}",
            f"the tokenizer {self.directory} has no {'such token' if token else f'{name}_token'}.",
            f"Set tokenizer.{name}_token to one of {_listed(self.special_tokens)}, or tokenizer.add_{name}=false.",
        )

    def encode_texts(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """Return the ids of each text, uint32 [T].

        Raises:
            DataError: As ``encode_stream``.
        """
        chunks = [list(self._chunks([text])) for text in texts]
        encoded = self._encode_chunks([chunk for parts in chunks for chunk in parts])
        return [_concatenate([next(encoded) for _ in parts]) for parts in chunks]

    def encode_stream(self, pieces: Iterable[str]) -> Iterator[NDArray[np.uint32]]:
        """Yield the ids of one text that comes in pieces, uint32 [N] each, in memory that does not grow with it.

        Joined they are the ids of the joined text. Memory grows with a stretch that allows no cut: a run of letters,
        digits, punctuation marks or white space is one unit of the tokenizer, so its ids need all of it.

        Raises:
            DataError: If the tokenizer needs texts whole, and this one is too long for that.
        """
        for chunk in self._chunks(pieces):
            yield from self._encode_chunks([chunk])

    def encode_with_offsets(self, texts: Sequence[str], special: bool = False) -> list[Encoding]:
        """Return encodings with the characters of each token, from the reference.

        Args:
            texts: Short texts.
            special: Encode the text of a special token as that token.
        """
        self._reference.encode_special_tokens = not special
        try:
            return list(self._reference.encode_batch(list(texts), add_special_tokens=False))
        finally:
            self._reference.encode_special_tokens = True

    def _encode_chunks(self, chunks: Sequence[str]) -> Iterator[NDArray[np.uint32]]:
        for group in _groups(chunks):
            if self._fast is not None:
                yield from self._fast.encode(group)
            else:
                for encoding in self._reference.encode_batch_fast(group, add_special_tokens=False):
                    yield np.array(encoding.ids, np.uint32)

    def _chunks(self, pieces: Iterable[str]) -> Iterator[str]:
        """Yield parts whose ids, joined, are those of the joined pieces."""
        waiting, size, enough = [], 0, _CHUNK_CHARACTERS
        for part in _slices(pieces):
            waiting.append(part)
            size += len(part)
            if size < enough:
                continue
            if self.cutter is None:
                self._check_whole(size)
                continue
            text = "".join(waiting)
            place = self.cutter.last_place(text)
            if place is not None:
                yield text[:place]
                text = text[place:]
            # Where there is no place, look again when there is twice as much, so that the time stays linear.
            waiting, size, enough = [text], len(text), max(_CHUNK_CHARACTERS, 2 * len(text))
        if size:
            yield "".join(waiting)

    def _check_whole(self, characters: int) -> None:
        if characters > _WHOLE_CHARACTERS:
            raise DataError(
                f"tokenizer={self.directory}",
                f"must encode a document whole, because {self._why_whole}, and one has more than {_WHOLE_CHARACTERS:,} "
                "characters.",
                "Split such documents, leave them out (on_bad_document=drop), or take a byte-level tokenizer.",
            )


def _load(directory: Path) -> Tokenizer:
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise DataError(f"tokenizer={directory}", "has no tokenizer.json.", "Give a fast transformers tokenizer.")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise DataError(str(path), f"is no tokenizer: {error}.", "Copy the tokenizer again.") from error
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # Without special tokens it changes no id; some shift offsets.
    tokenizer.post_processor = None
    return tokenizer


def _slices(pieces: Iterable[str]) -> Iterator[str]:
    """Yield ``pieces`` in parts of at most a chunk."""
    for piece in pieces:
        for start in range(0, len(piece), _CHUNK_CHARACTERS):
            yield piece[start : start + _CHUNK_CHARACTERS]


def _groups(chunks: Sequence[str]) -> Iterator[list[str]]:
    group: list[str] = []
    size = 0
    for chunk in chunks:
        group.append(chunk)
        size += len(chunk)
        if size >= _GROUP_CHARACTERS:
            yield group
            group, size = [], 0
    if group:
        yield group


def _concatenate(parts: Sequence[NDArray[np.uint32]]) -> NDArray[np.uint32]:
    if len(parts) == 1:
        return parts[0]
    return np.concatenate([np.zeros(0, np.uint32), *parts])


def _listed(tokens: Sequence[str], most: int = 12) -> str:
    more = f" and {len(tokens) - most} more" if len(tokens) > most else ""
    return (", ".join(tokens[:most]) or "none") + more
