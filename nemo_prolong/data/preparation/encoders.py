"""The tokenizer of a run: copied or trained into the data directory, and what it puts around documents."""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from functools import lru_cache
from pathlib import Path
from typing import Literal

from nemo_prolong.config.schema.prepare import PrepareConfig, TokenizerConfig
from nemo_prolong.data.preparation.catalog import PlannedSource, cache_of
from nemo_prolong.data.sources import read_unit
from nemo_prolong.data.sources.base import Document, Rejected
from nemo_prolong.data.tokenizer import ChatEncoder, TextEncoder, train_tokenizer
from nemo_prolong.data.tokenizer.generation_tags import without_generation_tags
from nemo_prolong.data.tokenizer.saved import TEMPLATE_FILE, SavedTokenizer, copy_tokenizer, tokenizer_files
from nemo_prolong.data.tokenizer.served import check_served_template
from nemo_prolong.errors import DataError
from nemo_prolong.files import digest_file, publish, sync_files, write_text_atomically
from nemo_prolong.records.data_manifest import ChatFormat

log = logging.getLogger(__name__)

_SAMPLE_CHARACTERS = 20_000
"""A document gives at most this much to the training of a tokenizer."""


@dataclass(frozen=True)
class EncoderConfig:
    """What makes text tokens; names a tokenizer rather than holding it, so that workers can be given it.

    Attributes:
        directory: Tokenizer directory.
        library: ``tokenizers`` or ``fast``.
        chat_template: Jinja file, or None for Llama-3's.
        bos: Token put before text documents, or None.
        eos: Token put after text documents, or None.
        bos_id: Its id.
        eos_id: Its id.
        chat_date: What a chat template is told when it asks for the date.
    """

    directory: str
    library: Literal["tokenizers", "fast"]
    chat_template: str | None
    bos: str | None
    eos: str | None
    bos_id: int | None
    eos_id: int | None
    chat_date: date | None = None


def forget_encoders() -> None:
    """Drop what this process has loaded: another preparation may put another tokenizer under the same name."""
    text_encoder.cache_clear()
    chat_encoder.cache_clear()


@lru_cache(maxsize=1)
def text_encoder(config: EncoderConfig) -> TextEncoder:
    """Return the encoder of ``config``, loaded once per process."""
    return TextEncoder(config.directory, config.library)


@lru_cache(maxsize=1)
def chat_encoder(config: EncoderConfig) -> ChatEncoder:
    """Return the encoder of conversations, loaded once per process."""
    return ChatEncoder(text_encoder(config), config.chat_template, config.chat_date)


def served_chat_format(config: EncoderConfig) -> ChatFormat:
    """Return how conversations are written, which is how the tokenizer in the data directory serves them.

    A tokenizer whose own template is missing, or leaves out what ``tokenizer.chat_template`` writes, is given that.

    Raises:
        ConfigError: If the template is not usable, or the tokenizer's own one writes another text.
        DataError: If ``AutoTokenizer`` cannot load the tokenizer, or gives other ids.
    """
    chat = chat_encoder(config)
    if not check_served_template(chat):
        path = Path(config.directory) / TEMPLATE_FILE
        log.info("%s: the tokenizer has no such chat template, and is given that of the conversations", path)
        write_text_atomically(path, without_generation_tags(chat.template.source))
        check_served_template(chat)
    return chat.format


