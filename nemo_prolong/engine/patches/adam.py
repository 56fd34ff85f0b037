"""The Adam that Megatron finds where neither Transformer Engine nor apex brings theirs."""

from __future__ import annotations

import torch

from nemo_prolong.engine.patches.patch import MEGATRON, Patch, replace


def _install_group_step_adam() -> None:
    """Put our Adam where Megatron looks for apex's FusedAdam, unless it found a fused one and a GPU to run it on."""
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    from nemo_prolong.ops.adam import GroupStepAdam

    if torch.cuda.is_available() and not optimizer.USING_PYTORCH_OPTIMIZER:
        return
    replace(optimizer, "Adam", GroupStepAdam)()
    replace(optimizer, "USING_PYTORCH_OPTIMIZER", False)()
    replace(distrib_optimizer, "Adam", GroupStepAdam)()
    replace(distrib_optimizer, "HAVE_APEX_OR_TE", True)()
    replace(distrib_optimizer, "USING_APEX_OPTIMIZER", True)()


PATCH = Patch(
    "group_step_adam",
    "torch's AdamW keeps `step` per parameter, and Megatron cannot read such a checkpoint back",
    _install_group_step_adam,
    MEGATRON,
    after_import=True,
    with_gpu=True,
)
