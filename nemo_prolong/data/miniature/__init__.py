"""The text of the miniature recipe, from the Python installation at hand: code, reference, documentation, questions."""
