"""What a stage finds on disk: its data, its run directory, its parent, and room for what it writes.

It asks what the start of a stage asks (``stages.preflight``), of samples where all of it would take minutes.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from nemo_prolong.config.addresses import HF_PREFIX, is_address, tokenizer_directory
from nemo_prolong.config.schema import RunConfig, Transition
from nemo_prolong.data.storage.cache import default_cache_directory
from nemo_prolong.data.storage.remote import read_bytes
from nemo_prolong.data.verify import DataSample, verify_sample
from nemo_prolong.doctor.facts import Volume
from nemo_prolong.doctor.finding import Finding, good, no_go, refused, warning
from nemo_prolong.doctor.machine import read_volume
from nemo_prolong.doctor.probing import Probe
from nemo_prolong.errors import ProlongError
from nemo_prolong.plan.checkpoint_size import checkpoint_bytes, kept_checkpoints
from nemo_prolong.records.checkpoint import verify as checkpoints
from nemo_prolong.records.checkpoint.manifest import step_of
from nemo_prolong.records.data_manifest import DataManifestFile
from nemo_prolong.records.run_directory import RunDirectory
from nemo_prolong.stages.hf_parent import check_hugging_face_parent
from nemo_prolong.stages.preflight import (
    ContinuedRun,
    check_data,
    check_parent_run,
    check_run_directory,
    check_tokenizer,
    parent_checkpoint,
)
from nemo_prolong.stages.stop_tokens import check_chat
from nemo_prolong.text import counted
from nemo_prolong.units import format_bytes

_HASHED_BYTES = 256 * 2**20
_HASHED_SECONDS = 4.0
"""Shards that are hashed, and for how long. A slow file system gives so much within seconds."""

_SHARED_FILE_SYSTEMS = ("nfs", "nfs4", "lustre", "gpfs", "beegfs", "cifs", "fuse.sshfs")
"""File systems of many nodes."""


def stage_probes(cfg: RunConfig) -> list[Probe[list[Finding]]]:
    """Start looking at everything that the stage finds on disk. Each probe gives findings."""
    # Much is read of data and parent, and a slow store is none that hangs. The stage looks there again.
    return [
        Probe("data", f"the data in {cfg.data.root}", partial(data_findings, cfg), vital=False),
        Probe("start", f"{cfg.runs_dir} or parent={cfg.parent}", partial(start_findings, cfg), vital=False),
        Probe("disk", f"the file system of {cfg.run_dir}", partial(disk_findings, cfg)),
    ]


def data_findings(cfg: RunConfig, chooser: random.Random | None = None) -> list[Finding]:
    """Return what is wrong with data and tokenizer, and whether the copies of remote shards find room.

    Args:
        cfg: The stage.
        chooser: Draws the shards that are hashed. By default each call draws others.
    """
    named = list(dict.fromkeys([*(entry.path for entry in cfg.data.mixture), *cfg.data.validation]))
    try:
        data = check_data(cfg)
        drawn = chooser or random.Random()  # noqa: S311 - a choice of shards is no secret
        sample = verify_sample(cfg.data.root, named, _HASHED_BYTES, drawn, _HASHED_SECONDS)
    except ProlongError as error:
        return [refused("data", error)]
    seen = f"sizes of {counted(sample.shards, 'shard')} and hashes of {sample.hashed} as they should be"
    if is_address(cfg.data.root):
        seen = f"indexes of {counted(sample.shards, 'shard')} read"
    found = [good("data", f"{cfg.data.root}: {counted(len(named), 'row set')}, {seen}.")]
    return [*found, *_tokenizer(cfg, data), *_cache(cfg, sample)]


def start_findings(cfg: RunConfig) -> list[Finding]:
    """Return what is wrong with the run directory, and with the parent where the stage begins."""
    try:
        continued = _continued(cfg)
    except ProlongError as error:
        return [refused("run_directory", error)]
    if continued.choice.checkpoint is not None:
        step = step_of(continued.choice.checkpoint)
        found = [good("run_directory", f"{cfg.run_dir}: the run goes on after step {step}.")]
        return [*found, *_passed_over("run_directory", continued.choice.refused)]
    return [good("run_directory", f"{cfg.run_dir}: the stage begins there."), *_parent(cfg)]


def disk_findings(cfg: RunConfig) -> list[Finding]:
    """Return whether the checkpoints of the stage find room where its run lies."""
    volume = read_volume(cfg.run_dir)
    present = directory_bytes(Path(cfg.run_dir, "checkpoints"))
    return [disk_finding(cfg, volume, present)]


def disk_finding(cfg: RunConfig, volume: Volume, present_bytes: int) -> Finding:
    """Return whether checkpoints find room on a volume.

    Args:
        cfg: The stage.
        volume: Where its run lies.
        present_bytes: What its checkpoints take already.
    """
    one, count = checkpoint_bytes(cfg), kept_checkpoints(cfg)
    needed = max(0, one * count - present_bytes)
    room = f"{format_bytes(volume.free_bytes)} free"
    if not volume.writable:
        return no_go(
            "disk",
            f"{cfg.run_dir} cannot be written to.",
            "Logs, metrics and checkpoints of the run go there.",
            "Give yourself the permission, or name another place with runs_dir=DIR.",
        )
    if volume.free_bytes < needed:
        return no_go(
            "disk",
            f"{cfg.run_dir} has {room}, and {format_bytes(needed)} more are needed: {counted(count, 'checkpoint')} of "
            f"{format_bytes(one)}, the one being written among them.",
            f"Saves fail on a full disk, and training stops after {cfg.checkpoint.max_failed_saves} of them.",
            "Free some space, name a larger file system with runs_dir=DIR, or keep fewer (checkpoint.keep_last).",
        )
    return good("disk", f"{cfg.run_dir} has {room}, and its checkpoints take {format_bytes(needed)} more.")


def cache_finding(cached_bytes: int, volume: Volume, present_bytes: int) -> Finding:
    """Return whether the copies of remote or compressed shards find room on a volume.

    Args:
        cached_bytes: What all of them take.
        volume: Where the cache lies.
        present_bytes: What the cache holds already.
    """
    needed = max(0, cached_bytes - present_bytes)
    where = f"the shard cache {volume.path}"
    if not volume.writable or volume.free_bytes < needed:
        state = f"has {format_bytes(volume.free_bytes)} free" if volume.writable else "cannot be written to"
        return no_go(
            "shard_cache",
            f"{where} {state}, and the shards of the stage take {format_bytes(needed)} more.",
            "Every node keeps a local copy of each remote or compressed shard; nothing is evicted.",
            "Set data.cache=DIR to a directory on a local disk (NVMe) with more room.",
        )
    if volume.kind in _SHARED_FILE_SYSTEMS:
        return warning(
            "shard_cache",
            f"{where} is on {volume.kind}.",
            "All nodes write the same copies there, and its locks are slow or missing.",
            "Set data.cache=DIR to a directory on a local disk (NVMe).",
        )
    return good("shard_cache", f"{where} has {format_bytes(volume.free_bytes)} free for {format_bytes(needed)}.")


def directory_bytes(directory: Path) -> int:
    """Return the bytes of all files below a directory, 0 where there is none."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def _tokenizer(cfg: RunConfig, data: DataManifestFile) -> Iterator[Finding]:
    try:
        check_tokenizer(cfg)
        check_chat(cfg, data)
    except ProlongError as error:
        yield refused("tokenizer", error)
        return
    known = "is that of the rows" if data.tokenizer_sha256 else "is there, and the rows do not name theirs"
    chat = ", and generation can stop where its chat template ends turns" if cfg.data.apply_instruct_masks else ""
    yield good("tokenizer", f"{tokenizer_directory(cfg.data)} {known}{chat}.")


