"""Turn the text into Parquet token shards.

python -m jobs.prepare jobs/presets/demo.yaml [section.key=value ...]
"""

import sys

from jobs.command import run_stage

if __name__ == "__main__":
    sys.exit(run_stage("prepare", __doc__))
