"""Readers of raw corpora: files of many formats to documents, in an order that no worker count changes."""

from nemo_prolong.data.sources.catalog import plan_units, read_unit
from nemo_prolong.data.sources.detection import detect_format

__all__ = ["detect_format", "plan_units", "read_unit"]
