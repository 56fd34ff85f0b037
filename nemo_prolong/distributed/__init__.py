"""What ranks tell each other. These are agreements, decisions of rank 0, and the store they meet at."""
