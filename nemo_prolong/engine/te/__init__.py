"""The Transformer Engine backend: layers, attention, FP8, and the process groups that NeMo does not form.

Nothing here imports Transformer Engine until a model is built with it, so that every module loads without it.
"""
