"""Everything on disk that must be right before a training process starts; needs no torch.

A stage that cannot run is refused in a second, by one message, before NeMo is imported.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_prolong.config.checkpoint_files import CheckpointChoice, choose_checkpoint
from nemo_prolong.config.locations import HF_PREFIX, is_address, step_of, tokenizer_directory
from nemo_prolong.config.manifest import MANIFEST_FILE, ParentRecord, StageManifest
from nemo_prolong.config.schema import RunConfig, Transition
from nemo_prolong.data.storage.remote import read_bytes
from nemo_prolong.data.tokenizer import TextEncoder
from nemo_prolong.errors import CheckpointError, ConfigError, DataError
from nemo_prolong.redaction import redact_values
from nemo_prolong.stages.hf_parent import check_hugging_face_parent
from nemo_prolong.stages.manifest import data_manifest_sha256, read_data_manifest

CONFIG_FILE = "config.json"

# What may differ between the first start of a run and its continuation: none of it changes which rows are trained on.
_MAY_CHANGE = ("parallelism", "tracker", "checkpoint", "cluster")
_MAY_CHANGE_WITHIN = {
    "data": ("num_workers", "cache"),
    "train": ("log_every_n_steps", "val_check_interval", "limit_val_batches"),
    "faults": ("max_skipped_in_a_row", "hang_seconds"),
}


@dataclass(frozen=True)
class Start:
    """How a stage starts.

    Attributes:
        resume: Verified checkpoint of this run to continue from, or None.
        parent: Manifest of the parent, or None.
        parent_record: What is taken from the parent, or None.
        parent_checkpoint: Verified checkpoint of the parent, or None.
        verified: What was verified and how long it took, one line a checkpoint.
        refused: Newer checkpoints that are not used, and why.
    """

    resume: Path | None = None
    parent: StageManifest | None = None
    parent_record: ParentRecord | None = None
    parent_checkpoint: Path | None = None
    verified: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()


def check_files(cfg: RunConfig, rank: int = 0) -> Start:
    """Return how the stage starts.

    Args:
        cfg: The stage.
        rank: Only rank 0 judges the run directory and reads checkpoints: the others would see what rank 0 is just
            writing, and read every file again. They learn the choice of rank 0 when training starts.

    Raises:
        DataError: If data or tokenizer are missing or the data is empty.
        CheckpointError: If the parent is missing or unfinished, or the run directory holds another run.
        ConfigError: If the parent is of a kind this version cannot read, or of another shape.
    """
    _check_data(cfg)
    resume = _check_run_dir(cfg) if rank == 0 else CheckpointChoice(None)
    if cfg.transition == Transition.SCRATCH:
        return _start([resume], resume=resume.checkpoint)
    if cfg.parent is not None and cfg.parent.startswith(HF_PREFIX):
        record = check_hugging_face_parent(cfg, weights=rank == 0 and not resume.checkpoint)
        return _start([resume], resume=resume.checkpoint, parent_record=record)
    parent_dir = _parent_dir(cfg)
    parent = StageManifest.read(parent_dir)
    _check_complete(parent_dir, parent)
    _check_same_shape(cfg, parent)
    # A run that continues takes nothing from its parent any more.
    taken = _parent_checkpoint(parent_dir, parent) if rank == 0 and not resume.checkpoint else CheckpointChoice(None)
    record = ParentRecord(path=str(parent_dir), step=parent.step, transition=cfg.transition)
    return _start(
        [resume, taken],
        resume=resume.checkpoint,
        parent=parent,
        parent_record=record,
        parent_checkpoint=taken.checkpoint,
    )


def _start(choices: list[CheckpointChoice], **what: Any) -> Start:
    return Start(
        verified=tuple(choice.summary for choice in choices if choice.summary),
        refused=tuple(refusal for choice in choices for refusal in choice.refused),
        **what,
    )


def _check_data(cfg: RunConfig) -> None:
    root = cfg.data.root
    remedy = f"Write it with: python scripts/prepare_data.py +exp=data/NAME output={root}"
    if not is_address(root) and not Path(root).is_dir():
        raise DataError(f"data.root={root}", "the data directory does not exist.", remedy)
    tokenizer = tokenizer_directory(cfg.data)
    if not (tokenizer / "tokenizer.json").is_file():
        if is_address(root):
            remedy = "Copy the tokenizer to this machine and set data.tokenizer to its directory."
        raise DataError(f"data.tokenizer={cfg.data.tokenizer}", f"there is no tokenizer in {tokenizer}.", remedy)
    named = [("data.mixture path", entry.path) for entry in cfg.data.mixture]
    named += [("data.validation", path) for path in cfg.data.validation]
    for key, path in named:
        _check_row_set(root, key, path, remedy)
    _check_tokenizer(cfg, tokenizer)


def _check_row_set(root: str, key: str, path: str, remedy: str) -> None:
    if is_address(root):
        read_bytes(f"{root}/{path}/index.json")
    elif not (Path(root) / path / "index.json").is_file():
        raise DataError(f"{key}={path}", f"{Path(root) / path} holds no packed rows.", remedy)


def _check_tokenizer(cfg: RunConfig, tokenizer: Path) -> None:
    """Refuse another tokenizer than the rows were made with; ProLong's published rows do not say which that was."""
    expected = json.loads(read_data_manifest(cfg.data.root) or b"{}").get("tokenizer_sha256")
    if expected is not None and TextEncoder(tokenizer, "tokenizers").sha256 != expected:
        raise DataError(
            f"data.tokenizer={cfg.data.tokenizer}",
            f"the tokenizer in {tokenizer} is not the one that the rows in {cfg.data.root} were made with.",
            "Use the tokenizer of the data directory (data.tokenizer=tokenizer), or prepare the data again.",
        )


