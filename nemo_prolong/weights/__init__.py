"""Names, shapes and readers of Megatron checkpoints and Hugging Face directories. Needs torch, and no NeMo."""
