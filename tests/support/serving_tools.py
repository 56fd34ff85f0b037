"""What the tests of exports for servers share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_prolong.config.schema import ExportConfig
from tests.support.export_tools import export_config


def target_config(run: Path, output: Path, format: str, **changes: Any) -> ExportConfig:
    """Return a bf16 export for a server; ``changes`` replace keys of ``export``."""
    target = {"format": format, "calibration_rows": 6, "calibration_length": 48, **changes}
    return export_config(run, output, dtype="bf16", export=target)
