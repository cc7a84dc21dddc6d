"""Train the tokenizer on the corpus, or fetch the named one.

python -m jobs.tokenizer jobs/presets/demo.yaml [section.key=value ...]
"""

import sys
from collections.abc import Sequence

from jobs.command import run_stage


def main(argv: Sequence[str] | None = None) -> int:
    return run_stage("tokenizer", __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
