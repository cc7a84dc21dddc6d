"""Make the trained model a version in MLflow's registry, and its champion if it is the better one.

    python -m jobs.register jobs/presets/demo.yaml [section.key=value ...] [--force]

What `register.gate` refuses has the alias `challenger`. With `--force` it becomes the champion all the same, and says
so in its tags.
"""

import sys

from jobs.command import run_stage

FORCE = ("--force", "register.force=true", "take the alias whatever the gate says, and record it")

if __name__ == "__main__":
    sys.exit(run_stage("register", __doc__, flags=[FORCE]))
