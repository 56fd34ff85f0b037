"""What lies on disk beside the weights. Each format has one typed model that writes and reads it. Needs no torch."""
