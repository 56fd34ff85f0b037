"""Everything on disk that must be right before a training process starts. Needs no torch.

A stage that cannot run is refused in a second, by one message, before NeMo is imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_prolong.config.addresses import HF_PREFIX, is_address, tokenizer_directory
from nemo_prolong.config.commands import typed
from nemo_prolong.config.schema import ModelConfig, RunConfig, Transition
from nemo_prolong.data.mds.index import require_index
from nemo_prolong.data.row_origins import row_origins
from nemo_prolong.data.row_sets import refuse_data_directory
from nemo_prolong.data.run_tokenizer import require_rows_of
from nemo_prolong.data.storage.remote import read_bytes
from nemo_prolong.data.tokenizer import TextEncoder
from nemo_prolong.data.tokenizer.saved import TOKENIZER_FILE, SavedTokenizer, too_many_tokens
from nemo_prolong.errors import CheckpointError, ConfigError, DataError
from nemo_prolong.records.checkpoint.manifest import listed_steps, step_of
from nemo_prolong.records.checkpoint.verify import CheckpointChoice, VerifyCheckpoint, choose_checkpoint
from nemo_prolong.records.data_manifest import DataManifestFile
from nemo_prolong.records.locations import working_directory
from nemo_prolong.records.run_directory import RunDirectory
from nemo_prolong.records.stage_manifest import MANIFEST_FILE, DataRecord, ParentRecord, SettingChange, StageManifest
from nemo_prolong.redaction import redact_values
from nemo_prolong.stages.differences import (
    check_changeable,
    differences,
    differing,
    is_within,
    not_allowed,
    unchangeable,
)
from nemo_prolong.stages.hf_parent import check_hugging_face_parent, check_same_tokens
from nemo_prolong.stages.stop_tokens import UNKNOWN_STOP_TOKENS, StopTokens, find_stop_tokens

_NO_CHECKPOINT = CheckpointChoice(None)
_NEW_NAME = "Give the run another name=..., or remove the directory."
_NO_RUN_YET = ("train.rank*.log", f".{MANIFEST_FILE}.*.tmp", "launch")
"""What may lie in a run directory before there is a run."""


@dataclass(frozen=True)
class Start:
    """How a stage starts.

    Attributes:
        data: Manifest of the data directory.
        stops: What ends the texts of a run that begins. One that continues has recorded it.
        resume: Verified checkpoint of this run to continue from, or None.
        run: Manifest of this run as it was left, when it continues.
        changes: Settings that are not as they were when this run was started.
        parent: Manifest of the parent, or None.
        parent_record: What is taken from the parent, or None.
        parent_checkpoint: Verified checkpoint of the parent, or None.
        verified: What was verified and how long it took, one line a checkpoint.
        refused: Newer checkpoints that are not used, and why.
        complete: Whether there is nothing to do. Only rank 0 knows.
    """

    data: DataManifestFile
    stops: StopTokens = UNKNOWN_STOP_TOKENS
    resume: Path | None = None
    run: StageManifest | None = None
    changes: tuple[SettingChange, ...] = ()
    parent: StageManifest | None = None
    parent_record: ParentRecord | None = None
    parent_checkpoint: Path | None = None
    verified: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    complete: bool = False


def check_files(cfg: RunConfig, run: RunDirectory, rank: int = 0) -> Start:
    """Return how the stage starts.

    Args:
        cfg: The stage.
        run: Its run directory.
        rank: Only rank 0 judges the run directory and reads checkpoints. The others would see what rank 0 is just
            writing, and read every file again. They learn the choice of rank 0 when training starts.

    Raises:
        DataError: If data or tokenizer are missing or the data is empty.
        CheckpointError: If the parent is missing or unfinished, or the run directory holds another run.
        ConfigError: If the parent is of a kind this version cannot read, or of another shape, or a setting is changed
            that a run cannot be continued with.
    """
    data = check_data(cfg)
    found = check_run_directory(cfg, run, data) if rank == 0 else ContinuedRun()
    if found.complete:
        return _start(data, found, run=found.run, parent_record=run.manifest.parent, complete=True)
    if found.run is not None:
        # It has taken what it takes from its parent, which need not exist any more.
        return _start(data, found, resume=found.choice.checkpoint, run=found.run, parent_record=found.run.parent)
    if rank != 0 and listed_steps(run.path):
        return _start(data, found)
    check_tokenizer(cfg)
    if cfg.transition == Transition.SCRATCH:
        return _start(data, found, stops=find_stop_tokens(cfg, data, None, None))
    if cfg.parent is not None and cfg.parent.startswith(HF_PREFIX):
        record = check_hugging_face_parent(cfg, weights=rank == 0)
        return _start(data, found, stops=find_stop_tokens(cfg, data, None, record), parent_record=record)
    parent_run, record = check_parent_run(cfg)
    parent = parent_run.manifest
    stops = find_stop_tokens(cfg, data, parent, record)
    taken = parent_checkpoint(parent_run) if rank == 0 else _NO_CHECKPOINT
    return _start(
        data,
        found,
        taken,
        stops=stops,
        parent=parent,
        parent_record=record,
        parent_checkpoint=taken.checkpoint,
    )


def check_parent_run(cfg: RunConfig) -> tuple[RunDirectory, ParentRecord]:
    """Check all of a parent run but its checkpoint. Return it, and what is recorded of it.

    Raises:
        CheckpointError: If it is missing or unfinished.
        ConfigError: If its model is of another shape.
        DataError: If the rows were made with another tokenizer than its own.
    """
    parent_run = _parent_run(cfg)
    parent = parent_run.manifest
    _check_complete(parent_run)
    check_same_shape(cfg, parent.model)
    _check_parent_tokens(cfg, parent.data)
    record = ParentRecord(
        path=str(parent_run.path),
        step=parent.step,
        transition=cfg.transition,
        rotary_base=parent.rotary_base,
        stop_token_ids=parent.stop_token_ids or [],
        working_directory=working_directory(),
    )
    return parent_run, record


def _start(data: DataManifestFile, found: ContinuedRun, taken: CheckpointChoice = _NO_CHECKPOINT, **what: Any) -> Start:
    choices = [found.choice, taken]
    return Start(
        data=data,
        changes=found.changes,
        verified=tuple(choice.summary for choice in choices if choice.summary),
        refused=tuple(refusal for choice in choices for refusal in choice.refused),
        **what,
    )


def check_data(cfg: RunConfig) -> DataManifestFile:
    """Check that rows and tokenizer are there, and return the manifest of the data directory.

    Raises:
        DataError: If something is missing, the tokenizer is not the one of the rows, or a row set is known to have no
            target.
    """
    root = cfg.data.root
    remedy = f"Write it with: python scripts/prepare_data.py +exp=data/NAME {typed('output', root)}"
    if not is_address(root) and not Path(root).is_dir():
        raise DataError(f"data.root={root}", "the data directory does not exist.", remedy)
    tokenizer = tokenizer_directory(cfg.data)
    if not (tokenizer / TOKENIZER_FILE).is_file():
        if is_address(root):
            remedy = "Copy the tokenizer to this machine and set data.tokenizer to its directory."
        raise DataError(f"data.tokenizer={cfg.data.tokenizer}", f"there is no tokenizer in {tokenizer}.", remedy)
    named = [("data.mixture path", entry.path) for entry in cfg.data.mixture]
    named += [("data.validation", path) for path in cfg.data.validation]
    for key, path in named:
        _check_row_set(root, key, path, remedy)
    data = DataManifestFile.read(root, read_bytes)
    _check_tokenizer(cfg, tokenizer, data)
    _check_origins(cfg, named, tokenizer)
    if cfg.data.apply_instruct_masks:
        for key, path in named:
            _check_targets(key, path, data)
    return data


def _check_targets(key: str, path: str, data: DataManifestFile) -> None:
    """Refuse a row set of which its manifest says that no token has a loss."""
    if data.target_tokens(path) == 0:
        raise DataError(
            f"{key}={path}",
            f"no token of its rows is a target, as {data.where} says, so data.apply_instruct_masks=true leaves nothing "
            "to learn.",
            "Prepare it again with longer rows or shorter conversations, or leave it out.",
        )


def _check_row_set(root: str, key: str, path: str, remedy: str) -> None:
    if is_address(root):
        require_index(f"{root.rstrip('/')}/{path}")
        return
    refuse_data_directory(Path(root) / path, f"{key}={path}")
    try:
        require_index(Path(root) / path)
    except DataError as error:
        raise DataError(f"{key}={path}", f"{Path(root) / path} holds no packed rows.", remedy) from error


def _check_tokenizer(cfg: RunConfig, tokenizer: Path, data: DataManifestFile) -> None:
    """Refuse another tokenizer than the rows were made with. ProLong's published rows do not say which that was."""
    expected = data.tokenizer_sha256
    if expected is not None and TextEncoder(tokenizer, "tokenizers").sha256 != expected:
        raise DataError(
            f"data.tokenizer={cfg.data.tokenizer}",
            f"the tokenizer in {tokenizer} is not the one that the rows in {cfg.data.root} were made with.",
            "Use the tokenizer of the data directory (data.tokenizer=tokenizer), or prepare the data again.",
        )


