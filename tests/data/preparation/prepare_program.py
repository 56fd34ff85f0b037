"""Prepare what a JSON file describes, in a process of its own; started by the tests."""

from __future__ import annotations

import sys
from pathlib import Path

from nemo_prolong.config.schema.prepare import PrepareConfig
from nemo_prolong.data.preparation.run import prepare

if __name__ == "__main__":
    prepare(PrepareConfig.model_validate_json(Path(sys.argv[1]).read_text()))
