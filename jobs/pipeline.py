"""Run the whole pipeline, from the tokenizer to the registry, and on request serve.

    python -m jobs.pipeline jobs/presets/demo.yaml [section.key=value ...] [--from STAGE] [--extend] [--serve]

Stages that are done with these settings say so and are skipped.
"""

import argparse
import sys
from collections.abc import Sequence

from jobs.command import EXTEND_HELP, Command, extend, name_command, ray_session, where_mlflow_shows
from pipeline.config import Config
from pipeline.stages import STAGES


def run(config: Config, options: argparse.Namespace) -> None:
    if options.extend:
        config = extend(config)
    with ray_session(options.verbose):
        from pipeline import orchestrator

        manifests = orchestrator.run(config, first=options.first)
        print(f"\n{orchestrator.describe_results(manifests)}")
        print(f"MLflow run     {where_mlflow_shows(config, manifests['train'].counts['mlflow_run_id'])}")
        if not options.serve:
            print(f"next           {name_command('serve', options)}", flush=True)
        if options.serve:
            from jobs.serve import serve_until_stopped

            serve_until_stopped(config)


def main(argv: Sequence[str] | None = None) -> int:
    command = Command(__doc__)
    command.parser.add_argument(
        "--from", dest="first", choices=STAGES, metavar="STAGE", help=f"re-run from this stage: {', '.join(STAGES)}"
    )
    command.parser.add_argument("--extend", action="store_true", help=EXTEND_HELP)
    command.parser.add_argument("--serve", action="store_true", help="serve the champion afterwards, until Ctrl-C")
    return command.main(run, argv)


if __name__ == "__main__":
    sys.exit(main())
