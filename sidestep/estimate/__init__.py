"""What to train, and how much of it, measured on the songs at hand."""
