"""What an evaluation knows about a model. It scores a document."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nemo_prolong.config.addresses import HF_PREFIX
from nemo_prolong.engine import open_megatron_scorer
from nemo_prolong.errors import DataError


class Scorer(Protocol):
    """A causal language model and its tokenizer."""

    @property
    def name(self) -> str:
        """The model as the user wrote it, such as ``runs/demo/stage2`` or ``hf:runs/demo/export/hf``."""

    @property
    def backend(self) -> str:
        """The library that runs it, ``megatron`` or ``transformers``."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer the model was trained with."""

    def logits(self, tokens: Tensor, start: int = 0) -> Tensor:
        """Return next-token logits of one document.

        Args:
            tokens: int64 [T], one document.
            start: First position whose logits are wanted. A long prompt is asked about its last positions only;
                all of ``[T, V]`` would be 250 GiB for 512K tokens of Llama-3.

        Returns:
            float32 [T - start, V]; row ``i`` predicts token ``start + i + 1``.
        """

    def token_losses(self, tokens: Tensor) -> Tensor:
        """Return the cross-entropy of every token but the first, in nats.

        Args:
            tokens: int64 [T], one document, T >= 2.

        Returns:
            float32 [T - 1]; element ``i`` is the loss of token ``i + 1`` given tokens ``0..i``.
        """


def open_scorer(model: str) -> Scorer:
    """Load the model that ``model`` names: ``hf:DIR`` through transformers, a run directory through Megatron.

    Raises:
        CheckpointError: If there is no such model, or it cannot be loaded.
    """
    if model.startswith(HF_PREFIX):
        from nemo_prolong.evaluate.transformers_scorer import TransformersScorer

        return TransformersScorer(model.removeprefix(HF_PREFIX))
    return open_megatron_scorer(model)


def require_tokens_in_vocabulary(tokens: Tensor, scorer: Scorer, source: str) -> None:
    """Refuse documents that another tokenizer wrote, as far as the ids tell.

    Args:
        tokens: int64 [T].
        scorer: The model about to score them.
        source: Where they come from, for the message.

    Raises:
        DataError: If an id is negative or beyond the model's vocabulary.
    """
    lowest, highest = int(tokens.min()), int(tokens.max())
    if lowest < 0 or highest >= len(scorer.tokenizer):
        foreign = lowest if lowest < 0 else highest
        raise DataError(
            f"rows={source}",
            f"Token id {foreign} is beyond the {len(scorer.tokenizer)} tokens of {scorer.name}.",
            "Evaluate on rows prepared with the tokenizer of that model.",
        )
