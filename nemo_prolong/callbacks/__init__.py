"""What happens around the steps of a run, whichever loop makes them: guard, metrics, saves, stop, watchdog."""