def _check_origins(cfg: RunConfig, named: Sequence[tuple[str, str]], tokenizer: Path) -> None:
    """Refuse a row set of another tokenizer, such as one that was copied into the data directory."""
    root, remedy = cfg.data.root.rstrip("/"), "Use row sets of one tokenizer, and data.tokenizer to name it."
    origins = {f"{key}={path}": row_origins(f"{root}/{path}", judged=Path(root)) for key, path in named}
    require_rows_of(tokenizer, str(tokenizer), origins, remedy)


def check_tokenizer(cfg: RunConfig) -> None:
    """Refuse a tokenizer that the trained model could not be exported with.

    Raises:
        DataError: If it cannot be read, names no beginning or end, or has tokens that the model has not.
    """
    directory = tokenizer_directory(cfg.data)
    saved = SavedTokenizer.read(directory)
    what = f"data.tokenizer={cfg.data.tokenizer}"
    problem = saved.problem()
    if problem is not None:
        raise DataError(what, f"{directory}: {problem.rule}", problem.remedy)
    excess = too_many_tokens(saved.vocab_size, cfg.model.vocab_size)
    if excess is not None:
        raise DataError(what, f"{directory}: {excess}", _more_rows(cfg, saved.vocab_size))


def _more_rows(cfg: RunConfig, vocab_size: int) -> str:
    """Return how the model of a stage gets a larger vocabulary."""
    larger = f"Set model.vocab_size={vocab_size}"
    if cfg.transition == Transition.SCRATCH:
        return f"{larger}."
    if cfg.parent is not None and cfg.parent.startswith(HF_PREFIX):
        return f"{larger}: embedding and LM head get new rows, which start as the mean of the others."
    return f"{larger}. {export_first(cfg)}"


