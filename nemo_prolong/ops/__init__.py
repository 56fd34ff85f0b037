"""Plain torch operations of long-context training. They know nothing of NeMo, Megatron or files."""
