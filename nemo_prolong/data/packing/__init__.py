"""Documents to rows of exactly ``seq_length`` tokens: which piece of which document lies where, from lengths alone."""
