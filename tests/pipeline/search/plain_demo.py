"""The demo's preset with figures that stay as they are, whatever its own become, and without its search."""

STEPS = ["train.steps=170", "train.evaluate_every_steps=50", "optimizer.muon_learning_rate=0.02"]
NO_SEARCH = ["search.trials=0", "search.trial_tokens=0", "search.budget_minutes=0", "search.seeds=3"]
PLAIN = [*STEPS, "search.space=[]", *NO_SEARCH]
