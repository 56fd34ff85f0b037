"""What ranks tell each other: agreements, decisions of rank 0, the store they meet at."""
