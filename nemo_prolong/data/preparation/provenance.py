"""What rows that are packed again bring with them: their tokenizer, and what stands around their documents.

Spans of packed rows stay as they are. So the manifest of the new data directory must say of them what was said before,
and the tokenizer must be the one that made them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from nemo_prolong.config.schema.prepare import PrepareConfig, RowSet, SourceConfig, SourceFormat
from nemo_prolong.data.preparation.encoders import EncoderConfig
from nemo_prolong.data.preparation.rows import domains_of
from nemo_prolong.data.row_origins import require_tokenizer, row_origins
from nemo_prolong.data.tokenizer import TextEncoder
from nemo_prolong.errors import DataError
from nemo_prolong.records.data_manifest import ChatFormat
from nemo_prolong.records.row_origin import RowOrigin

_TOKENS = (SourceFormat.TOKENIZED_MDS, SourceFormat.PACKED_MDS)


@dataclass(frozen=True)
class SourceOrigin:
    """What is known of the rows of one source.

    Attributes:
        source: The source.
        where: The file that says it.
        origin: What it says.
    """

    source: SourceConfig
    where: str
    origin: RowOrigin


def source_origins(cfg: PrepareConfig) -> list[SourceOrigin]:
    """Return what is known of the sources that come as tokens.

    Raises:
        DataError: If a file that says it is damaged.
    """
    return [
        SourceOrigin(source, where, origin)
        for source in cfg.sources
        if source.format in _TOKENS
        for where, origin in row_origins(source.path).items()
    ]


def check_tokenizer(known: Iterable[SourceOrigin], name: str, tokenizer: TextEncoder) -> None:
    """Refuse rows that another tokenizer made than the one that the new manifest will name.

    Args:
        known: What is known of the sources.
        name: What the tokenizer is called in the configuration.
        tokenizer: It.

    Raises:
        DataError: Naming both.
    """
    for one in known:
        own = one.origin.tokenizer or "that of the data directory they were made in"
        remedy = f"Set tokenizer.path to the tokenizer of these rows, {own}."
        origins = {one.where: one.origin}
        require_tokenizer(origins, name, tokenizer.sha256, f"path={one.source.path}", remedy)


def stated_bos_eos(
    cfg: PrepareConfig, known: Iterable[SourceOrigin], encoder: EncoderConfig
) -> tuple[str | None, str | None]:
    """Return what begins and ends the documents of the new rows, for the manifest.

    Raises:
        DataError: If packed rows have other tokens there than the other documents will get.
    """
    packed = [one for one in known if one.source.format is SourceFormat.PACKED_MDS]
    if not packed:
        return encoder.bos, encoder.eos
    others = [source for source in cfg.sources if source.format is not SourceFormat.PACKED_MDS]
    first = packed[0].origin
    expected = (encoder.bos, encoder.eos) if others else (first.bos_token, first.eos_token)
    for one in packed:
        found = (one.origin.bos_token, one.origin.eos_token)
        if found != expected:
            raise DataError(
                f"path={one.source.path}",
                f"its documents stand between {_between(found)}, as {one.where} says, and those of other sources "
                f"between {_between(expected)}.",
                "Set tokenizer.bos_token, eos_token, add_bos and add_eos as they were for these rows.",
            )
    return expected


def _between(tokens: tuple[str | None, str | None]) -> str:
    return " and ".join(token or "nothing" for token in tokens)


def stated_chat(known: Iterable[SourceOrigin], own: ChatFormat | None) -> ChatFormat | None:
    """Return how the conversations of the new rows are written, for the manifest.

    Args:
        known: What is known of the sources.
        own: How this preparation writes conversations, None where it has none.

    Raises:
        DataError: If packed rows hold conversations of another format.
    """
    found = own
    for one in known:
        chat = one.origin.chat
        if chat is None:
            continue
        if found is not None and _served_otherwise(found, chat):
            raise DataError(
                f"path={one.source.path}",
                f"its conversations were written with another chat template, as {one.where} says: an answer ends with "
                f"{''.join(chat.end_of_turn)!r} there and with {''.join(found.end_of_turn)!r} elsewhere.",
                "Prepare conversations of different templates into different data directories.",
            )
        found = chat
    return found


def _served_otherwise(one: ChatFormat, other: ChatFormat) -> bool:
    return (one.template_sha256, one.end_of_turn_ids) != (other.template_sha256, other.end_of_turn_ids)


def row_set_chat(
    cfg: PrepareConfig, row_set: RowSet, known: Iterable[SourceOrigin], chat: ChatFormat | None
) -> ChatFormat | None:
    """Return how the conversations of one row set are written, None where it holds none."""
    domains = domains_of(row_set)
    own = any(source.holds_conversations for source in cfg.sources if source.domain in domains)
    carried = any(one.origin.chat is not None for one in known if one.source.domain in domains)
    return chat if own or carried else None
