"""Documents of four domains, read from a Python installation.

- ``code_by_repo`` has all Python files of a repository in one document, as ProLong's code domain.
- ``reference`` has the API reference of a package in one document, and the language reference. It stands for books.
- ``docs`` has package descriptions and documentation files, one document each.
- ``chat`` has questions about functions, answered by their docstrings.

Repositories come in an order drawn from the seed. Each gives at most a fair share of a domain's budget. Exact
duplicates (files, docstrings) are kept once per domain. Repositories are held out whole and in all domains at once.
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from nemo_prolong.data.miniature.docstrings import (
    ApiEntry,
    Messages,
    api_entries,
    conversations,
    reference_text,
    topics_text,
)
from nemo_prolong.data.miniature.installation import (
    Installation,
    PackageFile,
    Repository,
    read_text,
)
from nemo_prolong.data.sources.code_files import PROSE_LINE_CHARACTERS
from nemo_prolong.files import synced_file
from nemo_prolong.units import format_bytes

log = logging.getLogger(__name__)

DOMAINS = ("code_by_repo", "reference", "docs", "chat")
LANGUAGE_REFERENCE = "pydoc_data/topics.py"

_FAIR_SHARES = 64
"""A repository gives at most this part of a domain's budget."""
_MIN_DOCUMENT_BYTES = 256
_LONG_DOCUMENT_BYTES = 48 * 2**10
_PARSED_SHARES = 5
_MIN_PROSE_FRACTION = 0.7
_PROSE_SAMPLE_CHARACTERS = 20_000


@dataclass(frozen=True)
class MiniatureDocument:
    """One document: a text, or the messages of a conversation."""

    domain: str
    repository: str
    text: str = ""
    messages: Messages = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        """Bytes of text, as UTF-8."""
        return len(self.text.encode()) + sum(len(message["content"].encode()) for message in self.messages)


@dataclass(frozen=True)
class Corpus:
    """Documents by domain, in their order, and the repositories that are held out for validation."""

    documents: dict[str, list[MiniatureDocument]]
    held_out: frozenset[str]

    def select(self, domain: str, split: str) -> list[MiniatureDocument]:
        """Return the documents of a domain in ``train`` or ``validation``."""
        wanted = split == "validation"
        return [doc for doc in self.documents[domain] if (doc.repository in self.held_out) == wanted]


