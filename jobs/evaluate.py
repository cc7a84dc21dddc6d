"""Score the trained model in bits per byte on held-out text.

python -m jobs.evaluate jobs/presets/demo.yaml [section.key=value ...]
"""

import sys

from jobs.command import run_stage

if __name__ == "__main__":
    sys.exit(run_stage("evaluate", __doc__))
