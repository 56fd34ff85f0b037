"""What is measured of every step, what it is called, and where it is sent. Needs torch, and no NeMo."""
