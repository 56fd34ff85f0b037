"""What a stage is. This has its manifest, what it takes from its parent, and the run itself."""
