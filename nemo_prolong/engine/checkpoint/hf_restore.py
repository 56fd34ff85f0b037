"""Start a stage from a Hugging Face directory: every rank reads its own part of every tensor.

There is no converted copy on disk. What a rank of any TP and PP layout holds of a tensor is a box of rows and columns,
and safetensors gives boxes. So no rank has to write a copy that the others wait for and that a kill may damage. Until
the first checkpoint of the run, a restart reads the directory again.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories, is_main_replica
from nemo.lightning.pytorch.strategies.utils import RestoreConfig

from nemo_prolong.config.schema import ModelConfig
from nemo_prolong.engine.checkpoint.non_finite import refuse_non_finite
from nemo_prolong.weights.hf_directory import HuggingFaceDirectory
from nemo_prolong.weights.hf_reader import HuggingFaceReader


@dataclass
class HuggingFaceRestore(RestoreConfig):
    """What NeMo's strategy is given to restore from: a Hugging Face directory instead of a checkpoint.

    Attributes:
        model: The model; ``stages.preflight`` has compared it with the directory.
    """

    model: ModelConfig | None = None

    def load(self, sharded_state_dict: Mapping[str, Any]) -> None:
        """Fill the parameters of this rank's part of the model; see ``load_weights``."""
        assert self.model is not None
        load_weights(sharded_state_dict, Path(self.path), self.model)


@torch.no_grad()
def load_weights(sharded_state_dict: Mapping[str, Any], directory: Path, model: ModelConfig) -> None:
    """Fill the tensors of a sharded state dict in place with the weights of a Hugging Face directory.

    Args:
        sharded_state_dict: Megatron's description of what this rank holds, over the parameters themselves.
        directory: A Hugging Face directory of the same model.
        model: The model.

    Raises:
        CheckpointError: On every rank, if the directory is no Llama in safetensors, or a weight is NaN or infinite.
    """
    reader = HuggingFaceReader(HuggingFaceDirectory(directory), model)
    sharded = dict(sharded_state_dict)
    # Gate and up are one parameter that is two tensors: the factory gives views of both halves.
    apply_factories(sharded)
    non_finite: Counter[str] = Counter()
    for tensor in nested_values(sharded):
        if isinstance(tensor, ShardedTensor):
            found = _fill(tensor, reader)
            # Of what several ranks hold, one counts.
            non_finite.update(found if is_main_replica(tensor.replica_id) else {})
    remedy = "Download or save the model again. Weights in F16 overflow where BF16 and F32 do not."
    refuse_non_finite(non_finite, f"parent=hf:{directory}", remedy)


def _fill(tensor: ShardedTensor, reader: HuggingFaceReader) -> dict[str, int]:
    name = re.sub(r"^(module\.)+", "", tensor.key)
    assert tensor.data is not None and tensor.prepend_axis_num in (0, 1), tensor
    layer = tensor.global_offset[0] if tensor.prepend_axis_num else None
    first_row, *first_column = tensor.global_offset[tensor.prepend_axis_num :]
    return reader.fill(tensor.data, name, layer, first_row, *first_column)
