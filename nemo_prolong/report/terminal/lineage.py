"""The chain of runs that led to one: base -> stage1 -> stage2 -> sft, from their ``stage.json`` files."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Group, RenderableType
from rich.text import Text

from nemo_prolong.config.addresses import HF_PREFIX
from nemo_prolong.records.stage_manifest import MANIFEST_FILE, ParentRecord, StageManifest
from nemo_prolong.report import numbers
from nemo_prolong.report.terminal.layout import Lines, facts, plain
from nemo_prolong.report.training.read import read_metrics
from nemo_prolong.report.training.tables import transition_words
from nemo_prolong.text import escaped
from nemo_prolong.units import format_tokens


@dataclass(frozen=True)
class LineageStep:
    """One run of a chain, or what the first run started from.

    Attributes:
        path: Run directory as its child recorded it, or ``hf:DIR``.
        manifest: None for a Hugging Face directory, and for a run that is no longer there.
        first_loss: Of its first recorded step, in nats per target token; None where none is recorded.
        last_loss: Of its last one.
        last_validation_loss: Of its last validation.
    """

    path: str
    manifest: StageManifest | None
    first_loss: float | None = None
    last_loss: float | None = None
    last_validation_loss: float | None = None


def chain_of(run: str) -> list[LineageStep]:
    """Return the chain that ends with a run, the oldest first.

    Args:
        run: Run directory. Parents are looked up as the runs recorded them, from here or from where they were started.

    Raises:
        CheckpointError: If ``run`` is no run directory, or a manifest cannot be read.
    """
    manifest = StageManifest.read(Path(run))
    steps = [_step(run, Path(run), manifest)]
    seen = {Path(run).resolve()}
    while manifest.parent is not None and manifest.parent.directory.resolve() not in seen:
        parent = manifest.parent
        seen.add(parent.directory.resolve())
        if parent.path.startswith(HF_PREFIX) or not (parent.directory / MANIFEST_FILE).is_file():
            return [LineageStep(parent.path, None), *reversed(steps)]
        manifest = StageManifest.read(parent.directory)
        steps.append(_step(parent.path, parent.directory, manifest))
    return steps[::-1]


def _step(path: str, directory: Path, manifest: StageManifest) -> LineageStep:
    steps, validations = read_metrics(directory / "metrics.jsonl", [])
    return LineageStep(
        path,
        manifest,
        first_loss=steps[0].loss if steps else None,
        last_loss=steps[-1].loss if steps else None,
        last_validation_loss=validations[-1].val_loss if validations else None,
    )


def describe_chain(chain: Sequence[LineageStep]) -> RenderableType:
    """Return the chain to be printed, a paragraph for each run."""
    paragraphs = [[*_describe(step), Text()] for step in chain]
    return Group(*itertools.chain.from_iterable(paragraphs[:-1]), *paragraphs[-1][:-1])


def _describe(step: LineageStep) -> list[RenderableType]:
    manifest = step.manifest
    if manifest is None:
        what = "Hugging Face directory" if step.path.startswith(HF_PREFIX) else "its stage.json is not there"
        return [plain(f"{step.path}  ({what})")]
    losses = f"{numbers.loss(step.first_loss)} -> {numbers.loss(step.last_loss)}"
    software = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    values = {
        "took": _took(manifest.parent),
        "steps": f"{manifest.step:,} of {manifest.train_iters:,}, {manifest.status}",
        "tokens": f"{numbers.tokens(manifest.consumed_train_tokens)} in rows of {format_tokens(manifest.seq_length)}",
        "context": f"trained {format_tokens(manifest.trained_context_length)}, "
        f"advertised {format_tokens(manifest.advertised_context_length)}, "
        f"rotary_base {numbers.base(manifest.rotary_base)}",
        "loss": f"{losses}, validation {numbers.loss(step.last_validation_loss)}",
        "data": f"{manifest.data.root}, manifest {(manifest.data.manifest_sha256 or numbers.MISSING)[:12]}",
        "software": f"{software}; commit {(manifest.git_commit or numbers.MISSING)[:12]}",
    }
    return [Text.assemble(plain(manifest.stage, "bold"), f"  {escaped(step.path)}"), Lines(facts(values), indent=2)]


def _took(parent: ParentRecord | None) -> str:
    if parent is None:
        return "nothing, from scratch"
    return f"{transition_words(parent.transition)} of {parent.path}, step {parent.step:,}"
