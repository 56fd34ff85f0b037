"""Fill the output of an export: write, compare, and only then give the directory its name."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from nemo_prolong.config.schema import ExportConfig
from nemo_prolong.export.hf_config import load_tokenizer, special_tokens, write_configuration
from nemo_prolong.export.logits import verify_logits
from nemo_prolong.export.manifest import write_manifest
from nemo_prolong.export.model_card import model_card
from nemo_prolong.export.output import working_directory
from nemo_prolong.export.serving.target import prepare_target
from nemo_prolong.export.source import ExportSource, open_source
from nemo_prolong.export.turn_end import check_turn_end
from nemo_prolong.export.verify import verify_configuration, verify_tensors
from nemo_prolong.export.writer import write_weights
from nemo_prolong.files import write_text_atomically
from nemo_prolong.records.export_manifest import VerificationRecord

log = logging.getLogger(__name__)

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def write_export(cfg: ExportConfig) -> None:
    """Write the newest checkpoint of ``cfg.run`` into ``cfg.output``, whole and verified, or not at all.

    Raises:
        CheckpointError: If the run or its checkpoint is incomplete.
        ExportError: If the model cannot be exported, generation would not end with a turn, or the export does not equal
            the model.
    """
    source = open_source(cfg.run)
    log.info("checkpoint of step %d, rotary_base %g", source.step, source.model.rotary_base)
    dtype = _DTYPES[cfg.dtype]
    tokenizer = load_tokenizer(source.tokenizer)
    special = special_tokens(source, tokenizer)
    log.info("generation ends at %s", ", ".join(special.stop_tokens))
    with working_directory(Path(cfg.output)) as directory:
        write_configuration(source, tokenizer, directory, dtype)
        check_turn_end(source, special, load_tokenizer(directory))
        weights = write_weights(source, directory, dtype, cfg.max_shard_bytes)
        verification = verify(source, tokenizer, directory, dtype) if cfg.verify else None
        target = prepare_target(cfg, source.manifest, directory)
        write_text_atomically(directory / "README.md", model_card(source, special, dtype, verification, target))
        # A target may have replaced the weights, so they are hashed anew.
        digests = weights if target is None else {}
        write_manifest(source, special, directory, dtype, digests, verification, target)


def verify(
    source: ExportSource, tokenizer: PreTrainedTokenizerBase, directory: Path, dtype: torch.dtype
) -> VerificationRecord:
    """Compare a directory with the checkpoint; return what was compared.

    Raises:
        ExportError: If anything differs.
    """
    verify_configuration(source, tokenizer, directory, dtype)
    tensors = verify_tensors(source, directory, dtype)
    log.info("%d tensors read back, bitwise equal to the checkpoint", tensors)
    result = verify_logits(source, tokenizer, directory, dtype)
    log.info("logits differ from Megatron's by at most %.2e", result.max_logit_difference)
    return VerificationRecord(tensors=tensors, **dict(result))
