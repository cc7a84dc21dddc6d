"""Which settings are better: trials that are trainings like any other, and what is true of them with fresh seeds."""
