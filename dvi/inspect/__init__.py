"""What is there, what it takes, and whether it changes a token."""
