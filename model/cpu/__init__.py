"""What makes a CPU fast: without this folder everything works, more slowly."""
