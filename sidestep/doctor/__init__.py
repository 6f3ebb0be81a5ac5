"""What is there to train with, and what ails."""
