"""Train the GPT on the shards; run it again to go on after a stop.

python -m jobs.train jobs/presets/demo.yaml [section.key=value ...]
"""

import sys
from collections.abc import Sequence

from jobs.command import run_stage


def main(argv: Sequence[str] | None = None) -> int:
    return run_stage("train", __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
