"""Export a run: write, compare, and only then give the directory its name."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from nemo_prolong.config.schema import ExportConfig
from nemo_prolong.errors import CheckpointError
from nemo_prolong.export.hf_config import load_tokenizer, write_configuration
from nemo_prolong.export.manifest import write_manifest
from nemo_prolong.export.model_card import model_card
from nemo_prolong.export.output import check_output, working_directory
from nemo_prolong.export.source import Source, open_source
from nemo_prolong.export.verify import verify_configuration, verify_tensors
from nemo_prolong.export.writer import write_weights
from nemo_prolong.files import write_text_atomically
from nemo_prolong.logs import run_logging
from nemo_prolong.units import format_seconds

log = logging.getLogger(__name__)

LOG_FILE = "export.log"

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def export(cfg: ExportConfig) -> None:
    """Write the newest checkpoint of ``cfg.run`` as a Hugging Face directory.

    Library output goes to ``export.log`` in the run directory. The output appears when it is complete and verified, or
    not at all.

    Raises:
        CheckpointError: If the run or its checkpoint is missing or incomplete.
        ExportError: If the output is taken, the model cannot be exported, or the export does not equal it.
    """
    output = Path(cfg.output)
    check_output(output, overwrite=cfg.overwrite)
    if not Path(cfg.run).is_dir():
        raise CheckpointError(
            f"run={cfg.run}", "the run directory does not exist.", "Name a run such as run=runs/demo/sft."
        )
    started = time.monotonic()
    with run_logging(Path(cfg.run) / LOG_FILE, console=True):
        source = open_source(cfg.run)
        log.info("exporting %s, step %d, as %s to %s", cfg.run, source.step, cfg.dtype, output)
        _write(cfg, source, output)
        log.info("exported in %s; load it with:", format_seconds(time.monotonic() - started))
        log.info('  AutoModelForCausalLM.from_pretrained("%s"), AutoTokenizer.from_pretrained("%s")', output, output)


def _write(cfg: ExportConfig, source: Source, output: Path) -> None:
    """Fill the output: everything but the manifest is there before it is verified, the manifest comes last."""
    dtype = _DTYPES[cfg.dtype]
    tokenizer = load_tokenizer(source.tokenizer)
    with working_directory(output) as directory:
        write_configuration(source, tokenizer, directory, dtype)
        weights = write_weights(source, directory, dtype, cfg.max_shard_bytes)
        verification = verify(source, tokenizer, directory, dtype) if cfg.verify else None
        write_text_atomically(directory / "README.md", model_card(source, dtype, verification))
        write_manifest(source, directory, dtype, weights, verification)


def verify(source: Source, tokenizer: PreTrainedTokenizerBase, directory: Path, dtype: torch.dtype) -> dict[str, Any]:
    """Compare a directory with the checkpoint; return what was compared.

    Raises:
        ExportError: If anything differs.
    """
    from nemo_prolong.export.logits import verify_logits

    verify_configuration(source, tokenizer, directory, dtype)
    tensors = verify_tensors(source, directory, dtype)
    log.info("%d tensors read back, bitwise equal to the checkpoint", tensors)
    result = verify_logits(source, tokenizer, directory, dtype)
    log.info("logits differ from Megatron's by at most %.2e", result["max_logit_difference"])
    return {"tensors": tensors, **result}
