"""The training report: run directories to one offline HTML page and ``summary.json``."""
