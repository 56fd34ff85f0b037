"""FLOPs of a training step, from the documents that are really in it.

A multiply-add is two FLOPs. The backward pass costs twice the forward pass. Attention is causal (half of a
document's square) and ends at the document. Recomputation is not counted. Per token of a document of length ``s`` this
is NVIDIA's formula for Llama,
``L * h**2 * (12 + 12 * K / H + 18 * ffn / h + 6 * s / h + 6 * V / (L * h))``,
in ``nemo/utils/flops_formulas.py`` since its causal factor of one half. Tables that do not halve attention print
numbers up to twice as large.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from nemo_prolong.plan.model_size import model_size

if TYPE_CHECKING:
    # The GPU check divides by the peaks of ``plan.devices``, which imports this, where pydantic is not installed.
    from nemo_prolong.config.schema import ModelConfig

CONVENTION = "causal, per document, forward + 2 x backward, no recomputation"
"""What is counted, in the words that tables and reports print."""


def training_flops(model: ModelConfig, document_lengths: Iterable[int]) -> int:
    """Return the FLOPs of forward and backward over these documents.

    Args:
        model: The model.
        document_lengths: Tokens of each document of the batch. Padding is not one.
    """
    lengths = list(document_lengths)
    return training_flops_of_sums(model, sum(lengths), sum(length * length for length in lengths))


def training_flops_of_sums(model: ModelConfig, tokens: int, squared_tokens: int) -> int:
    """Return what ``training_flops`` does, from the two sums that it depends on.

    Args:
        model: The model.
        tokens: Tokens of all documents.
        squared_tokens: Sum over the documents of the square of their tokens.
    """
    width = model.num_attention_heads * model.kv_channels
    return 6 * model_size(model).in_matrix_products * tokens + 6 * model.num_layers * width * squared_tokens


def training_flops_per_token(model: ModelConfig, document_length: int) -> float:
    """Return the FLOPs per token when every document has ``document_length`` tokens."""
    return training_flops(model, [document_length]) / document_length
