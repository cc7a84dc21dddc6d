"""Which stages there are, in the order they run, and what each reads.

    tokenizer ─▶ prepare ─▶ train ─▶ evaluate ─▶ register

Names alone, so that jobs and tests can read them without loading a stage: the stage `train` is the module
`pipeline.train`, its settings are the section `train`, and its job is `jobs.train`.
"""

# The stage -> its inputs: stages above it, and `source`, which is the text itself.
STAGES: dict[str, tuple[str, ...]] = {
    "tokenizer": ("source",),
    "prepare": ("source", "tokenizer"),
    "train": ("tokenizer", "prepare"),
    "evaluate": ("tokenizer", "prepare", "train"),
    "register": ("tokenizer", "prepare", "train", "evaluate"),
}

# Which of them also read the weights that a training starts from, where there is such a `start`.
READ_START = ("tokenizer", "train")
