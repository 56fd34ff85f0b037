"""Job files for clusters, rendered from a configuration. Never imports torch."""
