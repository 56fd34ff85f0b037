"""What a stage does about faults while it trains: steps that would harm it, signals to stop, ranks that hang."""
