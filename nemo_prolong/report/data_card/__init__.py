"""The card of a data directory: HTML and Markdown."""
