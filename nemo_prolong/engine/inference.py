"""Score token sequences with the Megatron model of a run, in one process.

Builds the same layers as training from ``model.json`` and loads the distributed checkpoint into them.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, cast

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.validation import StrictHandling
from transformers import PreTrainedTokenizerBase

from nemo_prolong.config.schema import ParallelismConfig, PrecisionConfig
from nemo_prolong.data.tokenizer.loading import load_tokenizer
from nemo_prolong.engine.model.nemo_model import build_nemo_config
from nemo_prolong.engine.training.packed_step import packed_seq_params
from nemo_prolong.errors import CheckpointError
from nemo_prolong.records.checkpoint.model_description import ModelDescription
from nemo_prolong.records.checkpoint.verify import newest_checkpoint
from nemo_prolong.weights.checkpoint_reader import CheckpointReader
from nemo_prolong.weights.names import rules
from nemo_prolong.weights.pickles import check_pickles

_VALUES = 2
"""Which part of the fused projection the values are; the others are queries and keys."""


def load_megatron_model(checkpoint: Path, description: ModelDescription) -> torch.nn.Module:
    """Return Megatron's GPTModel of a checkpoint, in fp32, in evaluation mode.

    Args:
        checkpoint: A directory ``checkpoints/step_XXXXXXXX``.
        description: Its ``model.json``.

    Raises:
        CheckpointError: If it holds something that loading would execute.
    """
    check_pickles(checkpoint)
    start_single_process()
    config = build_nemo_config(
        model=description.model_config,
        seq_length=description.seq_length,
        parallelism=ParallelismConfig(),
        precision=PrecisionConfig(compute="fp32"),
        restored=True,
    )
    model = config.configure_model(tokenizer=None)
    prefix = CheckpointReader(checkpoint).wrapper_prefix
    loaded = dist_checkpointing.load(
        model.sharded_state_dict(prefix=prefix), str(checkpoint / "weights"), strict=StrictHandling.ASSUME_OK_UNEXPECTED
    )
    # What Lightning stored beside the tensors comes back with them.
    weights = {key.removeprefix(prefix): value for key, value in loaded.items() if key.startswith(prefix)}
    model.load_state_dict(weights)
    return model.eval()


class MegatronScorer:
    """Log-probabilities of a run's model, through Megatron.

    Args:
        run_dir: Run directory; its newest checkpoint is used.
        weights_dtype: Round the weights to this dtype, as an export in that dtype does; the arithmetic stays fp32.

    Raises:
        CheckpointError: If the run has no complete checkpoint.
    """

    backend = "megatron"

    def __init__(self, run_dir: str | Path, weights_dtype: torch.dtype | None = None) -> None:
        self.name = str(run_dir)
        checkpoint = newest_checkpoint(Path(run_dir))
        if checkpoint is None:
            raise CheckpointError(
                str(run_dir), "the run has no complete checkpoint.", "Train it until it saves one, or name another run."
            )
        self.description = ModelDescription.read(checkpoint)
        self._model = load_megatron_model(checkpoint, self.description)
        if weights_dtype is not None:
            for parameter in self._model.parameters():
                parameter.data.copy_(parameter.data.to(weights_dtype))

    @functools.cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer the model was trained with.

        Raises:
            CheckpointError: If it is gone or cannot be loaded.
        """
        directory = self.description.tokenizer_directory
        try:
            return load_tokenizer(directory)
        # A broken tokenizer.json makes the tokenizers library raise a bare Exception.
        except Exception as error:
            raise CheckpointError(
                f"models={self.name}",
                f"the tokenizer it was trained with cannot be loaded from {directory}: {error}",
                "Put the data directory back where it was, or run the command where the run was started.",
            ) from error

    @property
    def inv_freq(self) -> torch.Tensor:
        """RoPE frequencies of the model, float32 [C / 2], in radians per position."""
        return cast(torch.Tensor, self._model.get_submodule("rotary_pos_emb").inv_freq)

    @torch.no_grad()
    def sharpen_attention(self, factor: float) -> None:
        """Multiply queries and keys, so that a comparison sees positions that the weights as they are hardly look at.

        Args:
            factor: A power of two keeps the weights exact.
        """
        model = self.description.model_config
        rule = next(rule for rule in rules(model) if rule.megatron.endswith("linear_qkv.weight"))
        for name, parameter in self._model.named_parameters():
            if name.endswith("linear_qkv.weight"):
                for rows in rule.row_ranges(model):
                    if rows.part != _VALUES:
                        parameter[rows.start : rows.end] *= factor

    @torch.no_grad()
    def logits(self, tokens: torch.Tensor, start: int = 0, position_ids: torch.Tensor | None = None) -> torch.Tensor:
        """Return the next-token logits of one document.

        Args:
            tokens: int64 [T].
            start: First position whose logits are wanted.
            position_ids: int64 [T], ascending, where RoPE sees the tokens instead of at 0, 1, 2, ...

        Returns:
            float32 [T - start, V], without the padding of the vocabulary.
        """
        output = self._forward(tokens, position_ids=position_ids)
        return output[0, start:, : self.description.model_config.vocab_size].float()

    @torch.no_grad()
    def token_losses(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the loss of every token but the first of one document.

        Args:
            tokens: int64 [T].

        Returns:
            float32 [T - 1]; entry i is the loss of token i+1.
        """
        labels = torch.cat([tokens[1:], tokens[:1]])
        loss_mask = torch.ones(1, len(tokens))
        return self._forward(tokens, labels=labels[None], loss_mask=loss_mask).token_losses[:-1].float()

    def _forward(self, tokens: torch.Tensor, position_ids: torch.Tensor | None = None, **targets: torch.Tensor) -> Any:
        length = tokens.numel()
        boundaries = torch.tensor([0, length], dtype=torch.int32)
        positions = torch.arange(length) if position_ids is None else position_ids
        return self._model(
            input_ids=tokens[None],
            position_ids=positions[None],
            attention_mask=None,
            packed_seq_params=packed_seq_params(boundaries, int(positions[-1]) + 1),
            **targets,
        )


def start_single_process() -> None:
    """Give Megatron the process groups it asks for: one rank, once per process."""
    if parallel_state.model_parallel_is_initialized():
        return
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
