"""Check a cluster before paying for it: can it run this preset? Exits 1 if anything is missing.

    python -m jobs.preflight jobs/presets/gpt-53m.yaml storage=s3://bucket/gpt [--wait 600]

It joins the cluster at RAY_ADDRESS; `make submit` runs it there first.
"""

import argparse
import sys
from collections.abc import Sequence

from jobs.command import Command, ray_session
from pipeline.config import Config


def run(config: Config, options: argparse.Namespace) -> int:
    with ray_session(options.verbose):
        from pipeline import preflight

        checks = preflight.run(config, wait_seconds=options.wait)
    failed = sum(not check.ok for check in checks)
    print(f"{failed} of {len(checks)} checks failed." if failed else f"All {len(checks)} checks are ok.", flush=True)
    return 1 if failed else 0


def main(argv: Sequence[str] | None = None) -> int:
    command = Command(__doc__)
    command.parser.add_argument(
        "--wait", type=float, default=30.0, help="seconds that an autoscaler's nodes may take to come [%(default)g]"
    )
    return command.main(run, argv)


if __name__ == "__main__":
    sys.exit(main())
