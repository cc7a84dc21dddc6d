"""Turn the text into Parquet token shards.

python -m jobs.prepare jobs/presets/demo.yaml [section.key=value ...]
"""

import sys
from collections.abc import Sequence

from jobs.command import run_stage


def main(argv: Sequence[str] | None = None) -> int:
    return run_stage("prepare", __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
