"""What answers HTTP, and what holds a model in service."""
