"""The training loop: rows in, NeMo's trainer, one micro-batch through the model, the optimizer."""

from nemo_prolong.engine.patches.cpu import prepare

prepare()
