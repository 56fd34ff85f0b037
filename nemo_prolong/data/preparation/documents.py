"""One unit of a source to tokens on disk: the work of one process.

Short documents are encoded in batches, huge ones in a stream, so that memory is bounded by the largest batch. BOS and
EOS go around text documents only: a conversation has its template's tokens, a span of a packed row keeps what it has.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemo_prolong.config.schema.prepare import SourceConfig
from nemo_prolong.data.conversation import Conversation
from nemo_prolong.data.preparation.encoders import EncoderConfig, chat_encoder, text_encoder
from nemo_prolong.data.preparation.token_store import TokenWriter
from nemo_prolong.data.preparation.workers import count_progress, disk_errors
from nemo_prolong.data.sources import read_unit
from nemo_prolong.data.sources.base import Document, Rejected, Unit, Unread
from nemo_prolong.data.storage.files import SourceFile
from nemo_prolong.data.storage.remote import local_copy
from nemo_prolong.data.tokenizer import ChatEncoder
from nemo_prolong.errors import DataError
from nemo_prolong.files import digest_file
from nemo_prolong.records.data_manifest import FileFacts

_BATCH_CHARACTERS = 2**21
_STREAMED_CHARACTERS = 2**20
"""Documents from this size on are encoded in a stream."""


@dataclass(frozen=True)
class HoldOut:
    """Which documents are for validation: a hash of the seed and the group, so no list has to be kept."""

    split: str
    fraction: float
    seed: int

    def __call__(self, group: str) -> bool:
        """Return whether the documents of ``group`` are held out."""
        if self.split != "auto":
            return self.split == "validation"
        digest = hashlib.sha256(f"{self.seed}\0{group}".encode()).digest()
        return int.from_bytes(digest[:8], "big") < self.fraction * 2**64


@dataclass(frozen=True)
class UnitTask:
    """Tokenize one unit into ``directory``; a task of ``workers.run_tasks``."""

    source: SourceConfig
    unit: Unit
    directory: Path
    encoder: EncoderConfig
    hold_out: HoldOut
    cache: Path | None

    def __call__(self) -> None:
        """Read, encode, write.

        Raises:
            DataError: For a document that cannot be read and is not to be dropped, or a full disk.
        """
        with disk_errors(self.directory.parent), TokenWriter(self.directory) as writer:
            unread = Unread()
            _Encoding(self, writer).run(read_unit(self.source, self.unit, self.cache, unread))
            writer.note_unread(unread)
            writer.publish([self._file_facts(file) for file in self.unit.files if self.unit.start == 0])

    def _file_facts(self, file: SourceFile) -> FileFacts:
        # The unit that begins a file answers for its hash, so every file has exactly one.
        path = local_copy(file, self.cache)
        return FileFacts(name=file.name, bytes=file.num_bytes, sha256=digest_file(path).sha256)


class _Encoding:
    """Documents of one unit, in their order, to the writer."""

    def __init__(self, task: UnitTask, writer: TokenWriter) -> None:
        self._config = task.encoder
        self._encoder = text_encoder(task.encoder)
        self._hold_out = task.hold_out
        self._drop = task.source.on_bad_document == "drop"
        self._writer = writer
        self._texts: list[tuple[Document, str]] = []
        self._conversations: list[tuple[Document, Conversation]] = []
        self._waiting_characters = 0
        self._bytes_to_report = task.unit.num_bytes

    def run(self, items: Iterator[Document | Rejected]) -> None:
        """Encode everything."""
        for item in items:
            if isinstance(item, Rejected):
                self._writer.reject(item)
            elif item.input_ids is not None:
                self._add_tokens(item)
            elif item.conversation is not None:
                self._conversations.append((item, item.conversation))
                self._wait(item.conversation.characters)
            else:
                self._add_text(item)
        self._flush()
        self._report(self._bytes_to_report, 0)

    def _report(self, num_bytes: int, tokens: int) -> None:
        num_bytes = min(num_bytes, self._bytes_to_report)
        self._bytes_to_report -= num_bytes
        count_progress(num_bytes, tokens)

    def _wait(self, characters: int) -> None:
        """Encode what waits when it is enough for a batch."""
        self._waiting_characters += characters
        if self._waiting_characters >= _BATCH_CHARACTERS:
            self._flush()

    def _flush(self) -> None:
        self._flush_texts()
        self._flush_conversations()
        self._waiting_characters = 0

    def _add_text(self, document: Document) -> None:
        assert document.pieces is not None
        pieces, head, characters = iter(document.pieces), [], 0
        try:
            for piece in pieces:
                head.append(piece)
                characters += len(piece)
                if characters >= _STREAMED_CHARACTERS:
                    self._flush()
                    self._stream(document, chain(head, pieces))
                    return
        except DataError as error:
            self._reject(document, error)
            return
        self._texts.append((document, "".join(head)))
        self._wait(characters)

    def _stream(self, document: Document, pieces: Iterator[str]) -> None:
        config = self._config
        try:
            for part in chain(_as_parts(config.bos_id), self._encoder.encode_stream(pieces), _as_parts(config.eos_id)):
                self._writer.append(part)
                self._report(4 * len(part), len(part))
        except DataError as error:
            self._writer.abandon_document()
            self._reject(document, error)
            return
        self._writer.finish_document(self._hold_out(document.group))

    def _flush_texts(self) -> None:
        documents, self._texts = self._texts, []
        before, after = _as_parts(self._config.bos_id), _as_parts(self._config.eos_id)
        for (document, text), ids in zip(
            documents, self._encoder.encode_texts([text for _, text in documents]), strict=True
        ):
            self._finish(document, np.concatenate([*before, ids, *after]), None, len(text))

    def _flush_conversations(self) -> None:
        documents, self._conversations = self._conversations, []
        if not documents:
            return
        encoder = chat_encoder(self._config)
        try:
            encoded = encoder.encode_batch([conversation for _, conversation in documents])
        except DataError:
            # One of them is at fault: find it, or leave it out.
            for document, conversation in documents:
                self._add_conversation(encoder, document, conversation)
            return
        for (document, conversation), tokens in zip(documents, encoded, strict=True):
            self._finish(document, tokens.input_ids, tokens.mask, conversation.characters)

    def _add_conversation(self, encoder: ChatEncoder, document: Document, conversation: Conversation) -> None:
        try:
            tokens = encoder.encode(conversation)
        except DataError as error:
            where = error.what.replace("conversation 0", document.key)
            self._reject(document, DataError(where, error.rule, error.remedy), "unusable_conversation")
            return
        self._finish(document, tokens.input_ids, tokens.mask, conversation.characters)

    def _add_tokens(self, document: Document) -> None:
        ids = np.asarray(document.input_ids)
        lowest, highest = int(ids.min()), int(ids.max())
        if lowest < 0 or highest >= self._encoder.vocab_size:
            what = f"has token ids from {lowest} to {highest}, the tokenizer has {self._encoder.vocab_size} tokens."
            error = DataError(document.key, what, "Name the tokenizer that these tokens were made with.")
            self._reject(document, error, "token_beyond_vocabulary")
            return
        mask = document.mask
        if document.whole:
            before = _as_parts(self._config.bos_id if ids[0] != self._config.bos_id else None)
            after = _as_parts(self._config.eos_id if ids[-1] != self._config.eos_id else None)
            if mask is not None:
                # The first token of a document is never a target, so a 1 on BOS does no harm; EOS is one, as in text.
                mask = np.pad(mask, (len(before), len(after)), constant_values=1)
            ids = np.concatenate([*before, ids, *after])
        self._finish(document, ids, mask, 4 * len(ids))

    def _finish(
        self, document: Document, ids: NDArray[np.integer[Any]], mask: NDArray[np.integer[Any]] | None, num_bytes: int
    ) -> None:
        self._writer.append(ids, mask)
        self._writer.finish_document(self._hold_out(document.group))
        self._report(num_bytes, len(ids))

    def _reject(self, document: Document, error: DataError, reason: str = "unreadable") -> None:
        """Count the document where the user asked for that.

        Raises:
            DataError: ``error``, where not.
        """
        if not self._drop:
            raise error
        self._writer.reject(Rejected(document.key, reason, 0, str(error)))


def _as_parts(token: int | None) -> Sequence[NDArray[np.uint32]]:
    return () if token is None else (np.array([token], np.uint32),)
