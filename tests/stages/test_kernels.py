"""A stage whose kernels do not exist on this machine is refused before NeMo is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

_PROGRAM = """
import sys
from pathlib import Path
from tests.support.tiny import tiny_config, write_data
from nemo_prolong.errors import ConfigError
from nemo_prolong.stages.run import run_stage
try:
    run_stage(tiny_config(write_data(Path("data")), Path("runs"), precision={precision!r}), [])
except ConfigError as error:
    print(error)
print([name for name in ("nemo", "megatron", "transformer_engine") if name in sys.modules])
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there are kernels for a GPU here")
@pytest.mark.parametrize("precision", [{"compute": "fp8"}, {"compute": "bf16", "backend": "te"}])
def test_transformer_engine_is_refused_where_there_is_no_gpu(precision: dict[str, str], tmp_path: Path) -> None:
    program = _PROGRAM.format(precision=precision)
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path)
    message, imported = output.stdout.strip().rsplit("\n", 1)
    assert "Transformer Engine computes on a GPU, and there is none here. Set precision=bf16" in message
    assert imported == "[]"
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
