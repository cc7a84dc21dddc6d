"""Faster ways on a CPU: without this folder everything works, more slowly."""
