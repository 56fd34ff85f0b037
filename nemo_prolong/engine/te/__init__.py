"""The Transformer Engine backend: layers, attention, and the data step and settings of FP8.

Nothing here imports Transformer Engine until a model is built with it, so that every module loads without it.
"""
