"""Run both evaluations for every model and leave ``perplexity.json`` and ``recall.json`` behind."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_prolong.config.schema import EvaluateConfig
from nemo_prolong.data.mds import MdsReader
from nemo_prolong.evaluate.request import open_rows, output_directories, require_ascending, require_model
from nemo_prolong.files import write_json_atomically
from nemo_prolong.logs import run_logging
from nemo_prolong.units import format_seconds, format_tokens

log = logging.getLogger(__name__)

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
    require_ascending(cfg.position_buckets)
    directories = output_directories(cfg)
    for model in cfg.models:
        require_model(model)
    rows = open_rows(cfg.rows)
    for model, directory in directories.items():
        directory.mkdir(parents=True, exist_ok=True)
        with run_logging(directory / LOG_FILE, console=True):
            log.info("%s: loading", model)
            _evaluate_model(model, rows, cfg, directory)
    return list(directories.values())


def _evaluate_model(model: str, rows: MdsReader, cfg: EvaluateConfig, directory: Path) -> None:
    """Load one model and run both tasks; each file is written as soon as its task is done."""
    # These import torch, which takes seconds and warns; by now it warns into the log.
    from nemo_prolong.evaluate.perplexity import measure_perplexity
    from nemo_prolong.evaluate.recall import measure_recall
    from nemo_prolong.evaluate.scorer import open_scorer

    scorer = open_scorer(model)
    identity = {"model": model, "through": scorer.through}
    settings = cfg.model_dump(mode="json")

    started = time.monotonic()
    perplexity = measure_perplexity(
        scorer, map(rows.__getitem__, range(len(rows))), cfg.position_buckets, cfg.max_documents, cfg.rows
    )
    seconds = time.monotonic() - started
    result = {"task": "perplexity", **identity, "data": cfg.rows, **perplexity, "seconds": seconds}
    write_json_atomically(directory / "perplexity.json", {**result, "settings": settings})
    log.info("%s", describe_perplexity(result))

    started = time.monotonic()
    lengths = measure_recall(scorer, cfg.recall_lengths, cfg.recall_samples, cfg.seed)
    seconds = time.monotonic() - started
    result = {"task": "recall", **identity, "lengths": lengths, "seconds": seconds}
    write_json_atomically(directory / "recall.json", {**result, "settings": settings})
    log.info("%s", describe_recall(result))


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
