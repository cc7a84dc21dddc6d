"""Make the trained model a version in MLflow's registry, and its champion if it is the better one.

    python -m jobs.register jobs/presets/demo.yaml [section.key=value ...] [--force]

What `register.gate` refuses has the alias `challenger`. With `--force` it becomes the champion all the same, and says
so in its tags.
"""

import sys
from collections.abc import Sequence

from jobs.command import run_stage

FORCE = ("--force", "register.force=true", "take the alias whatever the gate says, and record it")


def main(argv: Sequence[str] | None = None) -> int:
    return run_stage("register", __doc__, argv, flags=[FORCE])


if __name__ == "__main__":
    sys.exit(main())
