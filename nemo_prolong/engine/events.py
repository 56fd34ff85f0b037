"""``events.jsonl`` of a run: what happened that is not a step."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path

from nemo_prolong.config.run_records import EVENTS_FILE
from nemo_prolong.files import append_line
from nemo_prolong.redaction import redact

log = logging.getLogger(__name__)


def record_event(run_dir: Path, step: int, event: str, detail: str) -> None:
    """Append one event; call on one rank only.

    A record that cannot be written is logged: a full disk is the event most worth surviving.

    Args:
        run_dir: Run directory.
        step: Optimizer steps done.
        event: Kind, such as ``checkpoint_failed``.
        detail: What happened, one sentence.
    """
    record = {"time": round(time.time(), 3), "step": step, "event": event, "detail": redact(detail)}
    try:
        append_line(run_dir / EVENTS_FILE, json.dumps(record))
    except OSError as error:
        log.error("event %s could not be recorded: %s", record, error)
