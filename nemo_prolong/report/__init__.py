"""Run directories as one offline HTML file and ``summary.json``. Needs no torch and no plotting library."""
