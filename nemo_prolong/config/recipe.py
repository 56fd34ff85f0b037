"""Numbers of the recipe that more than one room compares with."""

MAX_EPOCHS = 2.7
"""Most often that ProLong's own stages walk through one of their directories: 0.63B tokens of textbooks are drawn from
about 0.23B (sizes of the published data sets; the paper does not state it)."""
