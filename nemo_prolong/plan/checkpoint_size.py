"""What the checkpoints of a stage take on disk and, while they are written, in host memory."""

from __future__ import annotations

from nemo_prolong.config.schema import RunConfig
from nemo_prolong.plan.model_size import model_size

_WEIGHT_BYTES = {"fp32": 4, "bf16": 2, "fp8": 2, "fp8_attention": 2}
"""Bytes of a weight by ``precision.compute``. FP8 is a format of matrix products; weights stay in bf16."""

_ADAM_BYTES = 12
"""Bytes of a parameter's optimizer state: the fp32 weight and Adam's two moments in fp32."""


def checkpoint_bytes(cfg: RunConfig) -> int:
    """Return the bytes of one checkpoint, weights and optimizer state; 14 a parameter in bf16.

    Padding of the vocabulary and what surrounds the tensors are left out. They are less than 1% of a full-size model.
    """
    return model_size(cfg.model).total * (_WEIGHT_BYTES[cfg.precision.compute] + _ADAM_BYTES)


def kept_checkpoints(cfg: RunConfig) -> int:
    """Return how many checkpoints of the stage lie on disk at once at most, the one being written included."""
    steps, every = cfg.train.train_iters, cfg.checkpoint.keep_every_steps
    for_ever = steps // every if every else 0
    saves = -(-steps // cfg.checkpoint.save_interval_steps)
    if cfg.checkpoint.save_interval_minutes is not None:
        # Saves by time are as many as they are.
        return cfg.checkpoint.keep_last + for_ever + 1
    return min(cfg.checkpoint.keep_last + for_ever + 1, saves)
