"""What a stage costs in parameters and FLOPs, from the configuration alone. Never imports torch."""