def export_first(cfg: RunConfig) -> str:
    """Return how a stage gets a larger vocabulary than the run that it starts from."""
    return (
        f"A run's vocabulary is fixed, so export the parent (scripts/export.py {typed('run', cfg.parent)} output=DIR) "
        "and start with parent=hf:DIR transition=weights."
    )


def stored_run(cfg: RunConfig, run: RunDirectory) -> StageManifest | None:
    """Return the manifest of the run in the run directory, or None where none has begun.

    A process that was killed while it wrote the first files of a run has not begun it.

    Raises:
        CheckpointError: If something else is in the place of the run.
    """
    run_dir = run.path
    if run_dir.is_file():
        rule, remedy = f"{run_dir} is a file.", _NEW_NAME.replace("directory", "file")
        raise CheckpointError(f"name={cfg.name}", rule, remedy)
    # Other ranks of this launch may have opened their logs already.
    if not run_dir.exists() or all(any(path.match(name) for name in _NO_RUN_YET) for path in run_dir.iterdir()):
        return None
    if run.is_run:
        return run.manifest
    if not run.has_manifest or listed_steps(run_dir):
        raise CheckpointError(f"name={cfg.name}", f"{run_dir} exists and is not the directory of a run.", _NEW_NAME)
    return None


def changed_settings(cfg: RunConfig, run: RunDirectory, step: int) -> list[SettingChange]:
    """Return what is not as it was when the run in the run directory was started.

    Args:
        cfg: The stage as it is to be continued.
        run: The run directory.
        step: Optimizer steps done.
    """
    return differences(run.config, dump(cfg), step)


