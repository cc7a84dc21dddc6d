"""Train the GPT on the shards; run it again to go on after a stop.

python -m jobs.train jobs/presets/demo.yaml [section.key=value ...]
"""

import sys

from jobs.command import run_stage

if __name__ == "__main__":
    sys.exit(run_stage("train", __doc__))
