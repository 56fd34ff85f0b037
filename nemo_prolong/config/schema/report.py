"""The configuration of ``scripts/report.py``."""

from __future__ import annotations

from pydantic import Field

from nemo_prolong.config.schema.base import Section


class ReportConfig(Section):
    """The configuration of ``scripts/report.py``."""

    runs: list[str] = Field(min_length=1)
    """Run directories in the order of the stages."""
    exported: str | None
    """Exported directory to report on; null for none."""
    output: str
    """HTML file to write; ``summary.json`` goes beside it."""