def refuse_other_run(cfg: RunConfig, run: RunDirectory, changes: Sequence[SettingChange]) -> None:
    """Refuse to take the run in the run directory for the one that is configured, if there are changes.

    Raises:
        CheckpointError: With every change.
    """
    if not changes:
        return
    remedy = f"Repeat that run's command to continue it, or {_NEW_NAME[0].lower()}{_NEW_NAME[1:]}"
    if run.manifest.status != "complete" and not unchangeable(changes):
        allowed = ",".join(change.key for change in changes)
        remedy = f"{remedy[:-1]}, or continue it with the new values: 'resume.allow=[{allowed}]'."
    raise CheckpointError(
        f"name={cfg.name}",
        f"{run.path} holds another run; it differs in {', '.join(map(str, changes))}.",
        remedy,
    )


@dataclass(frozen=True)
class ContinuedRun:
    """The run that goes on, if there is one.

    Attributes:
        choice: Its verified checkpoint.
        run: Its manifest, None where the stage begins.
        changes: Settings that are not as they were when it was started.
    """

    choice: CheckpointChoice = _NO_CHECKPOINT
    run: StageManifest | None = None
    changes: tuple[SettingChange, ...] = ()
    complete: bool = False


def check_run_directory(
    cfg: RunConfig, run: RunDirectory, data: DataManifestFile, verify: VerifyCheckpoint | None = None
) -> ContinuedRun:
    """Return what to continue if the directory holds an unfinished run of the same configuration.

    A finished one whose last checkpoint is damaged is unfinished again. It is trained from the newest good one on.

    Args:
        cfg: The stage.
        run: Its run directory.
        data: Manifest of its data directory.
        verify: Judges a checkpoint. By default every file of it is read.

    Raises:
        CheckpointError: If the directory holds another run, or a complete one.
        ConfigError: If a setting is changed that a run cannot be continued with.
        DataError: If the run was trained on other rows.
    """
    manifest = stored_run(cfg, run)
    if manifest is None:
        return ContinuedRun()
    choice = choose_checkpoint(run.path, run.identity, verify)
    step = step_of(choice.checkpoint) if choice.checkpoint else 0
    if manifest.status == "complete" and not (choice.checkpoint and step < manifest.step):
        if cfg.resume.when_complete == "succeed" and step == manifest.step:
            refuse_other_run(cfg, run, changed_settings(cfg, run, step))
            return ContinuedRun(choice, manifest, complete=True)
        rule = f"{run.path} already holds a complete run of {manifest.stage}."
        raise CheckpointError(f"name={cfg.name}", rule, _NEW_NAME)
    changes = changed_settings(cfg, run, step)
    refuse_other_run(cfg, run, not_allowed(changes, cfg.resume.allow))
    if choice.checkpoint is None:
        # It starts over, so whatever is named may be different.
        if not any(is_within("data.root", name) for name in cfg.resume.allow):
            _check_same_data(cfg, run, data)
        return ContinuedRun(choice, changes=tuple(changes))
    check_changeable(changes)
    _check_same_data(cfg, run, data)
    _check_steps_left(cfg, step)
    return ContinuedRun(choice, manifest, tuple(changes))


