"""What lies on disk beside the weights: one typed model a format, written and read through it. Needs no torch."""
