"""Sources to a data directory: tokenizer, token store, row plans, shards, manifest, in that order.

Every step leaves its results under ``.<name>.partial`` and skips what is there, so a run that was killed goes on where
it stopped. Neither that nor the number of workers changes a byte of the result, which appears by one rename.
"""

from __future__ import annotations

import logging
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path

import tokenizers

from nemo_prolong.config.schema.prepare import PrepareConfig
from nemo_prolong.data.mds import MdsReader
from nemo_prolong.data.miniature.installation import Installation
from nemo_prolong.data.preparation.catalog import (
    FORMAT,
    PlannedSource,
    cache_of,
    described_config,
    fingerprint,
    list_units,
    plan_sources,
    with_formats,
)
from nemo_prolong.data.preparation.documents import HoldOut, UnitTask
from nemo_prolong.data.preparation.encoders import (
    EncoderConfig,
    copy_or_train_tokenizer,
    forget_encoders,
    served_chat_format,
    text_encoder,
    tokenizer_sha256,
    translations,
)
from nemo_prolong.data.preparation.manifest import (
    domain_facts,
    library_versions,
    row_set_facts,
    source_facts,
    stage_facts,
)
from nemo_prolong.data.preparation.progress import Progress
from nemo_prolong.data.preparation.provenance import (
    check_tokenizer,
    row_set_chat,
    source_origins,
    stated_bos_eos,
    stated_chat,
)
from nemo_prolong.data.preparation.rows import DomainDocuments, PackedSet, domain_documents, domains_of, pack_row_set
from nemo_prolong.data.preparation.shards import ShardTask, forget_files, read_entries, shard_bounds, shard_format
from nemo_prolong.data.preparation.token_store import TOKEN_DTYPE, TokenUnit
from nemo_prolong.data.preparation.work_directory import TOKENIZER, WorkDirectory, existing_manifest
from nemo_prolong.data.preparation.workers import disk_errors, run_tasks
from nemo_prolong.data.samples import sample_row
from nemo_prolong.data.tokenizer.saved import SavedTokenizer
from nemo_prolong.errors import DataError
from nemo_prolong.records.data_manifest import (
    MANIFEST,
    SAMPLES,
    DataManifest,
    RowSetFacts,
    Sample,
    Samples,
    SourceFacts,
    losses,
)
from nemo_prolong.records.row_origin import RowOrigin
from nemo_prolong.units import format_bytes, format_seconds, format_tokens

log = logging.getLogger(__name__)

_SAMPLED_ROWS = 2


def prepare(
    cfg: PrepareConfig,
    *,
    command: str = "",
    finish: Callable[[Path], None] | None = None,
    installation: Installation | None = None,
) -> DataManifest:
    """Write the data directory ``cfg.output``, or reuse it.

    Args:
        cfg: What to write; checked.
        command: Command line for the manifest.
        finish: Called with the finished directory before it is put in place, e.g. to write the data card.
        installation: Where ``format=installation`` reads; the running interpreter's packages by default.

    Returns:
        The manifest.

    Raises:
        DataError: If a source, a document or the tokenizer is not what it should be, the output holds something else,
            the documents fill no row of a row set, or the disk is full.
    """
    started = time.monotonic()
    cfg = with_formats(cfg)
    output = Path(cfg.output)
    forget_files()
    forget_encoders()
    units = list_units(cfg)
    identity = fingerprint(cfg, tokenizer_sha256(cfg.tokenizer), units)
    existing = existing_manifest(output, identity)
    if existing is not None:
        log.info("%s is complete and has this configuration: reused", output)
        return existing
    work = WorkDirectory(output)
    with work.locked(identity), disk_errors(work.root):
        sources = plan_sources(cfg, units, work.corpus, installation)
        manifest = _build(cfg, work, sources, identity, command)
        if finish is not None:
            finish(work.data)
        work.publish()
    tokens = sum(entry.tokens for entry in manifest.row_sets.values())
    what = (output, len(manifest.row_sets), format_tokens(tokens), format_seconds(time.monotonic() - started))
    log.info("%s: %d row sets, %s tokens, in %s", *what)
    return manifest


