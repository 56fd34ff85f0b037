"""What happens around the steps of a run, whichever loop makes them. They are guard, metrics, saves, stop, watchdog."""
