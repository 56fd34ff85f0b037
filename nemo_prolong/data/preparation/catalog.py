"""The sources of a run as lists of units, and the fingerprint of everything that decides the result."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nemo_prolong.config.rules.prepare import content_fields
from nemo_prolong.config.schema.prepare import INSTALLATION_CHAT, PrepareConfig, SourceConfig, SourceFormat
from nemo_prolong.data.miniature.corpus import read_corpus, write_corpus
from nemo_prolong.data.miniature.installation import Installation
from nemo_prolong.data.sources import detect_format, plan_units
from nemo_prolong.data.sources.base import Unit

FORMAT: Literal[2] = 2
"""Version of the data directory; part of every fingerprint."""
_NOT_IN_RESULT = {"output", "workers", "cache"}
_NEWER_SOURCE_FIELDS = ("prompt_field", "completion_field", "tokens_field", "on_unknown_key", "ignore_fields")
"""Fields that the configurations of earlier versions lack; unset they do not change a fingerprint."""


@dataclass(frozen=True)
class PlannedSource:
    """A source and its units.

    Attributes:
        source: As configured; a source that an installation was written to for format=installation.
        configured: As the user wrote it.
        units: Its units, in order.
    """

    source: SourceConfig
    configured: SourceConfig
    units: tuple[Unit, ...]


def described_config(cfg: PrepareConfig) -> dict[str, Any]:
    """Return the configuration without what changes nothing in the result."""
    return cfg.model_dump(mode="json", exclude=_NOT_IN_RESULT)


def with_formats(cfg: PrepareConfig) -> PrepareConfig:
    """Return the configuration with the format of every source found out, once and not in every worker.

    Raises:
        ConfigError: If a source names fields that its format does not have.
        DataError: If a source is missing, empty or of no known format.
    """
    found = [
        source.model_copy(update={"format": detect_format(source, cache_of(cfg))})
        if source.format is SourceFormat.AUTO
        else source
        for source in cfg.sources
    ]
    settled = cfg.model_copy(update={"sources": found})
    for error in content_fields(settled):
        raise error
    return settled


def list_units(cfg: PrepareConfig) -> list[tuple[Unit, ...]]:
    """Return the units of every source; none for an installation, whose text is not written yet.

    Raises:
        DataError: If a source is missing, empty or of no known format.
    """
    return [
        () if source.format is SourceFormat.INSTALLATION else tuple(plan_units(source, cache_of(cfg)))
        for source in cfg.sources
    ]


def fingerprint(cfg: PrepareConfig, tokenizer_sha256: str | None, units: Sequence[Sequence[Unit]]) -> str:
    """Return a hash of what decides the result: configuration, tokenizer, chat template, names and sizes of files.

    The contents of the files are hashed while they are read, and these hashes are in the manifest. Reading them all
    only to find that nothing is to be done would take hours on a real corpus.
    """
    files = [[[[f.name, f.num_bytes] for f in unit.files] + [unit.start, unit.stop] for unit in own] for own in units]
    tokenizer = [tokenizer_sha256, _chat_template(cfg)]
    described = json.dumps([FORMAT, _fingerprinted(cfg), tokenizer, files], sort_keys=True)
    return hashlib.sha256(described.encode()).hexdigest()


_CONVERSATIONS = 2
"""Changes with what becomes of conversations. 1 dropped calls, tools and weights, and packed rows without a target. A
directory of such rows is not reused."""


def _fingerprinted(cfg: PrepareConfig) -> dict[str, Any]:
    """Return the configuration as the version wrote it that made an older data directory."""
    described = described_config(cfg)
    unset = SourceConfig(domain="").model_dump(mode="json", include=set(_NEWER_SOURCE_FIELDS))
    described["sources"] = [
        {name: value for name, value in source.items() if name not in unset or value != unset[name]}
        for source in described["sources"]
    ]
    if cfg.tokenizer.chat_date is None:
        del described["tokenizer"]["chat_date"]
    if any(source.holds_conversations for source in cfg.sources):
        described["conversations"] = _CONVERSATIONS
    return described


def _chat_template(cfg: PrepareConfig) -> str | None:
    """Return the text of the chat template; None for the built-in one and for a missing one, refused when used."""
    path = Path(cfg.tokenizer.chat_template or "")
    return path.read_text("utf-8", errors="replace") if path.is_file() else None


def plan_sources(
    cfg: PrepareConfig, units: Sequence[tuple[Unit, ...]], corpus: Path, installation: Installation | None
) -> list[PlannedSource]:
    """Return the sources with their units, the text of an installation written out.

    Args:
        cfg: The configuration.
        units: From ``list_units``.
        corpus: Directory for the text of an installation.
        installation: Where ``format=installation`` reads; the running interpreter's packages by default.
    """
    written = _written_installation(cfg, corpus, installation)
    planned = []
    for configured, own_units in zip(cfg.sources, units, strict=True):
        if configured.format is SourceFormat.INSTALLATION:
            sources = written[configured.domain]
            planned += [PlannedSource(s, configured, tuple(plan_units(s, None))) for s in sources]
        else:
            planned.append(PlannedSource(configured, configured, own_units))
    return planned


def cache_of(cfg: PrepareConfig) -> Path | None:
    """Return the directory for copies of remote and compressed files, None for the default."""
    return Path(cfg.cache) if cfg.cache is not None else None


def _written_installation(
    cfg: PrepareConfig, corpus: Path, installation: Installation | None
) -> dict[str, list[SourceConfig]]:
    """Write the text of the installation as JSON lines, once, and return the sources that read it."""
    wanted = [source for source in cfg.sources if source.format is SourceFormat.INSTALLATION]
    if not wanted:
        return {}
    domains = [source.domain for source in wanted]
    budget_bytes = wanted[0].max_bytes
    assert budget_bytes is not None  # checked with the configuration, and the same for all
    if not (corpus / "complete").exists():
        text = read_corpus(
            installation or Installation.current(), domains, budget_bytes, cfg.validation_fraction, cfg.seed
        )
        write_corpus(text, corpus)
        (corpus / "complete").touch()
    return {source.domain: list(_corpus_sources(source.domain, corpus)) for source in wanted}


def _corpus_sources(domain: str, corpus: Path) -> Sequence[SourceConfig]:
    return [
        SourceConfig(
            domain=domain,
            path=str(path),
            format=SourceFormat.JSONL,
            split="validation" if split == "validation" else "train",
            messages_field="messages" if domain == INSTALLATION_CHAT else None,
            group_field="group",
        )
        for split in ("train", "validation")
        if (path := corpus / f"{domain}.{split}.jsonl").exists()
    ]