def _build(
    cfg: PrepareConfig, work: WorkDirectory, sources: Sequence[PlannedSource], identity: str, command: str
) -> DataManifest:
    """Do what is not done yet and return the manifest."""
    encoder = copy_or_train_tokenizer(cfg, sources, work.data / TOKENIZER, work.root / "tokenizer.partial")
    tokenizer = text_encoder(encoder)
    known = source_origins(cfg)
    check_tokenizer(known, cfg.tokenizer.path or "the one that is trained here", tokenizer)
    bos, eos = stated_bos_eos(cfg, known, encoder)
    own = served_chat_format(encoder) if any(source.holds_conversations for source in cfg.sources) else None
    chat = stated_chat(known, own)
    origin = RowOrigin(
        tokenizer=cfg.tokenizer.path,
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        bos_token=bos,
        eos_token=eos,
    )
    units = _tokenize(cfg, work, sources, encoder)
    packed = _pack(cfg, units)
    tasks = {one.row_set.path: _shard_tasks(cfg, work, one, [u for _, own in units for u in own]) for one in packed}
    _write_shards(cfg, work, packed, tasks)
    row_sets = {}
    for one in packed:
        own_chat = row_set_chat(cfg, one.row_set, known, chat)
        origin.model_copy(update={"chat": own_chat}).write(work.data / one.row_set.path)
        row_sets[one.row_set.path] = _finish_row_set(work, one, tasks[one.row_set.path])
    Samples(row_sets=_samples(work, row_sets)).write(work.data / SAMPLES)
    facts = source_facts(units)
    _warn_of_unread(facts)
    seq_lengths = {row_set.path: row_set.seq_length for row_set in cfg.row_sets}
    manifest = DataManifest(
        format=FORMAT,
        fingerprint=identity,
        command=command,
        config=described_config(cfg),
        seed=cfg.seed,
        tokenizer=TOKENIZER,
        tokenizer_sha256=tokenizer.sha256,
        tokenizer_library=encoder.library,
        tokenizer_translated=list(translations(cfg.tokenizer)),
        vocab_size=SavedTokenizer.read(work.data / TOKENIZER).vocab_size,
        bos_token=bos,
        eos_token=eos,
        chat=chat,
        sources=facts,
        domains=domain_facts(units),
        row_sets=row_sets,
        stages=stage_facts(cfg.stages, {path: facts.rows for path, facts in row_sets.items()}, seq_lengths),
        python=platform.python_version(),
        versions=library_versions(),
    )
    manifest.write(work.data / MANIFEST)
    return manifest


def _warn_of_unread(sources: Sequence[SourceFacts]) -> None:
    for source in sources:
        if source.columns_to_check:
            names = ", ".join(f"{name} ({source.unread_columns[name]:,})" for name in source.columns_to_check)
            what = (source.path or source.format, names, names.split(" ")[0])
            log.warning(
                "%s: not read, and may change what is to be learned: %s; if that is meant, set ignore_fields=[%s]",
                *what,
            )


def _tokenize(
    cfg: PrepareConfig, work: WorkDirectory, sources: Sequence[PlannedSource], encoder: EncoderConfig
) -> list[tuple[PlannedSource, list[TokenUnit]]]:
    """Tokenize every unit that is not on disk; return all of them by source."""
    tasks: list[UnitTask] = []
    for planned in sources:
        hold_out = HoldOut(planned.source.split, cfg.validation_fraction, cfg.seed)
        for unit in planned.units:
            directory = work.unit(len(tasks))
            tasks.append(UnitTask(planned.source, unit, directory, encoder, hold_out, cache_of(cfg)))
    waiting = [task for task in tasks if not task.directory.exists()]
    total_bytes, left_bytes = (sum(task.unit.num_bytes for task in some) for some in (tasks, waiting))
    done = len(tasks) - len(waiting)
    log.info("tokenizing %s in %d units, %d of them done", format_bytes(total_bytes), len(tasks), done)
    with Progress("tokenizing", total_bytes, "bytes", total_bytes - left_bytes).shown() as progress:
        run_tasks(waiting, _workers(cfg), progress)
    units = iter([TokenUnit.open(task.directory) for task in tasks])
    return [(planned, [next(units) for _ in planned.units]) for planned in sources]


def _workers(cfg: PrepareConfig) -> int:
    return cfg.workers or os.cpu_count() or 1


def _pack(cfg: PrepareConfig, units: Sequence[tuple[PlannedSource, Sequence[TokenUnit]]]) -> list[PackedSet]:
    """Lay out every row set; documents of a domain and split are collected once."""
    numbered: dict[str, list[tuple[int, TokenUnit]]] = {}
    number = 0
    for planned, own in units:
        for unit in own:
            numbered.setdefault(planned.source.domain, []).append((number, unit))
            number += 1
    seed = cfg.seed if cfg.shuffle else None
    collected: dict[tuple[str, str], DomainDocuments] = {}
    packed = []
    for row_set in cfg.row_sets:
        for domain in domains_of(row_set):
            if (domain, row_set.split) not in collected:
                held_out = row_set.split == "validation"
                collected[domain, row_set.split] = domain_documents(domain, held_out, numbered[domain], seed)
        packed.append(pack_row_set(cfg, row_set, {d: collected[d, row_set.split] for d in domains_of(row_set)}))
    return packed


