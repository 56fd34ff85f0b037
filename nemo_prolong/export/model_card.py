"""``README.md`` of an exported model: what it is, how it was made, how it did, what may be done with it.

Every number comes from a manifest, an evaluation result or the verification. Nothing is typed by hand. The metadata at
its head are for the Hub. They hold only what is known. They hold no results, because the Hub files those under one of
its data sets and the rows here are of none.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import ModelCard, ModelCardData

from nemo_prolong.config.addresses import HF_PREFIX
from nemo_prolong.errors import CheckpointError
from nemo_prolong.export.hf_config import SpecialTokens
from nemo_prolong.export.rendering import render
from nemo_prolong.export.serving.target import CHECK_FILE, SETTINGS_FILE, START_FILE
from nemo_prolong.export.source import ExportSource
from nemo_prolong.records.evaluation import (
    PerplexityResult,
    RecallResult,
    evaluation_directory,
    read_result,
    why_stale,
)
from nemo_prolong.records.export_manifest import MANIFEST_FILE, TargetRecord, VerificationRecord
from nemo_prolong.records.stage_manifest import ParentRecord, StageManifest
from nemo_prolong.text import markdown_code, markdown_table, markdown_text
from nemo_prolong.units import format_tokens

log = logging.getLogger(__name__)

_HUB_LICENSES = {
    "apache-2.0": "apache-2.0",
    "mit": "mit",
    "llama 2 community license": "llama2",
    "meta llama 3 community license": "llama3",
    "llama 3.1 community license": "llama3.1",
    "llama 3.2 community license": "llama3.2",
    "llama 3.3 community license": "llama3.3",
}
"""Identifiers of the Hub by names of licences in small letters; any other licence is ``other`` with its name."""

_CACHED = re.compile(r"(?:^|/)models--([^/]+?)--([^/]+)/snapshots/")
"""Where huggingface_hub keeps what it downloads; the path tells which repository it is of."""

_TAGS = ["long-context", "llama", "prolong"]

_METADATA_ORDER = ["license", "license_name", "base_model", "library_name", "pipeline_tag", "tags"]


class ResultTable(NamedTuple):
    """One evaluation of one stage, in Markdown."""

    heading: str
    table: str


def read_lineage(manifest: StageManifest) -> list[StageManifest]:
    """Return the stages from the first one found to ``manifest``; a parent that is gone ends the chain."""
    lineage = [manifest]
    while (parent := lineage[0].parent) is not None:
        try:
            lineage.insert(0, StageManifest.read(parent.directory))
        except CheckpointError:
            break
    return lineage


def model_card(
    source: ExportSource,
    special: SpecialTokens,
    dtype: torch.dtype,
    verification: VerificationRecord | None,
    target: TargetRecord | None,
) -> str:
    """Return the model card.

    Args:
        source: What was exported.
        special: What ends the texts of its model.
        dtype: Number format of the weights, before they were quantized.
        verification: What was compared, or None if it was not asked for.
        target: What the directory was prepared for, or None.
    """
    lineage = read_lineage(source.manifest)
    parent = lineage[0].parent
    text = render(
        "README.md.j2",
        metadata=_metadata(source.model.license, parent, target).to_yaml(original_order=_METADATA_ORDER),
        model=source.model,
        run=source.manifest,
        step=source.step,
        dtype=str(dtype).removeprefix("torch."),
        advertised_context=format_tokens(source.manifest.advertised_context_length),
        is_for_transformers=_is_for_transformers(target),
        target=target,
        stops=list(zip(special.stop_tokens, special.stop_ids, strict=True)),
        chat=source.manifest.chat,
        stages=_stage_table(lineage),
        parent=parent,
        parent_facts=_parent_facts(parent),
        mixtures=_mixture_table(lineage),
        results=_results(source.run_dir, lineage),
        verification=verification,
        start_file=START_FILE,
        settings_file=SETTINGS_FILE,
        check_file=CHECK_FILE,
        manifest_file=MANIFEST_FILE,
    )
    return str(ModelCard(text))


def _is_for_transformers(target: TargetRecord | None) -> bool:
    return target is None or (target.format != "trtllm_engine_checkpoint" and target.quantization is None)


def _metadata(license_name: str, parent: ParentRecord | None, target: TargetRecord | None) -> ModelCardData:
    """Return what the Hub reads."""
    identifier, name = hub_license(license_name)
    return ModelCardData(
        license=identifier,
        license_name=name,
        library_name="transformers" if _is_for_transformers(target) else None,
        pipeline_tag="text-generation",
        base_model=hub_repository(parent.path) if parent is not None else None,
        tags=_TAGS if target is None or target.quantization is None else [*_TAGS, "fp8"],
    )


def hub_license(name: str) -> tuple[str | None, str | None]:
    """Return ``license`` and ``license_name`` of the Hub for the name of a licence.

    >>> hub_license("Llama 3.1 Community License"), hub_license("My Licence, v2"), hub_license("")
    (('llama3.1', None), ('other', 'my-licence-v2'), (None, None))
    """
    if not name:
        return None, None
    if known := _HUB_LICENSES.get(" ".join(name.lower().split())):
        return known, None
    return "other", re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.") or None


def hub_repository(parent: str) -> str | None:
    """Return the repository of a parent that lies in the cache of huggingface_hub; of another nothing is known.

    >>> hub_repository("hf:/cache/hub/models--meta-llama--Llama-3.1-8B/snapshots/0e9e39f2")
    'meta-llama/Llama-3.1-8B'
    """
    found = _CACHED.search(f"{parent}/") if parent.startswith(HF_PREFIX) else None
    return f"{found[1]}/{found[2]}" if found else None


def _stage_table(lineage: list[StageManifest]) -> str:
    """Return the table of stages, oldest first."""
    head = ("stage", "from its parent", "seq_length", "rotary_base", "steps", "tokens", "target tokens")
    rows = [
        (
            markdown_text(stage.stage),
            markdown_text(stage.parent.transition.replace("_", " ")) if stage.parent else "nothing, random weights",
            stage.seq_length,
            f"{stage.rotary_base:g}",
            stage.step,
            f"{stage.consumed_train_tokens:,}",
            f"{stage.consumed_target_tokens:,}",
        )
        for stage in lineage
    ]
    return markdown_table(head, rows, right=range(2, len(head)))


def _parent_facts(parent: ParentRecord | None) -> str:
    """Return in brackets what is known of the checkpoint that the first stage started from."""
    if parent is None:
        return ""
    known = [] if parent.path.startswith(HF_PREFIX) else [f"step {parent.step}"]
    known += [] if parent.rotary_base is None else [f"rotary_base {parent.rotary_base:g}"]
    if parent.grown_vocab_rows:
        known.append(f"vocabulary grown by {parent.grown_vocab_rows} rows, each at first the mean of the others")
    return f" ({', '.join(known)})" if known else ""


def _mixture_table(lineage: list[StageManifest]) -> str:
    rows = [
        (markdown_text(stage.stage), markdown_text(entry["path"]), f"{entry['proportion']:.1%}")
        for stage in lineage
        for entry in stage.data.mixture
    ]
    return markdown_table(("stage", "data", "share"), rows, right=[2])


def _results(run_dir: Path, lineage: list[StageManifest]) -> list[ResultTable]:
    """Return whatever results the runs hold, oldest first; one that cannot be read is left out with a warning."""
    parents = [stage.parent.directory for stage in lineage[1:] if stage.parent is not None]
    notes: list[str] = []
    tables: list[ResultTable] = []
    for run, stage in zip([*parents, run_dir], lineage, strict=True):
        directory = evaluation_directory(str(run))
        perplexity = read_result(directory / PerplexityResult.file_name, PerplexityResult, notes)
        if perplexity is not None and _is_current(run, perplexity, notes):
            tables.append(_perplexity_table(stage.name, perplexity))
        recall = read_result(directory / RecallResult.file_name, RecallResult, notes)
        if recall is not None and _is_current(run, recall, notes):
            tables.append(_recall_table(stage.name, recall))
    for note in notes:
        log.warning("model card: %s", note)
    return tables


def _is_current(run: Path, result: PerplexityResult | RecallResult, notes: list[str]) -> bool:
    """Return whether a result is of the model that is exported; a card must not praise another."""
    reason = why_stale(str(run), result)
    if reason is not None:
        notes.append(f"left out: {reason}")
    return reason is None


def _perplexity_table(name: str, result: PerplexityResult) -> ResultTable:
    rows = [
        (f"{bucket.start} to {bucket.end}", bucket.tokens, f"{bucket.perplexity:.2f}")
        for bucket in result.buckets
        if bucket.perplexity is not None
    ]
    heading = f"Perplexity of {markdown_code(name)} by position, on {markdown_code(result.data)}:"
    return ResultTable(heading, markdown_table(("positions", "tokens", "perplexity"), rows, right=[1, 2]))


def _recall_table(name: str, result: RecallResult) -> ResultTable:
    head = ("tokens", "prompts", "exact match", "answer loss (nats per token)")
    rows = [
        (entry.length, entry.samples, f"{entry.exact_match:.0%}", f"{entry.answer_loss:.2f}")
        for entry in result.lengths
    ]
    heading = f"Key-value recall of {markdown_code(name)} by prompt length:"
    return ResultTable(heading, markdown_table(head, rows, right=range(len(head))))
