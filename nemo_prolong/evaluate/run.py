"""Run both evaluations for every model and leave ``perplexity.json`` and ``recall.json`` behind."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_prolong.config.locations import HF_PREFIX, evaluation_directory
from nemo_prolong.config.schema import EvaluateConfig
from nemo_prolong.data.mds import MdsReader
from nemo_prolong.errors import ConfigError, DataError
from nemo_prolong.evaluate.perplexity import measure_perplexity
from nemo_prolong.evaluate.recall import measure_recall
from nemo_prolong.evaluate.scorer import Scorer, open_scorer, require_model
from nemo_prolong.files import write_json_atomically
from nemo_prolong.logs import run_logging
from nemo_prolong.units import format_seconds, format_tokens

logger = logging.getLogger(__name__)

LOG_FILE = "evaluate.log"
"""Beside the results: our lines, and everything the libraries said."""


def evaluate(cfg: EvaluateConfig) -> list[Path]:
    """Measure perplexity by position and recall of every model; return the directories written.

    Models are loaded one after the other, never two at once. Everything that can be wrong with the request is refused
    before the first is loaded.

    Raises:
        ConfigError: If buckets do not ascend, a recall length holds no pair, or two models would share an output.
        CheckpointError: If a model does not exist or cannot be loaded.
        DataError: If the rows do not exist, are empty, or were written with another tokenizer.
    """
    _require_ascending(cfg.position_buckets)
    directories = output_directories(cfg)
    for model in cfg.models:
        require_model(model)
    rows = _open_rows(cfg.rows)
    for model, directory in directories.items():
        directory.mkdir(parents=True, exist_ok=True)
        with run_logging(directory / LOG_FILE, console=True):
            logger.info("%s: loading", model)
            _evaluate_model(open_scorer(model), rows, cfg, model, directory)
    return list(directories.values())


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


def _require_ascending(ends: list[int]) -> None:
    if sorted(set(ends)) != ends:
        raise ConfigError(
            f"position_buckets={ends}", "Upper ends must ascend.", f"Write position_buckets={sorted(set(ends))}."
        )


def _open_rows(directory: str) -> MdsReader:
    """Open the packed rows; the reader says what is wrong with them."""
    if not Path(directory).is_dir():
        raise DataError(
            f"rows={directory}",
            "The directory does not exist.",
            "Write the rows with scripts/prepare_data.py, or name a row set below the data root.",
        )
    return MdsReader(directory)


def _evaluate_model(scorer: Scorer, rows: MdsReader, cfg: EvaluateConfig, model: str, directory: Path) -> None:
    """Run both tasks on one loaded model; each file is written as soon as its task is done."""
    identity = {"model": model, "through": scorer.through}
    settings = cfg.model_dump(mode="json")

    started = time.monotonic()
    perplexity = measure_perplexity(
        scorer, map(rows.__getitem__, range(len(rows))), cfg.position_buckets, cfg.max_documents, cfg.rows
    )
    seconds = time.monotonic() - started
    result = {"task": "perplexity", **identity, "data": cfg.rows, **perplexity, "seconds": seconds}
    write_json_atomically(directory / "perplexity.json", {**result, "settings": settings})
    logger.info("%s", describe_perplexity(result))

    started = time.monotonic()
    lengths = measure_recall(scorer, cfg.recall_lengths, cfg.recall_samples, cfg.seed)
    seconds = time.monotonic() - started
    result = {"task": "recall", **identity, "lengths": lengths, "seconds": seconds}
    write_json_atomically(directory / "recall.json", {**result, "settings": settings})
    logger.info("%s", describe_recall(result))


def describe_perplexity(result: Mapping[str, Any]) -> str:
    """Return one line: the model, and perplexity per bucket."""
    buckets = ", ".join(
        f"{format_tokens(entry['end'])} {entry['perplexity']:.1f}"
        for entry in result["buckets"]
        if entry["perplexity"] is not None
    )
    tokens = sum(entry["tokens"] for entry in result["buckets"])
    return (
        f"{result['model']}: perplexity up to position {buckets} "
        f"({result['documents']} documents, {format_tokens(tokens)} tokens, {format_seconds(result['seconds'])})"
    )


def describe_recall(result: Mapping[str, Any]) -> str:
    """Return one line: the model, and exact match and answer loss per length."""
    lengths = ", ".join(
        f"{format_tokens(entry['length'])} {entry['exact_match']:.0%} (loss {entry['answer_loss']:.2f})"
        for entry in result["lengths"]
    )
    return f"{result['model']}: recall at {lengths} ({format_seconds(result['seconds'])})"