def _shard_tasks(
    cfg: PrepareConfig, work: WorkDirectory, packed: PackedSet, units: Sequence[TokenUnit]
) -> list[ShardTask]:
    row_set = packed.row_set
    form = shard_format(packed.targets is not None, cfg.shard_bytes, cfg.compression)
    domains = tuple(domains_of(row_set))
    if not packed.plan.is_saved_in(work.rows(row_set.path)):
        # Shards of another version, which packed the same documents in another way, are none of these rows.
        work.forget_shards(row_set.path)
        packed.plan.save(work.rows(row_set.path))
    bounds = shard_bounds(packed.plan, domains, form)
    return [
        ShardTask(
            plan=work.rows(row_set.path),
            units=tuple(unit.directory for unit in units),
            domains=domains,
            form=form,
            directory=work.data / row_set.path,
            number=number,
            start=start,
            stop=stop,
            entry=work.entry(row_set.path, number),
        )
        for number, (start, stop) in enumerate(pairwise(bounds))
    ]


def _write_shards(
    cfg: PrepareConfig, work: WorkDirectory, packed: Sequence[PackedSet], tasks: dict[str, list[ShardTask]]
) -> None:
    """Write every shard that is not on disk."""
    rows = {one.row_set.path: one.plan.row_tokens for one in packed}
    all_tasks = [(int(rows[path][task.start : task.stop].sum()), task) for path, own in tasks.items() for task in own]
    waiting = [(tokens, task) for tokens, task in all_tasks if not task.finished()]
    total, left = (sum(tokens for tokens, _ in some) for some in (all_tasks, waiting))
    done = len(all_tasks) - len(waiting)
    log.info("packing %s tokens into %d shards, %d of them done", format_tokens(total), len(all_tasks), done)
    _check_space(work.root, left * TOKEN_DTYPE.itemsize)
    for directory in {task.directory for _, task in waiting}:
        directory.mkdir(parents=True, exist_ok=True)
    with Progress("packing", total, "tokens", total - left).shown() as progress:
        run_tasks([task for _, task in waiting], _workers(cfg), progress)


def _check_space(directory: Path, needed_bytes: int) -> None:
    free_bytes = shutil.disk_usage(directory).free
    if needed_bytes > free_bytes:
        raise DataError(
            f"{directory}",
            f"the rows need {format_bytes(needed_bytes)}, {format_bytes(free_bytes)} are free.",
            "Free space and run the same command again: it goes on from here.",
        )


def _finish_row_set(work: WorkDirectory, packed: PackedSet, tasks: Sequence[ShardTask]) -> RowSetFacts:
    """Write the index of a row set, which makes it readable, and return its entry of the manifest."""
    directory = work.data / packed.row_set.path
    entries = read_entries([task.entry for task in tasks])
    tasks[0].form.write_index(directory, entries)
    facts = row_set_facts(packed, directory / "index.json", entries)
    what = (packed.row_set.path, facts.rows, format_tokens(facts.tokens), facts.fill)
    targets = "" if facts.target_share is None else f", {facts.target_share:.1%} of them targets"
    log.info("packed %s: %d rows, %s tokens, fill %.4f%s", *what, targets)
    for loss in losses(facts):
        # The card warns of all. That whole documents are not trained on is worth a line of its own here.
        log.log(
            logging.WARNING if facts.documents_without_target else logging.INFO, "%s: %s", packed.row_set.path, loss
        )
    return facts


def _samples(work: WorkDirectory, row_sets: Iterable[str]) -> dict[str, list[Sample]]:
    """Return some rows of every row set as text, for the data card."""
    tokenizer = tokenizers.Tokenizer.from_file(str(work.data / TOKENIZER / "tokenizer.json"))
    samples = {}
    for path in row_sets:
        reader = MdsReader(work.data / path, work.root / "cache")
        numbers = sorted({0, len(reader) // _SAMPLED_ROWS})
        samples[path] = [Sample.model_validate(sample_row(reader[number], number, tokenizer)) for number in numbers]
    return samples