def read_corpus(
    installation: Installation, domains: Iterable[str], max_bytes_per_domain: int, validation_fraction: float, seed: int
) -> Corpus:
    """Read the documents of ``domains``.

    Args:
        installation: Where to read.
        domains: Some of ``DOMAINS``.
        max_bytes_per_domain: Budget of each domain.
        validation_fraction: Share of the repositories to hold out, at least one of each kind where it is positive.
        seed: Seed of every choice.
    """
    # One order for all domains: held-out repositories then have documents in each, and no file is parsed twice.
    order = sorted(installation.repositories(), key=lambda repository: _rank(seed, "order", repository.name))
    reader = _Reader(seed, max(max_bytes_per_domain // _FAIR_SHARES, _MIN_DOCUMENT_BYTES))
    documents: dict[str, list[MiniatureDocument]] = {}
    for domain in domains:
        with _collector_paused():
            found = list(_within_budget(reader.read(domain, order), max_bytes_per_domain))
        count, size = len({doc.repository for doc in found}), sum(doc.num_bytes for doc in found)
        log.info("read %s: %d documents of %d repositories, %s", domain, len(found), count, format_bytes(size))
        documents[domain] = found
    return Corpus(documents, _held_out(documents, validation_fraction, seed))


def write_corpus(corpus: Corpus, directory: Path) -> None:
    """Write every domain and split as JSON lines: ``text`` or ``messages``, and ``group``, the repository."""
    directory.mkdir(parents=True, exist_ok=True)
    for domain in corpus.documents:
        for split in ("train", "validation"):
            documents = corpus.select(domain, split)
            if documents:
                with synced_file(directory / f"{domain}.{split}.jsonl") as file:
                    file.writelines(_as_line(document).encode() for document in documents)


def _as_line(document: MiniatureDocument) -> str:
    content = {"messages": document.messages} if document.messages else {"text": document.text}
    return json.dumps({"group": document.repository, **content}, ensure_ascii=False) + "\n"


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Pause the cycle collector: syntax trees are large and have no cycles, and scanning them is 40% of the reading."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _within_budget(documents: Iterable[MiniatureDocument], budget_bytes: int) -> Iterator[MiniatureDocument]:
    for document in documents:
        budget_bytes -= document.num_bytes
        if budget_bytes < 0:
            return
        yield document


class _Reader:
    """Reads the documents of one repository after the other; remembers what it has seen and parsed.

    Args:
        seed: Seed of the phrasings.
        share_bytes: Most that one repository gives to one domain.
    """

    def __init__(self, seed: int, share_bytes: int) -> None:
        self._seed = seed
        self._share_bytes = share_bytes
        self._entries: dict[str, list[ApiEntry]] = {}

    def read(self, domain: str, repositories: Iterable[Repository]) -> Iterator[MiniatureDocument]:
        """Yield the documents of ``domain``, lazily, so that nothing beyond the budget is read."""
        read = {"code_by_repo": self._code, "reference": self._reference, "docs": self._docs, "chat": self._chat}
        seen: set[bytes] = set()
        for repository in repositories:
            yield from read[domain](repository, seen)

    def _code(self, repository: Repository, seen: set[bytes]) -> Iterator[MiniatureDocument]:
        texts = ((file.relative, read_text(file.path)) for file in repository.code)
        pieces = (f"# file: {relative}\n{text}\n" for relative, text in texts if text and _is_new(text, seen))
        yield from self._joined("code_by_repo", repository, pieces)

    def _reference(self, repository: Repository, seen: set[bytes]) -> Iterator[MiniatureDocument]:
        if any(file.relative == LANGUAGE_REFERENCE for file in repository.code):
            topics = next(file for file in repository.code if file.relative == LANGUAGE_REFERENCE)
            pieces: Iterable[str] = topics_text(topics.path.read_text("utf-8"))
        else:
            entries = self._api(repository)
            pieces = (reference_text(entry) for entry in entries if _is_new(entry.docstring, seen))
        yield from self._joined("reference", repository, pieces)

    def _docs(self, repository: Repository, seen: set[bytes]) -> Iterator[MiniatureDocument]:
        left_bytes = self._share_bytes
        for file in repository.documents:
            text = _prose(file)
            if not text or not _is_new(text, seen):
                continue
            document = MiniatureDocument("docs", repository.name, _truncate(text, left_bytes))
            if document.num_bytes >= _MIN_DOCUMENT_BYTES:
                left_bytes -= document.num_bytes
                yield document

    def _chat(self, repository: Repository, seen: set[bytes]) -> Iterator[MiniatureDocument]:
        entries = [entry for entry in self._api(repository) if _is_new(entry.docstring, seen)]
        rng = random.Random(_rank(self._seed, "phrasing", repository.name))  # noqa: S311 - phrasings are no secrets
        documents = (MiniatureDocument("chat", repository.name, messages=talk) for talk in conversations(entries, rng))
        yield from _within_budget(documents, self._share_bytes)

    def _joined(self, domain: str, repository: Repository, pieces: Iterable[str]) -> Iterator[MiniatureDocument]:
        """Yield one document of as many pieces as the share allows; the last one is cut at a line."""
        taken, left_bytes = [], self._share_bytes
        for piece in pieces:
            taken.append(_truncate(piece, left_bytes))
            left_bytes -= len(taken[-1].encode())
            if left_bytes < _MIN_DOCUMENT_BYTES:
                break
        document = MiniatureDocument(domain, repository.name, "".join(taken))
        if document.num_bytes >= _MIN_DOCUMENT_BYTES:
            yield document

    def _api(self, repository: Repository) -> list[ApiEntry]:
        """Return entries of a repository until they exceed the share, or much code holds few; parsing is what costs."""
        if repository.name not in self._entries:
            entries: list[ApiEntry] = []
            docstring_bytes = code_bytes = 0
            for file in repository.code:
                source = read_text(file.path) or ""
                found = api_entries(source, file.relative)
                entries += found
                code_bytes += len(source)
                docstring_bytes += sum(len(entry.docstring) for entry in found)
                if docstring_bytes > 2 * self._share_bytes or code_bytes > _PARSED_SHARES * self._share_bytes:
                    break
            self._entries[repository.name] = entries
        return self._entries[repository.name]


def _prose(file: PackageFile) -> str | None:
    """Return the text of a documentation file; None for data, lists and tables that happen to be called .txt."""
    text = read_text(file.path, PROSE_LINE_CHARACTERS)
    if text and file.path.name == "METADATA":
        text = text.partition("\n\n")[2]
    if not text or len(text) < _MIN_DOCUMENT_BYTES:
        return None
    sample = text[:_PROSE_SAMPLE_CHARACTERS]
    words = sum(map(str.isalpha, sample)) + sample.count(" ")
    return text if words >= _MIN_PROSE_FRACTION * len(sample) else None


def _truncate(text: str, max_bytes: int) -> str:
    """Return ``text``, cut after its last whole line within ``max_bytes`` of UTF-8."""
    data = text.encode()
    if len(data) <= max_bytes:
        return text
    end = data.rfind(b"\n", 0, max_bytes) + 1
    return data[:end].decode()


def _is_new(text: str, seen: set[bytes]) -> bool:
    digest = hashlib.sha256(text.encode()).digest()
    if digest in seen:
        return False
    seen.add(digest)
    return True


def _rank(seed: int, *words: str) -> bytes:
    return hashlib.sha256("\0".join((str(seed), *words)).encode()).digest()


def _held_out(documents: dict[str, list[MiniatureDocument]], fraction: float, seed: int) -> frozenset[str]:
    """Choose repositories for validation, from those with long code, long reference and neither in like measure.

    Long validation rows need long held-out documents; there are few, and without the groups chance could leave none.
    """
    names = {document.repository for domain in documents.values() for document in domain}
    groups = []
    for domain in ("reference", "code_by_repo"):
        long = {doc.repository for doc in documents.get(domain, ()) if doc.num_bytes >= _LONG_DOCUMENT_BYTES} & names
        groups.append(long)
        names -= long
    held_out: set[str] = set()
    for group in (*groups, names):
        ranked = sorted(group, key=lambda name: _rank(seed, "validation", name))
        # At least one where there is a choice, never all.
        count = min(max(1, round(fraction * len(group))), len(group) - 1) if fraction > 0 else 0
        held_out.update(ranked[: max(count, 0)])
    return frozenset(held_out)