def _check_steps_left(cfg: RunConfig, step: int) -> None:
    if cfg.train.train_iters < step:
        raise ConfigError(
            f"train.train_iters={cfg.train.train_iters}",
            f"{step} steps have been trained already.",
            f"Set train.train_iters={step} or more.",
        )


def _check_same_data(cfg: RunConfig, run: RunDirectory, data: DataManifestFile) -> None:
    """Refuse to resume a run on other rows. The order of rows means nothing when they are others."""
    before, now = run.manifest.data.manifest_sha256, data.sha256
    if before != now:
        raise DataError(
            f"data.root={cfg.data.root}",
            f"is not the data that {run.path} was trained on: its manifest.json has the SHA-256 {now}, not {before}.",
            "Put the data back, or start a new run with another name=....",
        )


def dump(cfg: RunConfig) -> dict[str, Any]:
    """Return the configuration in plain JSON types, without secrets."""
    config: dict[str, Any] = redact_values(cfg.model_dump(mode="json"))
    return config


def _parent_run(cfg: RunConfig) -> RunDirectory:
    assert cfg.parent is not None, "checked with the configuration"
    run = RunDirectory(cfg.parent)
    if not run.path.is_dir():
        raise CheckpointError(
            f"parent={cfg.parent}", "the parent run does not exist.", "Train the parent stage first, or name its run."
        )
    return run


def _check_complete(run: RunDirectory) -> None:
    parent = run.manifest
    if parent.status != "complete":
        raise CheckpointError(
            f"parent={run.path}",
            f"the parent is not complete (step {parent.step} of {parent.train_iters}, status {parent.status}).",
            f"Finish it by repeating its command: {parent.command}",
        )


def _check_parent_tokens(cfg: RunConfig, parent: DataRecord) -> None:
    """Refuse rows whose ids mean other tokens than in the rows of the parent run."""
    ours, theirs = tokenizer_directory(cfg.data) / TOKENIZER_FILE, parent.tokenizer_directory / TOKENIZER_FILE
    if theirs.is_file() and theirs.read_bytes() != ours.read_bytes():
        check_same_tokens(cfg, theirs)


def parent_checkpoint(run: RunDirectory, verify: VerifyCheckpoint | None = None) -> CheckpointChoice:
    """Return the parent's last checkpoint. An earlier one is no substitute for it.

    Args:
        run: The parent.
        verify: Judges a checkpoint. By default every file of it is read.

    Raises:
        CheckpointError: If it is gone or cannot be used.
    """
    parent, choice = run.manifest, choose_checkpoint(run.path, run.identity, verify)
    if choice.checkpoint is None:
        raise CheckpointError(
            f"parent={run.path}",
            "the parent is complete, but its checkpoints are gone.",
            "Restore them, or train the parent again under another name.",
        )
    if step_of(choice.checkpoint) != parent.step:
        refused = choice.refused[0] if choice.refused else f"there is none of step {parent.step}"
        raise CheckpointError(
            f"parent={run.path}",
            f"the parent's last checkpoint cannot be used: {refused}",
            f"Restore it, or repeat the parent's command, which continues from its newest good one: {parent.command}",
        )
    return choice


def check_same_shape(cfg: RunConfig, parent: ModelConfig) -> None:
    """Check that the parent's checkpoint has the tensors of the model.

    Raises:
        ConfigError: With every difference.
    """
    free = {"name", "rotary_base", "init_method_std", "license", "nemo_config"}
    if parent.vocab_size < cfg.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size={cfg.model.vocab_size}",
            f"the vocabulary of the parent {cfg.parent} has {parent.vocab_size} tokens.",
            f"Set model.vocab_size={parent.vocab_size}. {export_first(cfg)}",
        )
    ours, theirs = cfg.model.model_dump(exclude=free), parent.model_dump(exclude=free)
    changes = [f"{key} ({before} -> {after})" for key, before, after in differing(theirs, ours, "model.")]
    if changes:
        raise ConfigError(
            f"parent={cfg.parent}",
            f"the model differs from the parent's in {', '.join(changes)}.",
            f"Use the parent's model, {parent.name}.",
        )
