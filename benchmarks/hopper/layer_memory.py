"""What a step holds, by arithmetic: one rank, with or without every layer being computed again in the backward pass.

Needs no torch. The tests hold it against what the profiler counts on a CPU.
"""

from __future__ import annotations

from benchmarks.hopper.loss_head import CHUNK_TOKENS, HeadSize
from benchmarks.hopper.loss_head import expected_bytes as head_bytes
from nemo_prolong.config.schema import ModelConfig
from nemo_prolong.plan.model_size import model_size

STATE_BYTES = 2 + 4 + 4 + 8
"""Per parameter: the weight in bfloat16, its gradient and master copy in float32, two moments of Adam."""

_OPTIMIZER_BYTES = 4
"""Per parameter, while it is updated: the denominator of Adam."""


def state_bytes(model: ModelConfig) -> int:
    """Return the memory of weights, gradients and optimizer."""
    return STATE_BYTES * model_size(model).total


def layer_bytes_per_token(model: ModelConfig, device_type: str) -> int:
    """Return what the backward pass of one layer holds per token when it holds most: inside SwiGLU.

    Seven tensors of the MLP's width (both halves of its input, the activation, the product, and three gradients), three
    of the queries' and of the keys' width (before and after RoPE, output or value), five of the hidden width (the input
    of the layer, two norms, the stream between attention and MLP, a gradient), the log-sum-exp of the attention, and of
    RoPE the angles, their table, cosines and sines. Each RMSNorm of a CPU keeps two copies in float32 besides.
    """
    query, key_value = (n * model.kv_channels for n in (model.num_attention_heads, model.num_query_groups))
    hidden = (5 * 2 + (2 * 2 * 4 if device_type == "cpu" else 0)) * model.hidden_size
    mlp, attention = 7 * 2 * model.ffn_hidden_size, 3 * 2 * (query + key_value) + 4 * model.num_attention_heads
    return mlp + attention + hidden + 12 * model.kv_channels


def kept_bytes_per_token(model: ModelConfig) -> int:
    """Return what a layer of Transformer Engine keeps per token for its backward pass, in bfloat16.

    Both norms keep their input and output, attention its query, keys, values, output and log-sum-exp, and the MLP both
    halves of its input and what SwiGLU makes of them.
    """
    query, key_value = (n * model.kv_channels for n in (model.num_attention_heads, model.num_query_groups))
    attention = 2 * (2 * query + 2 * key_value) + 4 * model.num_attention_heads
    return 2 * 4 * model.hidden_size + attention + 2 * 3 * model.ffn_hidden_size


def planned_bytes(model: ModelConfig, row_tokens: int, device_type: str, *, recompute: bool = True) -> int:
    """Return the peak of a step on one row: state, and the most that comes on top of it at a time.

    That is a layer in its backward pass, the LM head, or the update of the weights.

    Args:
        model: The model.
        row_tokens: Tokens of the row.
        device_type: ``cuda`` or ``cpu``.
        recompute: Every layer of the torch backend is computed again. Else all layers of Transformer Engine keep what
            they need, and the last one adds the gradients inside its MLP.
    """
    stream = 2 * model.hidden_size * row_tokens
    if recompute:
        kept, backward = stream, row_tokens * layer_bytes_per_token(model, device_type)
    else:
        kept = row_tokens * kept_bytes_per_token(model)
        backward = kept + row_tokens * 2 * (3 * model.ffn_hidden_size + model.hidden_size)
    layer = (model.num_layers - 1) * kept + backward
    size = HeadSize(row_tokens, model.hidden_size, model.vocab_size, CHUNK_TOKENS)
    head = model.num_layers * kept + 2 * stream + head_bytes(size, device_type)
    return state_bytes(model) + max(layer, head, _OPTIMIZER_BYTES * model_size(model).total)


def layers_that_fit(model: ModelConfig, row_tokens: int, free_bytes: int, *, recompute: bool = True) -> int:
    """Return how many layers of the model a step on one row has room for on a GPU; 0 if not even one."""
    layers = 0
    while layers < model.num_layers:
        more = model.model_copy(update={"num_layers": layers + 1})
        if planned_bytes(more, row_tokens, "cuda", recompute=recompute) > free_bytes:
            break
        layers += 1
    return layers
