"""Rules between the fields of ``PrepareConfig``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath

from nemo_prolong.config.commands import hydra_value
from nemo_prolong.config.findings import NothingGivenError
from nemo_prolong.config.schema.prepare import INSTALLATION_CHAT, Packing, PrepareConfig, RowSet, SourceFormat
from nemo_prolong.errors import ConfigError
from nemo_prolong.units import exact_tokens

INSTALLATION_DOMAINS = ("code_by_repo", "reference", "docs", INSTALLATION_CHAT)
"""What ``format=installation`` can read."""
_RESERVED = ("tokenizer",)
_CONTENT_FIELDS = ("messages_field", "prompt_field", "completion_field", "tokens_field")
_RECORDS = (SourceFormat.AUTO, SourceFormat.JSONL, SourceFormat.PARQUET, SourceFormat.HUGGINGFACE)
"""Formats with columns that may be named."""
_WITHOUT_GROUPS = (SourceFormat.TEXT, SourceFormat.REPOSITORIES, SourceFormat.INSTALLATION)


def _tokenizer(cfg: PrepareConfig) -> Iterator[ConfigError]:
    tokenizer = cfg.tokenizer
    trained = tokenizer.vocab_size is not None and tokenizer.train_bytes is not None
    if tokenizer.path is None and not trained:
        yield NothingGivenError(
            "tokenizer.path=null",
            "there is no tokenizer, and nothing says what to train.",
            "Set tokenizer.path to the directory of the model, or tokenizer.vocab_size and tokenizer.train_bytes.",
        )
    if tokenizer.path is not None and (tokenizer.vocab_size is not None or tokenizer.train_bytes is not None):
        yield ConfigError(
            f"tokenizer.path={tokenizer.path}",
            "a given tokenizer is not trained.",
            "Set tokenizer.vocab_size=null and tokenizer.train_bytes=null, or tokenizer.path=null.",
        )


def _sources(cfg: PrepareConfig) -> Iterator[ConfigError]:
    used = {domain for row_set in cfg.row_sets for domain in row_set.domain.split("+")}
    budgets = {source.max_bytes for source in cfg.sources if source.format is SourceFormat.INSTALLATION}
    for index, source in enumerate(cfg.sources):
        where = f"sources[{index}]"
        if not source.domain or "+" in source.domain or "/" in source.domain:
            yield ConfigError(
                f"{where}.domain={source.domain!r}", "a domain is a plain name.", f"Set {where}.domain=books, or such."
            )
        elif source.domain not in used:
            yield ConfigError(
                f"{where}.domain={source.domain}",
                "no row set packs this domain, so its tokens would be lost.",
                f"Add a row set of domain {source.domain}, or remove the source.",
            )
        if source.format is not SourceFormat.INSTALLATION:
            if not source.path:
                yield ConfigError(f"{where}.path=''", "a source lies somewhere.", f"Set {where}.path.")
        elif source.domain not in INSTALLATION_DOMAINS:
            yield ConfigError(
                f"{where}.domain={source.domain}",
                "an installation has no such text.",
                f"Use one of {', '.join(INSTALLATION_DOMAINS)}.",
            )
        elif source.max_bytes is None or len(budgets) > 1:
            yield ConfigError(
                f"{where}.max_bytes={source.max_bytes}",
                "an installation is read up to one size, the same for all its domains.",
                "Set the same max_bytes, such as 8M, for every source with format=installation.",
            )


def content_fields(cfg: PrepareConfig) -> Iterator[ConfigError]:
    """Yield what is wrong with the fields that sources name: they contradict each other, or their format has none.

    What ``format=auto`` finds is known later, so this is asked once more then.
    """
    for index, source in enumerate(cfg.sources):
        where = f"sources[{index}]"
        given = {name: value for name in _CONTENT_FIELDS if (value := getattr(source, name)) is not None}
        one, other = source.prompt_field, source.completion_field
        if (one is None) != (other is None):
            missing, there = (
                ("completion_field", "prompt_field") if other is None else ("prompt_field", "completion_field")
            )
            yield ConfigError(
                f"{where}.{there}={given[there]}",
                "a prompt and its completion are a pair.",
                f"Set {where}.{missing}={missing.removesuffix('_field')}, or {where}.{there}=null.",
            )
        kinds = list(dict.fromkeys(name for name in given if name != "completion_field"))
        if len(kinds) > 1:
            yield ConfigError(
                f"{where}.{kinds[0]}={given[kinds[0]]}, {kinds[1]}={given[kinds[1]]}",
                "a document is made of one of them.",
                f"Set {where}.{kinds[1]}=null.",
            )
        elif kinds and source.format not in _RECORDS:
            yield ConfigError(
                f"{where}.{kinds[0]}={given[kinds[0]]}",
                f"format={source.format.value} has no such columns.",
                f"Set {where}.{kinds[0]}=null, or {where}.format to one of {', '.join(_RECORDS[1:])}.",
            )
        if source.group_field is not None and source.format in _WITHOUT_GROUPS:
            yield ConfigError(
                f"{where}.group_field={source.group_field}",
                f"format={source.format.value} has no columns, and its groups are files or repositories.",
                f"Set {where}.group_field=null.",
            )
        for name in source.ignore_fields:
            if name in given.values() or name == source.group_field:
                yield ConfigError(
                    f"{where}.ignore_fields=[{name}]", "the documents are made of it.", f"Take {name} out of it."
                )


def _row_sets(cfg: PrepareConfig) -> Iterator[ConfigError]:
    paths = [row_set.path for row_set in cfg.row_sets]
    for index, row_set in enumerate(cfg.row_sets):
        where = f"row_sets[{index}]"
        yield from _path(where, row_set, paths[:index])
        yield from _domains(where, row_set, cfg)
        yield from _packing(where, row_set)


def _path(where: str, row_set: RowSet, earlier: list[str]) -> Iterator[ConfigError]:
    if row_set.path in earlier:
        yield ConfigError(
            f"{where}.path={row_set.path}",
            "is the directory of an earlier row set.",
            f"Set {where}.path={hydra_value(f'{row_set.path}-2')}.",
        )
    elif PurePosixPath(row_set.path).name != row_set.path or row_set.path in _RESERVED or row_set.path.startswith("."):
        yield ConfigError(
            f"{where}.path={row_set.path}",
            "names one directory of its own below output.",
            f"Set {where}.path={hydra_value(f'{row_set.domain}-{row_set.seq_length}')}, or such.",
        )


def _domains(where: str, row_set: RowSet, cfg: PrepareConfig) -> Iterator[ConfigError]:
    known = list(dict.fromkeys(source.domain for source in cfg.sources))
    domains = row_set.domain.split("+")
    for domain in domains:
        if domain not in known:
            yield ConfigError(
                f"{where}.domain={row_set.domain}",
                f"no source has the domain {domain!r}.",
                f"Use {', '.join(known)}, or several joined by +.",
            )
    conversations = {source.holds_conversations for source in cfg.sources if source.domain in domains}
    if len(conversations) > 1:
        yield ConfigError(
            f"{where}.domain={row_set.domain}",
            "conversations have target masks and text has none.",
            "Make a row set of each.",
        )


def _packing(where: str, row_set: RowSet) -> Iterator[ConfigError]:
    length, packing = row_set.document_length, row_set.packing
    if packing is Packing.SPLIT and length is None:
        yield ConfigError(
            f"{where}.packing=split",
            "cuts documents to one length, which is not given.",
            f"Set {where}.document_length={exact_tokens(row_set.seq_length)}, or a divisor of it.",
        )
    if packing not in (None, Packing.SPLIT) and length is not None:
        yield ConfigError(
            f"{where}.document_length={exact_tokens(length)}",
            f"packing={packing} keeps documents as they are.",
            f"Set {where}.packing=split, or {where}.document_length=null.",
        )
    if length is not None and row_set.seq_length % length:
        fitting = math.gcd(length, row_set.seq_length)
        yield ConfigError(
            f"{where}.document_length={exact_tokens(length)}",
            f"pieces of one length must fill the row of seq_length={exact_tokens(row_set.seq_length)} exactly.",
            f"Set {where}.document_length={exact_tokens(fitting)}, or null to pack whole documents.",
        )


def _stages(cfg: PrepareConfig) -> Iterator[ConfigError]:
    lengths = {row_set.path: row_set.seq_length for row_set in cfg.row_sets}
    for name, stage in cfg.stages.items():
        paths = [entry.path for entry in stage.data.mixture]
        for path in paths:
            if path not in lengths:
                yield ConfigError(
                    f"stages.{name}: mixture path={path}",
                    "is no row set of this configuration.",
                    f"Add it to row_sets, or remove stages.{name}.",
                )
        total = sum(entry.proportion for entry in stage.data.mixture)
        if abs(total - 1.0) > 1e-6:
            yield ConfigError(
                f"stages.{name}: sum of proportions={total:.9g}", "proportions sum to 1.", "Scale them so that they do."
            )
        if len({lengths[path] for path in paths if path in lengths}) > 1:
            yield ConfigError(
                f"stages.{name}", "the row sets of one stage have one seq_length.", "Use row sets of one length."
            )


PREPARE_RULES: tuple[Callable[[PrepareConfig], Iterator[ConfigError]], ...] = (
    _tokenizer,
    _sources,
    content_fields,
    _stages,
    _row_sets,
)
"""Rules of a preparation, in the order in which they are reported."""
