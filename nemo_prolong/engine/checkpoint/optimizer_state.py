"""The state of the optimizer on its way into a checkpoint and out of one.

A save takes Megatron's sharding in model space: each rank writes the run of elements that it keeps of each parameter,
under the parameter's own name. Nothing is gathered, and TP, PP, CP and DP may all be others when it is read. Megatron's
other sharding without a gather (``dp_reshardable``) writes the buckets of the running layout, which no other TP or PP
can read. ``fully_reshardable`` gathers the whole state of a DP group on each of its ranks, or on one.

Megatron's own reader of this format is not used. At another TP it would have each rank allocate the state of all the
DP ranks, and those of the saved chunks beside it. ``weights.optimizer_reader`` reads a rank's own elements.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

from nemo_prolong.weights.optimizer_reader import MatrixRun, OptimizerStateReader

SHARDING = "fully_sharded_model_space"
"""Megatron's name of the sharding."""


def initialize_moments(optimizer: Any) -> None:
    """Give every parameter that has none its moments, which are zero before the first step.

    Adam makes them in its first step. Steps that the guard skips leave it without, and Megatron can neither save nor
    load a state that lacks them. The step counter stays absent, which all of the Adams read as 0.

    Args:
        optimizer: A Megatron optimizer. On a rank without parameters it has no optimizer inside.
    """
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if part.optimizer is not None:
            part.init_state_fn(part.optimizer, part.config)


def without_shards(state: dict[str, Any]) -> dict[str, Any]:
    """Return a sharded state of the optimizer, or a loaded one, without what is sharded over DP."""
    return {key: value for key, value in state.items() if not key.startswith("param_state")}


def fill_shards(state: Mapping[str, Any], checkpoint: Path) -> None:
    """Fill what an optimizer has on this rank from a checkpoint of any layout.

    Args:
        state: Megatron's description of the optimizer for a save, over the tensors themselves.
        checkpoint: A directory ``checkpoints/step_XXXXXXXX``.

    Raises:
        CheckpointError: If it does not hold the whole state, or is damaged.
    """
    reader = OptimizerStateReader(checkpoint)
    sharded = dict(state["param_state"])
    # Gate and up are one parameter that is two tensors: the factory gives views of the elements of each.
    apply_factories(sharded)
    for tensor in nested_values(sharded):
        if isinstance(tensor, ShardedTensor):
            _fill(tensor, reader)


def _fill(tensor: ShardedTensor, reader: OptimizerStateReader) -> None:
    assert tensor.data is not None and tensor.flattened_range is not None, tensor
    layers = tensor.prepend_axis_num
    assert layers in (0, 1), tensor
    elements = tensor.flattened_range
    run = MatrixRun.of(tensor.global_offset[layers:], tensor.local_shape, elements.start, elements.stop)
    reader.fill(tensor.key, run, tensor.data, tensor.global_offset[0] if layers else None)
