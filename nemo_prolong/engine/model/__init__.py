"""The model: NeMo's Llama with our layers, our core attention and the exact loss."""
