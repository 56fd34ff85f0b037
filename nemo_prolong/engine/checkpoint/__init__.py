"""Checkpoints of a run: written whole or not at all, verified before they are opened.

A checkpoint is ``checkpoints/step_XXXXXXXX/`` with ``weights/`` (Megatron's distributed format), ``model.json`` (the
model in plain JSON, all that evaluation and export need) and ``manifest.json`` (the SHA-256 of every other file).
"""

from typing import Any

from nemo_prolong.engine.checkpoint.description import ModelDescription

__all__ = ["CheckpointWriter", "ModelDescription"]


def __getattr__(name: str) -> Any:
    """Import the writer when it is asked for: it brings NeMo along, and readers of checkpoints need none of it."""
    if name == "CheckpointWriter":
        from nemo_prolong.engine.checkpoint.writer import CheckpointWriter

        return CheckpointWriter
    raise AttributeError(name)
