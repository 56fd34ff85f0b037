"""A Hugging Face directory as a ``Scorer``: plain ``transformers``, local safetensors, no code from the directory.

A document goes through in pieces that share a key-value cache, so the largest tensors are one piece's logits
``[piece, vocab]`` and the cache, whatever the document's length.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DynamicCache

from nemo_prolong.config.addresses import HF_PREFIX
from nemo_prolong.data.tokenizer.loading import load_tokenizer
from nemo_prolong.errors import CheckpointError
from nemo_prolong.weights.hf_directory import check_one_set_of_weights
from nemo_prolong.weights.hf_model import load_model

LOGITS_BYTES = 2**29
"""Float32 logits of one piece: 1024 tokens with Llama-3's vocabulary."""
MAX_PIECE_TOKENS = 8192
"""With a small vocabulary, what the layers hold of a piece counts instead."""


class TransformersScorer:
    """Scores documents with ``AutoModelForCausalLM``: float32 on the CPU, the checkpoint's dtype on a GPU.

    A piece as long as the document is twice as fast as short ones, so pieces are as long as memory allows.

    Args:
        directory: Hugging Face directory with ``config.json``, safetensors weights and a tokenizer.

    Raises:
        CheckpointError: If it lacks one of them, holds two sets of weights, wants code of its own to be run, or leaves
            weights unset.
    """

    backend = "transformers"

    def __init__(self, directory: str | Path) -> None:
        directory = Path(directory)
        if not any(directory.glob("*.safetensors")):
            raise CheckpointError(
                f"models={HF_PREFIX}{directory}",
                "There is no *.safetensors file in it; other weight files can carry code and are not read.",
                "Export the run with scripts/export.py, or convert the weights to safetensors.",
            )
        self.name = f"{HF_PREFIX}{directory}"
        check_one_set_of_weights(directory, f"models={self.name}")
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            self.tokenizer = load_tokenizer(directory)
            self.model = _load_model(directory, self.device)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise CheckpointError(
                f"models={self.name}",
                f"transformers cannot load it: {error}",
                "Name a complete directory of an architecture that transformers has built in.",
            ) from error
        self.piece_tokens = min(MAX_PIECE_TOKENS, max(1, LOGITS_BYTES // (4 * self.model.config.vocab_size)))

    def logits(self, tokens: Tensor, start: int = 0) -> Tensor:
        """See ``Scorer.logits``: int64 [T] -> float32 [T - start, V] on the CPU."""
        return torch.cat([logits.cpu() for _, logits in self._pieces(tokens, start)])

    def token_losses(self, tokens: Tensor) -> Tensor:
        """See ``Scorer.token_losses``: int64 [T] -> float32 [T - 1] on the CPU."""
        losses = []
        for offset, logits in self._pieces(tokens[:-1]):
            targets = tokens[offset + 1 : offset + 1 + len(logits)].to(self.device)
            losses.append(cross_entropy(logits, targets, reduction="none").cpu())
        return torch.cat(losses)

    @torch.inference_mode()
    def _pieces(self, tokens: Tensor, start: int = 0) -> Iterator[tuple[int, Tensor]]:
        """Yield (first position, float32 logits [N, V]) of consecutive pieces of one document from ``start`` on."""
        cache = DynamicCache(config=self.model.config)
        for offset in range(0, len(tokens), self.piece_tokens):
            piece = tokens[None, offset : offset + self.piece_tokens].to(self.device)
            first = max(offset, start)
            wanted = offset + piece.shape[1] - first
            # A piece before ``start`` only fills the cache; transformers has no way to ask for no logits at all.
            output = self.model(piece, past_key_values=cache, use_cache=True, logits_to_keep=max(wanted, 1))
            if wanted > 0:
                yield first, output.logits[0].float()


def _load_model(directory: Path, device: torch.device) -> Any:
    """Load the weights and refuse a checkpoint that leaves some at their random initial values."""
    model, problems = load_model(directory, torch.float32 if device.type == "cpu" else "auto")
    if missing := problems.get("missing_keys"):
        raise ValueError(f"weights are missing: {', '.join(missing[:3])}")
    return model.to(device)
