"""One data directory from the text of a Python installation: tokenizer, packed row sets, manifest.

The directory is built as ``.<name>.partial`` beside its place and renamed when everything is in it, so a run that was
killed leaves nothing that looks complete. A complete directory of the same configuration is reused, any other refused.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import Any

from nemo_prolong.config.schema import PrepareConfig, RowSet
from nemo_prolong.data.chat import encode_conversations
from nemo_prolong.data.miniature.installation import Installation
from nemo_prolong.data.mds import MdsWriter
from nemo_prolong.data.pack import PackedRows, Stream, concatenate, cut, pack_concat, pack_intact
from nemo_prolong.data.miniature.corpus import DOMAINS, Corpus, read_corpus
from nemo_prolong.data.tokenizer import TextEncoder, train_tokenizer
from nemo_prolong.errors import ConfigError, DataError
from nemo_prolong.files import write_json_atomically
from nemo_prolong.units import format_seconds, format_tokens

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"
MANIFEST_FORMAT = 1
CHAT = "chat"
_COLUMNS = {"domain": "str", "indices": "ndarray:uint32", "input_ids": "ndarray:uint32", "length": "uint64"}
_TOKENIZER_SAMPLE_CHARACTERS = 20_000


def domains_of(row_set: RowSet) -> list[str]:
    """Return the domains of a row set: ``domain`` names one, or several joined by ``+``."""
    return row_set.domain.split("+")


def prepare(cfg: PrepareConfig, installation: Installation | None = None) -> dict[str, Any]:
    """Write the data directory ``cfg.output``, or reuse it.

    Args:
        cfg: What to write.
        installation: Where to read; the running interpreter's packages by default.

    Returns:
        The manifest.

    Raises:
        ConfigError: If a row set is contradictory or named twice.
        DataError: If the directory holds something else, or there is too little text for a row set.
    """
    started = time.monotonic()
    _check(cfg)
    output = Path(cfg.output)
    existing = _reusable(output, cfg)
    if existing is not None:
        logger.info("%s is complete and has this configuration: reused", output)
        return existing
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        manifest = _build(cfg, installation or Installation.current(), partial)
        os.replace(partial, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    total = sum(entry["tokens"] for entry in manifest["row_sets"].values())
    logger.info(
        "%s: %d row sets, %s tokens, in %s",
        output,
        len(manifest["row_sets"]),
        format_tokens(total),
        format_seconds(time.monotonic() - started),
    )
    return manifest


def _check(cfg: PrepareConfig) -> None:
    paths = [row_set.path for row_set in cfg.row_sets]
    for number, row_set in enumerate(cfg.row_sets):
        where = f"row_sets[{number}]"
        if paths.index(row_set.path) != number or Path(row_set.path).name != row_set.path or row_set.path == TOKENIZER:
            raise ConfigError(f"{where}.path={row_set.path}", "names one directory of its own.", "Use another name.")
        for domain in domains_of(row_set):
            if domain not in DOMAINS:
                raise ConfigError(
                    f"{where}.domain={row_set.domain}",
                    f"{domain!r} is no domain.",
                    f"Use {', '.join(DOMAINS)}, or several joined by +.",
                )
        if CHAT in domains_of(row_set) and (row_set.domain != CHAT or row_set.document_length is not None):
            raise ConfigError(
                f"{where}.domain={row_set.domain}",
                "conversations are packed whole and alone, because only they have target masks.",
                "Use domain=chat without document_length.",
            )
        if row_set.document_length is not None and row_set.seq_length % row_set.document_length:
            raise ConfigError(
                f"{where}.document_length={row_set.document_length}",
                f"pieces fill rows of seq_length={row_set.seq_length} exactly.",
                f"Use a divisor of it, such as {row_set.seq_length // 2}.",
            )


def _config_sha256(cfg: PrepareConfig) -> str:
    described = json.dumps(cfg.model_dump(mode="json", exclude={"output"}), sort_keys=True)
    return hashlib.sha256(f"{MANIFEST_FORMAT}\n{described}".encode()).hexdigest()


def _reusable(output: Path, cfg: PrepareConfig) -> dict[str, Any] | None:
    """Return the manifest of ``output`` if it is what ``cfg`` asks for, None if nothing is there.

    Raises:
        DataError: If something else is there.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
    remedy = f"Remove {output}, or set output to another directory."
    try:
        manifest = json.loads((output / MANIFEST).read_text("utf-8"))
        same = manifest["config_sha256"] == _config_sha256(cfg)
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(f"output={output}", "exists and is no complete data directory.", remedy) from None
    if not same:
        raise DataError(f"output={output}", "holds data of another configuration.", remedy)
    missing = [row_set.path for row_set in cfg.row_sets if not (output / row_set.path / "index.json").is_file()]
    if missing:
        raise DataError(f"output={output}", f"lacks {', '.join(missing)}, which its manifest lists.", remedy)
    return dict(manifest)


