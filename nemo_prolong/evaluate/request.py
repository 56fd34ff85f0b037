"""What can be wrong with a request to evaluate, found in a second: nothing here needs torch."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from nemo_prolong.config.addresses import HF_PREFIX
from nemo_prolong.config.schema import EvaluateConfig
from nemo_prolong.data.mds import MdsReader
from nemo_prolong.data.row_sets import refuse_data_directory
from nemo_prolong.data.run_tokenizer import run_tokenizer
from nemo_prolong.data.storage.stores import is_remote
from nemo_prolong.errors import CheckpointError, ConfigError, DataError
from nemo_prolong.records.checkpoint.model_description import ModelDescription
from nemo_prolong.records.checkpoint.verify import newest_checkpoint
from nemo_prolong.records.evaluation import (
    EvaluatedState,
    evaluation_directory,
    state_of_checkpoint,
    state_of_export,
)
from nemo_prolong.records.stage_manifest import StageManifest


def output_directories(cfg: EvaluateConfig) -> dict[str, Path]:
    """Return where each model's results go.

    By default ``<run>/eval``, and ``<DIR>_eval`` beside the directory for ``hf:DIR``. With ``output`` set, a single
    model's results go straight into it, those of several each into a folder named after the model's directory.

    Raises:
        ConfigError: If two of several models would have the same folder.
    """
    if cfg.output is None:
        return {model: evaluation_directory(model) for model in cfg.models}
    if len(cfg.models) == 1:
        return {cfg.models[0]: Path(cfg.output)}
    directories = {model: Path(cfg.output) / Path(model.removeprefix(HF_PREFIX)).name for model in cfg.models}
    if len(set(directories.values())) < len(cfg.models):
        raise ConfigError(
            f"output={cfg.output}",
            "Two of the models have the same directory name and would overwrite each other.",
            "Leave output unset, so that results go beside each model, or evaluate them one at a time.",
        )
    return directories


def require_ascending(ends: list[int]) -> None:
    """Refuse bucket ends out of order.

    Raises:
        ConfigError: With the order that works.
    """
    if sorted(set(ends)) != ends:
        raise ConfigError(
            f"position_buckets={ends}", "Upper ends must ascend.", f"Write position_buckets={sorted(set(ends))}."
        )


def open_rows(directory: str) -> MdsReader:
    """Open packed rows.

    Raises:
        DataError: If the directory does not exist, holds several row sets, or no rows that can be read.
    """
    if not is_remote(directory) and not Path(directory).is_dir():
        raise DataError(
            f"rows={directory}",
            "The directory does not exist.",
            "Write the rows with scripts/prepare_data.py, or name a row set below the data root.",
        )
    refuse_data_directory(directory, f"rows={directory}")
    return MdsReader(directory)


class RequestedModel(NamedTuple):
    """A model that can be evaluated.

    Attributes:
        tokenizer: Directory of its tokenizer.
        state: Which state of it will be evaluated.
    """

    tokenizer: Path
    state: EvaluatedState


def require_model(model: str) -> RequestedModel:
    """Refuse a model whose directory is missing or of the other kind, before anything is loaded.

    Raises:
        CheckpointError: With the spelling that would work where one is likely.
    """
    directory = Path(model.removeprefix(HF_PREFIX))
    is_run = (directory / "stage.json").is_file()
    # A run has a config.json too: its own resolved configuration.
    is_hf = not is_run and (directory / "config.json").is_file()
    if is_hf and model.startswith(HF_PREFIX):
        return RequestedModel(directory, state_of_export(directory))
    if is_run and not model.startswith(HF_PREFIX):
        return _require_run(directory)
    if not directory.is_dir():
        raise CheckpointError(
            f"models={model}",
            "The directory does not exist.",
            "Name a run directory such as runs/demo/stage1, or hf:DIR for a Hugging Face directory.",
        )
    if is_hf:
        raise CheckpointError(
            f"models={model}", "This is a Hugging Face directory, not a run.", f"Write models=[hf:{directory}]."
        )
    if is_run:
        raise CheckpointError(
            f"models={model}", "This is a run, not a Hugging Face directory.", f"Write models=[{directory}]."
        )
    raise CheckpointError(
        f"models={model}",
        "The directory holds neither a stage.json (a run) nor a config.json (a Hugging Face model).",
        "Name a run directory written by scripts/train.py, or hf:DIR with a directory written by scripts/export.py.",
    )


def _require_run(run: Path) -> RequestedModel:
    checkpoint = newest_checkpoint(run)
    if checkpoint is None:
        raise CheckpointError(
            f"models={run}", "The run has no complete checkpoint.", "Train it until it saves one, or name another run."
        )
    description = ModelDescription.read(checkpoint)
    data = StageManifest.read(run).data
    tokenizer = run_tokenizer(description, data, lambda *problem: CheckpointError(f"models={run}", *problem))
    return RequestedModel(tokenizer, state_of_checkpoint(checkpoint))
