"""What a stage costs: parameters and FLOPs from the configuration alone. Never imports torch."""
