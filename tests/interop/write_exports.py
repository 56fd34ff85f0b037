"""Export tiny models, one also in FP8, and record what transformers makes of them.

``python -m tests.interop.write_exports DIR``, for ``make test-interop``. Another version of transformers must make the
same of the same directories (``interop_transformers.py``, which runs there).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "untied": {"rotary_base": 1.28e8},
    "tied": {"share_embeddings_and_output_weights": True},
    "scaled": {"rope_scaling": SCALING},
}


def main() -> None:
    """Train, export and record every variant."""
    from nemo_prolong.export.run import export
    from nemo_prolong.stages.run import run_stage
    from tests.support.export_tools import export_config, write_tokenizer
    from tests.support.tiny import tiny_config, write_data
    from tests.support.what_transformers_makes import record

    root = Path(sys.argv[1])
    write_data(root / "data")
    write_tokenizer(root / "data" / "tokenizer")
    for name, model in VARIANTS.items():
        cfg = tiny_config(
            root / "data", root / "runs", name=name, model=model, train={"train_iters": 8},
            advertised_context_length=2**19,
        )  # fmt: skip
        run_stage(cfg, [])
        export(export_config(Path(cfg.run_dir), root / name))
        (root / f"{name}.json").write_text(json.dumps(record(root / name)))
    untied = root / "runs" / "untied"
    export(export_config(untied, root / "bf16", dtype="bf16"))
    target = {"format": "trtllm", "quantization": "fp8", "calibration_rows": 6}
    export(export_config(untied, root / "fp8", dtype="bf16", export=target))


if __name__ == "__main__":
    main()