def _cache(cfg: RunConfig, sample: DataSample) -> Iterator[Finding]:
    if sample.cached_bytes:
        directory = cfg.data.cache or str(default_cache_directory())
        yield cache_finding(sample.cached_bytes, read_volume(directory), directory_bytes(Path(directory)))


def _continued(cfg: RunConfig) -> ContinuedRun:
    data = DataManifestFile.read(cfg.data.root, read_bytes)
    return check_run_directory(cfg, RunDirectory(cfg.run_dir), data, checkpoints.verify_sample)


def _parent(cfg: RunConfig) -> list[Finding]:
    if cfg.transition == Transition.SCRATCH:
        return [good("parent", "the stage starts from nothing.")]
    assert cfg.parent is not None, "checked with the configuration"
    try:
        if cfg.parent.startswith(HF_PREFIX):
            check_hugging_face_parent(cfg, weights=True, hashed=False)
            return [good("parent", f"{cfg.parent} holds every tensor of {cfg.model.name} in its shape.")]
        run, record = check_parent_run(cfg)
        choice = parent_checkpoint(run, checkpoints.verify_sample)
    except ProlongError as error:
        return [refused("parent", error)]
    whole = f"{cfg.parent} is complete, its checkpoint of step {record.step} has its files, sizes and sampled hashes."
    return [good("parent", whole), *_passed_over("parent", choice.refused)]


def _passed_over(name: str, refusals: tuple[str, ...]) -> list[Finding]:
    """Return a warning for every newer checkpoint that is not used."""
    return [
        warning(
            name,
            f"a checkpoint is not used: {refusal}",
            "Steps after the checkpoint that is used are trained again.",
            "Restore it from a backup if those steps are worth it.",
        )
        for refusal in refusals
    ]


def found_by(probes: list[Probe[Any]], deadline: float) -> list[Finding]:
    """Return the findings of probes, and one for each that gave no answer."""
    found: list[Finding] = []
    for probe in probes:
        reading = probe.result(deadline)
        found += reading.value or [] if reading.problem is None else [reading.problem]
    return found