def copy_or_train_tokenizer(
    cfg: PrepareConfig, sources: Sequence[PlannedSource], directory: Path, partial: Path
) -> EncoderConfig:
    """Copy or train the tokenizer into ``directory``, unless it is there.

    Args:
        cfg: The configuration.
        sources: What a tokenizer is trained on.
        directory: Place of the tokenizer in the data directory.
        partial: Where it is made first.

    Raises:
        DataError: If there is no such tokenizer, it lacks a token, or there is too little text to train one.
    """
    config = cfg.tokenizer
    if not directory.exists():
        shutil.rmtree(partial, ignore_errors=True)
        if config.path is not None:
            _copy_tokenizer(config.path, partial)
        else:
            assert config.vocab_size is not None and config.train_bytes is not None
            train_tokenizer(_training_texts(cfg, sources, config.train_bytes), config.vocab_size, partial)
        directory.parent.mkdir(parents=True, exist_ok=True)
        sync_files(partial)
        publish(partial, directory)
    encoder = TextEncoder(directory, config.library)
    bos, eos = encoder.resolve_bos_eos(config)
    return EncoderConfig(
        directory=str(directory),
        library=encoder.library,
        chat_template=config.chat_template,
        bos=bos,
        eos=eos,
        bos_id=encoder.special_id(bos) if config.add_bos and bos else None,
        eos_id=encoder.special_id(eos) if config.add_eos and eos else None,
        chat_date=config.chat_date,
    )


def tokenizer_sha256(config: TokenizerConfig) -> str | None:
    """Return a hash of the files that decide what a given tokenizer does; None where one is to be trained.

    Raises:
        DataError: If there is no such tokenizer.
    """
    if config.path is None:
        return None
    TextEncoder(config.path, "tokenizers")  # says what is wrong with it, if anything is
    digest = hashlib.sha256()
    for path in tokenizer_files(Path(config.path)):
        digest.update(f"{path.relative_to(config.path)}\0{digest_file(path).sha256}\n".encode())
    return digest.hexdigest()


def translations(config: TokenizerConfig) -> tuple[str, ...]:
    """Return what is written otherwise in the copy of a given tokenizer than in its directory."""
    return SavedTokenizer.read(Path(config.path)).translated if config.path is not None else ()


def _copy_tokenizer(path: str, target: Path) -> None:
    """Copy a tokenizer, unless a model that is trained with it could not be exported.

    Raises:
        DataError: If it could not be.
    """
    saved = SavedTokenizer.read(Path(path))
    problem = saved.problem()
    if problem is None:
        target.mkdir(parents=True)
        copy_tokenizer(saved, target)
        # Imports torch, which processes that only encode do without.
        from nemo_prolong.data.tokenizer.loading import loading_problem

        problem = loading_problem(target)
    if problem is not None:
        raise DataError(f"tokenizer.path={path}", *problem)
    for change in saved.translated:
        log.info("the copy of the tokenizer is written for transformers 4 and 5: %s", change)


def _training_texts(cfg: PrepareConfig, sources: Sequence[PlannedSource], max_bytes: int) -> Iterator[str]:
    """Yield the beginnings of training documents, each domain giving the same number of bytes as far as it has them."""
    domains = list(dict.fromkeys(planned.source.domain for planned in sources))
    for domain in domains:
        left_bytes = max_bytes // len(domains)
        for text in _texts(cfg, [planned for planned in sources if planned.source.domain == domain]):
            sample = text[: min(_SAMPLE_CHARACTERS, left_bytes)]
            left_bytes -= len(sample.encode())
            yield sample
            if left_bytes <= 0:
                break


def _texts(cfg: PrepareConfig, sources: Iterable[PlannedSource]) -> Iterator[str]:
    for planned in sources:
        if planned.source.split == "validation":
            continue
        for unit in planned.units:
            for item in read_unit(planned.source, unit, cache_of(cfg)):
                if not isinstance(item, Rejected):
                    yield from _texts_of(item)


def _texts_of(document: Document) -> Iterator[str]:
    if document.input_ids is not None:
        raise DataError(
            "tokenizer.path=null",
            f"{document.key} is tokenized already, so no tokenizer can be trained on it.",
            "Set tokenizer.path to the directory of the tokenizer that made its tokens.",
        )
    if document.conversation is not None:
        messages = document.conversation.messages
        yield from (m["content"] for m in messages if isinstance(m.get("content"), str))
        return
    assert document.pieces is not None
    taken = 0
    for piece in document.pieces:
        yield piece[: _SAMPLE_CHARACTERS - taken]
        taken += len(piece)
        if taken >= _SAMPLE_CHARACTERS:
            return