def _build(cfg: PrepareConfig, installation: Installation, directory: Path) -> dict[str, Any]:
    domains = [domain for domain in DOMAINS if any(domain in domains_of(row_set) for row_set in cfg.row_sets)]
    corpus = read_corpus(installation, domains, cfg.max_bytes_per_domain, cfg.validation_fraction, cfg.seed)
    train_tokenizer(_tokenizer_texts(corpus, cfg.tokenizer_train_bytes), cfg.vocab_size, directory / TOKENIZER)
    encoder = TextEncoder(directory / TOKENIZER)
    logger.info("trained the tokenizer: %d tokens", encoder.vocab_size)
    packer = _Packer(corpus, encoder, cfg.row_sets)
    manifest = {
        "format": MANIFEST_FORMAT,
        "config_sha256": _config_sha256(cfg),
        "seed": cfg.seed,
        "tokenizer": TOKENIZER,
        "vocab_size": cfg.vocab_size,
        "row_sets": {row_set.path: _write_row_set(row_set, packer, directory) for row_set in cfg.row_sets},
        "sources": _sources(corpus),
        "python": platform.python_version(),
    }
    write_json_atomically(directory / MANIFEST, manifest)
    return manifest


def _tokenizer_texts(corpus: Corpus, max_bytes: int) -> Iterator[str]:
    """Yield the beginnings of training documents, each domain giving the same number of bytes as far as it has them."""
    for domain in corpus.documents:
        left_bytes = max_bytes // len(corpus.documents)
        for document in corpus.select(domain, "train"):
            for text in (document.text, *(message["content"] for message in document.messages)):
                sample = text[: min(_TOKENIZER_SAMPLE_CHARACTERS, max(left_bytes, 0))]
                left_bytes -= len(sample.encode())
                if sample:
                    yield sample


