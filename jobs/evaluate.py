"""Score the trained model in bits per byte on held-out text.

python -m jobs.evaluate jobs/presets/demo.yaml [section.key=value ...]
"""

import sys
from collections.abc import Sequence

from jobs.command import run_stage


def main(argv: Sequence[str] | None = None) -> int:
    return run_stage("evaluate", __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
