"""The configuration of ``scripts/report.py``."""

from __future__ import annotations

from pydantic import Field

from nemo_prolong.config.schema.base import Name, Names, Section


class ReportConfig(Section):
    """The configuration of ``scripts/report.py``."""

    runs: Names = Field(min_length=1)
    """Run directories in the order of the stages."""
    exported: Name | None
    """Exported directory to report on; null for none."""
    output: Name
    """HTML file to write; ``summary.json`` goes beside it."""