def _sources(corpus: Corpus) -> list[dict[str, Any]]:
    """Return what each repository gave to each domain."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for document in chain.from_iterable(corpus.documents.values()):
        split = "validation" if document.repository in corpus.held_out else "train"
        about = {"domain": document.domain, "repository": document.repository, "split": split}
        entry = found.setdefault((document.domain, document.repository), {**about, "documents": 0, "bytes": 0})
        entry["documents"] += 1
        entry["bytes"] += document.num_bytes
    return list(found.values())


@dataclass(frozen=True)
class _Share:
    """The documents of one domain that a row set packs, and what was dropped before packing."""

    domain: str
    stream: Stream
    dropped_tokens: dict[str, int]


class _Packer:
    """Tokenizes each domain and split once; packs it for every row set that wants it.

    Row sets that cut the same documents for rows of the same length share them: the longest pieces are cut first, the
    shorter ones from what is left, so that no text is in both.
    """

    def __init__(self, corpus: Corpus, encoder: TextEncoder, row_sets: Sequence[RowSet]) -> None:
        self._corpus = corpus
        self._encoder = encoder
        self._row_sets = row_sets
        self._streams: dict[tuple[str, str], Stream] = {}

    def pack(self, row_set: RowSet) -> Iterator[tuple[_Share, PackedRows]]:
        """Yield the share and the rows of each domain of ``row_set``."""
        for domain in domains_of(row_set):
            share = self._share(row_set, domain)
            pack = pack_intact if domain == CHAT else pack_concat
            yield share, pack(share.stream, row_set.seq_length)

    def _share(self, row_set: RowSet, domain: str) -> _Share:
        stream = self._stream(domain, row_set.split)
        if row_set.document_length is None:
            return _Share(domain, stream, {})
        lengths = [
            other.document_length
            for other in self._row_sets
            if domain in domains_of(other)
            and (other.split, other.seq_length) == (row_set.split, row_set.seq_length)
            and other.document_length is not None
        ]
        pieces, dropped = cut(stream, lengths)
        # What no length could use is booked once, where the shortest pieces are.
        booked = dropped if row_set.document_length == min(lengths) else {}
        return _Share(domain, pieces[row_set.document_length], booked)

    def _stream(self, domain: str, split: str) -> Stream:
        key = (domain, split)
        if key not in self._streams:
            documents = self._corpus.select(domain, split)
            if domain == CHAT:
                chats = encode_conversations(self._encoder, [document.messages for document in documents])
                stream = concatenate([chat.input_ids for chat in chats], [chat.mask for chat in chats])
            else:
                stream = concatenate(self._encoder.encode_documents([document.text for document in documents]))
            self._streams[key] = stream
            logger.info(
                "tokenized %s, %s: %d documents, %s tokens", *key, len(documents), format_tokens(len(stream.tokens))
            )
        return self._streams[key]


def _write_row_set(row_set: RowSet, packer: _Packer, directory: Path) -> dict[str, Any]:
    """Write one MDS directory and return its entry of the manifest.

    Raises:
        DataError: If the text does not fill a single row.
    """
    packed = list(packer.pack(row_set))
    columns = {**_COLUMNS, "mask": "ndarray:uint8"} if row_set.domain == CHAT else _COLUMNS
    written, documents = 0, 0
    with MdsWriter(directory / row_set.path, columns) as writer:
        for row in islice(_rows(packed), row_set.max_rows):
            writer.write(row)
            written += 1
            documents += len(row["indices"])
    if not written:
        raise DataError(
            f"row set {row_set.path}",
            f"the {row_set.split} text of {row_set.domain} does not fill one row of {row_set.seq_length} tokens.",
            "Raise max_bytes_per_domain" + (", or validation_fraction." if row_set.split == "validation" else "."),
        )
    available = sum(len(rows.input_ids) for _, rows in packed)
    dropped = _sum_reasons(chain.from_iterable((share.dropped_tokens, rows.dropped_tokens) for share, rows in packed))
    dropped["max_rows"] = (available - written) * row_set.seq_length
    tokens = written * row_set.seq_length
    logger.info("packed %s: %d rows, %s tokens", row_set.path, written, format_tokens(tokens))
    return {
        "domain": row_set.domain,
        "split": row_set.split,
        "seq_length": row_set.seq_length,
        "document_length": row_set.document_length,
        "rows": written,
        "documents": documents,
        "tokens": tokens,
        "input_tokens": tokens + sum(dropped.values()),
        "dropped_tokens": dropped,
        "sha256": directory_sha256(directory / row_set.path),
    }


def _rows(packed: Sequence[tuple[_Share, PackedRows]]) -> Iterator[dict[str, Any]]:
    """Yield MDS rows, one of each domain in turn."""
    per_domain = [_rows_of_domain(share.domain, rows) for share, rows in packed]
    return (row for row in chain.from_iterable(zip_longest(*per_domain)) if row is not None)


def _rows_of_domain(domain: str, rows: PackedRows) -> Iterator[dict[str, Any]]:
    for number, (input_ids, indices) in enumerate(zip(rows.input_ids, rows.indices, strict=True)):
        row = {"domain": domain, "indices": indices, "input_ids": input_ids, "length": len(input_ids)}
        yield row if rows.mask is None else {**row, "mask": rows.mask[number]}


def _sum_reasons(counts: Iterator[dict[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for reason, tokens in chain.from_iterable(count.items() for count in counts):
        total[reason] = total.get(reason, 0) + tokens
    return total


def directory_sha256(directory: Path) -> str:
    """Return one hash over the names and contents of the files of a row set."""
    digest = hashlib.sha256()
    for path in sorted(directory.iterdir()):
        digest.update(f"{path.name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()
