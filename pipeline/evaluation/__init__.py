"""How good a model is: tasks, how each is scored, and whether one model is better than another."""
