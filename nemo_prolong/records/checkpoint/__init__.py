"""The files of a checkpoint that are not weights: its manifest, its verification, which ones are kept."""
