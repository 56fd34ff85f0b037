"""Write the report: ``report.html``, and ``summary.json`` beside it."""

from __future__ import annotations

import logging
from pathlib import Path

from nemo_prolong.config.schema import ReportConfig
from nemo_prolong.files import write_json_atomically, write_text_atomically
from nemo_prolong.report.training.html import render
from nemo_prolong.report.training.read import read_lineage
from nemo_prolong.report.training.summary import summarize

log = logging.getLogger(__name__)


def write_report(cfg: ReportConfig) -> tuple[Path, Path]:
    """Write the page and the summary; return their paths.

    Raises:
        CheckpointError: If a run directory is missing or its ``stage.json`` is unusable.
        ExportError: If ``export`` is set and is no exported directory.
    """
    lineage = read_lineage(cfg.runs, cfg.exported)
    page = Path(cfg.output)
    summary = page.with_name("summary.json")
    write_json_atomically(summary, summarize(lineage))
    write_text_atomically(page, render(lineage, cfg))
    log.info("%s: %d stages; numbers in %s", page, len(lineage.stages), summary)
    return page, summary
