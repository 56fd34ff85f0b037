"""Recomputation that the configuration leaves to the plan of memory."""

from __future__ import annotations

import logging

import torch
from torch.distributed import Store

from nemo_prolong.config.rules.constraints import resolve_backend
from nemo_prolong.config.schema import KernelBackend, RecomputeConfig, RunConfig
from nemo_prolong.distributed.rank_environment import rank_and_size
from nemo_prolong.distributed.rendezvous import decided_by_rank_zero
from nemo_prolong.engine.platform import current_platform
from nemo_prolong.plan.memory import EVERY_LAYER, choose_recompute

log = logging.getLogger(__name__)


def with_recompute(cfg: RunConfig, store: Store) -> RunConfig:
    """Return the stage with the recomputation of all ranks in place of auto; rank 0 chooses it and says so.

    Args:
        cfg: The stage.
        store: Where the ranks meet.
    """
    if cfg.precision.recompute.recompute_granularity != "auto":
        return cfg
    rank, world_size = rank_and_size()
    chosen = _choice(cfg, world_size) if rank == 0 else RecomputeConfig()
    decided = decided_by_rank_zero(store, "recompute", chosen.model_dump_json())
    assert decided is not None
    recompute = RecomputeConfig.model_validate_json(decided)
    precision = cfg.precision.model_copy(update={"recompute": recompute})
    return cfg.model_copy(update={"precision": precision})


def _choice(cfg: RunConfig, world_size: int) -> RecomputeConfig:
    if resolve_backend(cfg.precision, current_platform()) is KernelBackend.TORCH:
        log.info("computes every layer again in the backward pass: what the torch backend keeps is not planned")
        return EVERY_LAYER
    choice = choose_recompute(cfg, world_size, torch.cuda.get_device_properties(0).total_memory)
    log.log(logging.INFO if choice.fits else logging.WARNING, choice.sentence)
    return choice.recompute
