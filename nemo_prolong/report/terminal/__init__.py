"""Views of runs and rows for a terminal."""
