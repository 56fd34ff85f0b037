"""Text to tokenized documents to packed rows to one global order to batches."""
