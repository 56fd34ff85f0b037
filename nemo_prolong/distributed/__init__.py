"""Which rank a process is, how ranks are started, and what they tell each other: agreements, decisions of rank 0."""
