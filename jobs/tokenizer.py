"""Train the tokenizer on the corpus, or fetch the named one.

python -m jobs.tokenizer jobs/presets/demo.yaml [section.key=value ...]
"""

import sys

from jobs.command import run_stage

if __name__ == "__main__":
    sys.exit(run_stage("tokenizer", __doc__))
