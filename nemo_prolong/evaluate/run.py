"""Run both evaluations for every model and write ``perplexity.json`` and ``recall.json``."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from nemo_prolong.config.schema import EvaluateConfig
from nemo_prolong.data.mds import MdsReader
from nemo_prolong.data.row_origins import row_origins
from nemo_prolong.data.run_tokenizer import require_rows_of
from nemo_prolong.evaluate.request import (
    open_rows,
    output_directories,
    require_ascending,
    require_model,
)
from nemo_prolong.logs import run_logging
from nemo_prolong.records.evaluation import EvaluatedState, PerplexityResult, RecallResult, is_current, write_result
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
    requested = {model: require_model(model) for model in cfg.models}
    rows = open_rows(cfg.rows)
    origins = {f"rows={cfg.rows}": row_origins(cfg.rows)}
    for model, (tokenizer, _) in requested.items():
        remedy = f"Evaluate {model} on rows that were prepared with its own tokenizer."
        require_rows_of(tokenizer, f"that of {model}", origins, remedy)
    for model, directory in directories.items():
        directory.mkdir(parents=True, exist_ok=True)
        with run_logging(directory / LOG_FILE, console=True):
            if cfg.when_complete == "succeed" and is_current(directory, requested[model].state, cfg):
                log.info("%s: is evaluated already", model)
                continue
            log.info("%s: loading", model)
            _evaluate_model(model, requested[model].state, rows, cfg, directory)
    return list(directories.values())


def _evaluate_model(model: str, state: EvaluatedState, rows: MdsReader, cfg: EvaluateConfig, directory: Path) -> None:
    """Load one model and run both tasks; each file is written as soon as its task is done."""
    # These import torch, which takes seconds and warns; by now it warns into the log.
    from nemo_prolong.evaluate.perplexity import measure_perplexity
    from nemo_prolong.evaluate.recall import measure_recall
    from nemo_prolong.evaluate.scorer import open_scorer

    scorer = open_scorer(model)
    settings = cfg.settings

    started = time.monotonic()
    documents, buckets = measure_perplexity(
        scorer, map(rows.__getitem__, range(len(rows))), cfg.position_buckets, cfg.max_documents, cfg.rows
    )
    perplexity = PerplexityResult(
        model=model,
        backend=scorer.backend,
        data=cfg.rows,
        documents=documents,
        buckets=buckets,
        seconds=time.monotonic() - started,
        settings=settings,
        step=state.step,
        model_sha256=state.sha256,
    )
    write_result(directory, perplexity)
    log.info("%s", describe_perplexity(perplexity))

    started = time.monotonic()
    lengths = measure_recall(scorer, cfg.recall_lengths, cfg.recall_samples, cfg.seed)
    seconds = time.monotonic() - started
    recall = RecallResult(
        model=model,
        backend=scorer.backend,
        lengths=lengths,
        seconds=seconds,
        settings=settings,
        step=state.step,
        model_sha256=state.sha256,
    )
    write_result(directory, recall)
    log.info("%s", describe_recall(recall))


def describe_perplexity(result: PerplexityResult) -> str:
    """Return one line with the model, and perplexity per bucket."""
    buckets = ", ".join(
        f"{format_tokens(bucket.end)} {bucket.perplexity:.1f}"
        for bucket in result.buckets
        if bucket.perplexity is not None
    )
    tokens = sum(bucket.tokens for bucket in result.buckets)
    return (
        f"{result.model}: perplexity up to position {buckets} "
        f"({result.documents} documents, {format_tokens(tokens)} tokens, {format_seconds(result.seconds)})"
    )


def describe_recall(result: RecallResult) -> str:
    """Return one line with the model, and exact match and answer loss per length."""
    lengths = ", ".join(
        f"{format_tokens(entry.length)} {entry.exact_match:.0%} (loss {entry.answer_loss:.2f})"
        for entry in result.lengths
    )
    return f"{result.model}: recall at {lengths} ({format_seconds(result.seconds)})"
