"""Views for a terminal: a run while it trains, a chain of runs, row sets and their rows."""
