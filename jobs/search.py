"""Find better settings, and what is true of them: trials, then the best two and the preset again with fresh seeds.

    python -m jobs.search my-preset.yaml [section.key=value ...]

The preset's section `search` says what is tried. Each trial is a training like any other, so one that is done is never
run again; after a stop, the same command goes on. What is recommended lies in best.yaml, with its evidence.
"""

import argparse
import sys
from collections.abc import Sequence

from jobs.command import Command, ray_session
from pipeline.config import Config


def run(config: Config, options: argparse.Namespace) -> None:
    from pipeline.search import study

    study.check(config)  # before Ray starts
    with ray_session(options.verbose):
        study.run(config)


def main(argv: Sequence[str] | None = None) -> int:
    return Command(__doc__).main(run, argv)


if __name__ == "__main__":
    sys.exit(main())
