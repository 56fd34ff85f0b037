"""Plain torch operations of long-context training; knows nothing of NeMo, Megatron or files."""
