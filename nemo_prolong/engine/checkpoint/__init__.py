"""Checkpoints of a run through Megatron: planned by it, written whole or not at all.

A checkpoint is ``checkpoints/step_XXXXXXXX/`` with ``weights/`` (Megatron's distributed format), ``model.json`` (the
model in plain JSON, all that evaluation and export need) and ``manifest.json`` (the SHA-256 of every other file).
"""
