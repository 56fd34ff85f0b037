"""Every change of foreign code. ``prepare`` applies them once, before the libraries are used.

Nothing outside of this package changes foreign code. ``tests/house/test_patches.py`` checks that. Each ``Patch`` says
why it is there and for which versions. ``tests/engine/test_patches.py`` leaves each one out in turn and expects
something to break. So a patch that is no longer needed fails that test.
"""

from __future__ import annotations

import gc
import logging
import os

import torch

from nemo_prolong.engine.patches import (
    adam,
    cuda_on_cpu,
    fused_gradients,
    model_class,
    optimizer_step,
    process_groups,
    results_queue,
    rotary,
)
from nemo_prolong.engine.patches.patch import Patch, warnings_of_versions

log = logging.getLogger(__name__)

PATCHES: tuple[Patch, ...] = (
    *cuda_on_cpu.PATCHES,
    adam.PATCH,
    model_class.PATCH,
    fused_gradients.PATCH,
    results_queue.PATCH,
    process_groups.PATCH,
    optimizer_step.PATCH,
    rotary.PATCH,
)
"""Every patch, in the order of application."""

_prepared = False


def prepare(without: str | None = None) -> None:
    """Apply the patches that this machine needs; a second call does nothing.

    Imports Megatron and NeMo, which takes seconds, and keeps what they leave out of garbage collections. Warns where an
    installed library has another version than its patches were written for.

    Args:
        without: Name of a patch to leave out; only the tests use it.
    """
    global _prepared
    if _prepared:
        return
    has_gpu = torch.cuda.is_available()
    if not has_gpu and torch.version.cuda is not None:
        # Importing Megatron asks torch for the flags to compile kernels with. A CUDA build of torch derives them from
        # the GPUs it finds, with an IndexError where there are none. Nothing is compiled here: any value will do.
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "9.0")
    selected = [patch for patch in PATCHES if patch.name != without and (patch.with_gpu or not has_gpu)]
    for warning in warnings_of_versions(selected):
        log.warning(warning)
    applied = [patch for patch in selected if not patch.per_object]
    for patch in sorted(applied, key=lambda patch: patch.after_import):
        patch.apply()
    # The libraries leave 750,000 objects. Looking through them takes each full collection 0.6 s in the midst of a step,
    # and the end of the process 3.5 s.
    gc.freeze()
    _prepared = True
