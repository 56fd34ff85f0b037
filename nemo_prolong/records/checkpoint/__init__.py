"""The files of a checkpoint that are not weights, its verification, and which checkpoints are kept."""