def _check_run_dir(cfg: RunConfig) -> CheckpointChoice:
    """Return the checkpoint to resume from if the directory holds an unfinished run of the same configuration.

    A finished one whose last checkpoint is damaged is unfinished again: it is trained from the newest good one on.
    """
    run_dir = Path(cfg.run_dir)
    # Other ranks of this launch may have opened their logs already.
    new_name = "Give the run another name=..., or remove the directory."
    if run_dir.is_file():
        raise CheckpointError(f"name={cfg.name}", f"{run_dir} is a file.", new_name.replace("directory", "file"))
    if not run_dir.exists() or all(path.match("train.rank*.log") for path in run_dir.iterdir()):
        return CheckpointChoice(None)
    if not (run_dir / MANIFEST_FILE).is_file() or not (run_dir / CONFIG_FILE).is_file():
        raise CheckpointError(f"name={cfg.name}", f"{run_dir} exists and is not the directory of a run.", new_name)
    manifest = StageManifest.read(run_dir)
    choice = choose_checkpoint(run_dir)
    if manifest.status == "complete" and not (choice.checkpoint and step_of(choice.checkpoint) < manifest.step):
        raise CheckpointError(
            f"name={cfg.name}", f"{run_dir} already holds a complete run of {manifest.stage}.", new_name
        )
    differing = _differing_keys(_comparable(json.loads((run_dir / CONFIG_FILE).read_text())), _comparable(dump(cfg)))
    if differing:
        raise CheckpointError(
            f"name={cfg.name}",
            f"{run_dir} holds another run; it differs in {', '.join(differing)}.",
            "Repeat that run's command to continue it, or " + new_name[0].lower() + new_name[1:],
        )
    _check_same_data(cfg, manifest)
    return choice


def _check_same_data(cfg: RunConfig, manifest: StageManifest) -> None:
    """Refuse to continue a run on other rows: the order of rows means nothing when they are others."""
    before, now = manifest.data.manifest_sha256, data_manifest_sha256(cfg.data.root)
    if before != now:
        raise DataError(
            f"data.root={cfg.data.root}",
            f"is not the data that {cfg.run_dir} was trained on: "
            f"its manifest.json has the SHA-256 {now}, not {before}.",
            "Put the data back, or start a new run with another name=....",
        )


def dump(cfg: RunConfig) -> dict[str, Any]:
    """Return the configuration in plain JSON types, without secrets."""
    config: dict[str, Any] = redact_values(cfg.model_dump(mode="json"))
    return config


def _comparable(config: dict[str, Any]) -> dict[str, Any]:
    """Return what decides the training: the configuration without what may change."""
    kept = {key: value for key, value in config.items() if key not in _MAY_CHANGE}
    for section, keys in _MAY_CHANGE_WITHIN.items():
        kept[section] = {key: value for key, value in kept[section].items() if key not in keys}
    return kept


def _differing_keys(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Return the dotted keys whose values differ."""
    differing = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            differing += _differing_keys(before, after, f"{prefix}{key}.")
        elif before != after:
            differing.append(f"{prefix}{key} ({before} -> {after})")
    return differing


def _parent_dir(cfg: RunConfig) -> Path:
    assert cfg.parent is not None, "checked with the configuration"
    path = Path(cfg.parent)
    if not path.is_dir():
        raise CheckpointError(
            f"parent={cfg.parent}", "the parent run does not exist.", "Train the parent stage first, or name its run."
        )
    return path


def _check_complete(parent_dir: Path, parent: StageManifest) -> None:
    if parent.status != "complete":
        raise CheckpointError(
            f"parent={parent_dir}",
            f"the parent is not complete (step {parent.step} of {parent.train_iters}, status {parent.status}).",
            f"Finish it by repeating its command: {parent.command}",
        )


def _parent_checkpoint(parent_dir: Path, parent: StageManifest) -> CheckpointChoice:
    """Return the parent's last checkpoint; an earlier one is no substitute for it."""
    choice = choose_checkpoint(parent_dir)
    if choice.checkpoint is None:
        raise CheckpointError(
            f"parent={parent_dir}",
            "the parent is complete, but its checkpoints are gone.",
            "Restore them, or train the parent again under another name.",
        )
    if step_of(choice.checkpoint) != parent.step:
        refused = choice.refused[0] if choice.refused else f"there is none of step {parent.step}"
        raise CheckpointError(
            f"parent={parent_dir}",
            f"the parent's last checkpoint cannot be used: {refused}",
            f"Restore it, or repeat the parent's command, which continues from its newest good one: {parent.command}",
        )
    return choice


def _check_same_shape(cfg: RunConfig, parent: StageManifest) -> None:
    """Refuse a model whose tensors the parent's checkpoint does not have."""
    free = {"name", "rotary_base", "init_method_std", "license", "nemo_config"}
    ours, theirs = cfg.model.model_dump(exclude=free), parent.model.model_dump(exclude=free)
    differing = _differing_keys(theirs, ours, "model.")
    if differing:
        raise ConfigError(
            f"parent={cfg.parent}",
            f"the model differs from the parent's in {', '.join(differing)}.",
            f"Use the parent's model, {parent.model.name}.",
        )
