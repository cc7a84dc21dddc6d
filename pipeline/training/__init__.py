"""What one worker's training loop is made of, and what it reports."""
