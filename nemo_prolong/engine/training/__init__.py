"""The training loop: rows in, NeMo's trainer, one micro-batch through the model, the optimizer."""
