"""Perplexity by position and key-value recall, for a Megatron checkpoint or a Hugging Face directory alike."""
