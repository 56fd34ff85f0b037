"""What several tests share, and the programs they start: `from tests.support.tiny import ...`."""
