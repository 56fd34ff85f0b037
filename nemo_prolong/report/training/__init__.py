"""Run directories to one offline HTML page and ``summary.json``."""
