"""What is exported: a run's newest checkpoint, what its manifest says about it, and its tensors in Hugging Face's cut.

Needs no model and no process group. Holds one tensor of one layer at a time.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor

from nemo_prolong.config.schema import ModelConfig
from nemo_prolong.data.run_tokenizer import run_tokenizer
from nemo_prolong.data.tokenizer import TextEncoder
from nemo_prolong.data.tokenizer.stop_tokens import older_stop_ids
from nemo_prolong.errors import CheckpointError, ExportError
from nemo_prolong.records.checkpoint.model_description import ModelDescription
from nemo_prolong.records.checkpoint.verify import newest_checkpoint
from nemo_prolong.records.stage_manifest import StageManifest
from nemo_prolong.weights.checkpoint_reader import CheckpointReader
from nemo_prolong.weights.names import Piece, TensorRule, rules

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExportSource:
    """A checkpoint that can be exported.

    Attributes:
        run_dir: The run.
        checkpoint: Its newest checkpoint.
        step: Optimizer steps of that checkpoint.
        manifest: ``stage.json`` of the run.
        model: The model of the checkpoint.
        tokenizer: Directory of its tokenizer.
        reader: Its tensors.
    """

    run_dir: Path
    checkpoint: Path
    step: int
    manifest: StageManifest
    model: ModelConfig
    tokenizer: Path
    reader: CheckpointReader

    @cached_property
    def stop_token_ids(self) -> tuple[int, ...]:
        """What ends the texts that the model generates. Runs of earlier versions do not say it, and the tokenizer does.

        Raises:
            DataError: If the tokenizer is asked and cannot be loaded.
        """
        if self.manifest.stop_token_ids:
            return tuple(self.manifest.stop_token_ids)
        ids = older_stop_ids(TextEncoder(self.tokenizer, "tokenizers"))
        log.info("stage.json does not say what ends the texts of the model; by its tokenizer it is %s", ids)
        return tuple(ids)

    def read(self, piece: Piece) -> Tensor:
        """Return a Megatron tensor of one layer in the checkpoint's dtype, the padding of a vocabulary included."""
        if piece.layer is None:
            return self.reader.read(piece.rule.megatron)
        return self.reader.read_layer(piece.rule.megatron, piece.layer)

    def read_rows(self, piece: Piece, start: int, rows: Tensor) -> None:
        """Fill ``rows``, of the checkpoint's dtype, with those of a Megatron tensor of one layer from ``start`` on."""
        self.reader.read_rows(piece.rule.megatron, start, rows, piece.layer)


def open_source(run: str) -> ExportSource:
    """Open the newest checkpoint of a run.

    Args:
        run: Run directory.

    Raises:
        CheckpointError: If it is no run, or holds no complete checkpoint.
        ExportError: If the checkpoint and the manifest disagree about the model, or the checkpoint holds other tensors
            than a Llama of that shape.
    """
    run_dir = Path(run)
    manifest = StageManifest.read(run_dir)
    checkpoint = newest_checkpoint(run_dir)
    if checkpoint is None:
        raise CheckpointError(
            f"run={run}", "the run has no complete checkpoint.", f"Train until it saves one: {manifest.command}"
        )
    description = ModelDescription.read(checkpoint)
    tokenizer = run_tokenizer(description, manifest.data, lambda *problem: ExportError(f"run={run}", *problem))
    source = ExportSource(
        run_dir=run_dir,
        checkpoint=checkpoint,
        step=description.step,
        manifest=manifest,
        model=description.model_config,
        tokenizer=tokenizer,
        reader=CheckpointReader(checkpoint),
    )
    _check_model(source)
    _check_tensors(source)
    if manifest.status != "complete":
        log.warning("%s is not finished: step %d of %d is exported", run, source.step, manifest.train_iters)
    return source


def _check_model(source: ExportSource) -> None:
    """Refuse a checkpoint that is of another model than the manifest says."""
    theirs, ours = source.manifest.model.model_dump(), source.model.model_dump()
    differing = [f"{key} ({ours[key]} and {theirs[key]})" for key in ours if ours[key] != theirs[key]]
    if source.manifest.rotary_base != source.model.rotary_base:
        differing.append(f"rotary_base ({source.model.rotary_base} and {source.manifest.rotary_base})")
    if differing:
        raise ExportError(
            f"run={source.run_dir}",
            f"model.json of {source.checkpoint.name} and stage.json disagree in {', '.join(dict.fromkeys(differing))}.",
            "Restore whichever of the two was changed.",
        )


def _check_tensors(source: ExportSource) -> None:
    """Refuse tensors that are missing, unknown or of another shape, before anything is written."""
    expected = {rule.megatron: rule for rule in rules(source.model)}
    found = set(source.reader.names())
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is not part of a Llama" for name in sorted(found - expected.keys())]
    for name, rule in expected.items():
        if name in found and not _fits(source.reader.shape(name), rule, source.model):
            problems.append(f"{name} has shape {list(source.reader.shape(name))}")
    if problems:
        raise ExportError(
            f"run={source.run_dir}",
            f"{source.checkpoint.name} does not hold the tensors of its model.json: {'; '.join(problems[:3])}.",
            "Export a checkpoint of a Llama that this software trained.",
        )


def _fits(shape: tuple[int, ...], rule: TensorRule, model: ModelConfig) -> bool:
    """Whether a tensor of the checkpoint has the shape its parts have together; a vocabulary may be padded."""
    if rule.stacked:
        if shape[:1] != (model.num_layers,):
            return False
        shape = shape[1:]
    parts = rule.shapes(model)
    rows = sum(part[0] for part in parts)
    padded = parts[0][0] == model.vocab_size and not rule.stacked and len(shape) > 1
    return shape[1:] == parts[0][1:] and (shape[0] >= rows if padded else shape[0] == rows)
