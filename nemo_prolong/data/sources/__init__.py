"""Readers of raw corpora: files of many formats to documents, in an order that no worker count changes."""
