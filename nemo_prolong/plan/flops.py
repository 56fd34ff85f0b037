"""FLOPs of a training step, from the documents that are really in it.

Convention: a multiply-add is two FLOPs, the backward pass costs twice the forward pass, attention is causal (half of a
document's square) and ends at the document, recomputation is not counted. Per token of a document of length ``s`` this
is NVIDIA's formula for Llama,
``L * h**2 * (12 + 12 * K / H + 18 * ffn / h + 6 * s / h + 6 * V / (L * h))``,
in ``nemo/utils/flops_formulas.py`` since its causal factor of one half. Tables that do not halve attention print
numbers up to twice as large.
"""

from __future__ import annotations

from collections.abc import Iterable

from nemo_prolong.config.schema import ModelConfig
from nemo_prolong.plan.model_size import model_size


def training_flops(model: ModelConfig, document_lengths: Iterable[int]) -> int:
    """Return the FLOPs of forward and backward over these documents.

    Args:
        model: The model.
        document_lengths: Tokens of each document of the batch; padding is not one.
    """
    lengths = list(document_lengths)
    products = 6 * model_size(model).in_matrix_products * sum(lengths)
    width = model.num_attention_heads * model.kv_channels
    attention = 6 * model.num_layers * width * sum(length * length for length in lengths)
    return products + attention


def training_flops_per_token(model: ModelConfig, document_length: int) -> float:
    """Return the FLOPs per token when every document has ``document_length`` tokens."""
    return training_flops(model, [document_length]) / document_length
