"""Make the trained model a version in MLflow's registry.

python -m jobs.register jobs/presets/demo.yaml [section.key=value ...]
"""

import sys

from jobs.command import run_stage

if __name__ == "__main__":
    sys.exit(run_stage("register", __doc__))
