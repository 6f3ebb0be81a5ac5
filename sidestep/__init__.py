"""Side-Step trains adapters for ACE-Step 1.5, the open music model."""
