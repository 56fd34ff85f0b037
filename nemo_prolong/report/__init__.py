"""What people read: the training report and the data card as offline pages, and views for a terminal. Never torch."""
