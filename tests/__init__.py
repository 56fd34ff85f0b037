"""Tests, importable so that they and the programs they start share `tests.support`."""
