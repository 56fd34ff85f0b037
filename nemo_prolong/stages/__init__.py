"""What a stage is: its manifest, what it takes from its parent, and the run itself."""
