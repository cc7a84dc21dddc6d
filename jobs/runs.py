"""List the trainings that MLflow knows, or say where the page of one is.

    python -m jobs.runs [--name demo] [--limit 20] [--json] [storage=…]
    python -m jobs.runs RUN [--open]                a run by its name or the beginning of its id

MLflow is the server at MLFLOW_TRACKING_URI, else the file beside the artifacts.
"""

import argparse
import sys
import webbrowser
from collections.abc import Sequence
from dataclasses import asdict

from jobs.command import make_parser, print_json, run_plainly, set_environment, where_mlflow_shows


def show(options: argparse.Namespace) -> None:
    """Print the table, or one run and its page."""
    import mlflow

    from pipeline import tracking
    from pipeline.config import load_config
    from pipeline.records.runs import describe_rows, find_run, list_runs

    words = [options.run, *options.settings] if options.run is not None and "=" in options.run else options.settings
    config = load_config(None, words)
    rows = list_runs(config, options.name, options.limit)
    if options.run is None or "=" in options.run:
        if options.json:
            print_json([asdict(row) for row in rows])
        else:
            print(describe_rows(rows))
        return
    row = find_run(rows, options.run)
    if options.json:
        print_json(asdict(row))
        return
    mlflow.set_tracking_uri(tracking.address(config))
    page = where_mlflow_shows(config, row.run_id)
    print(f"{describe_rows([row])}\n\nMLflow run     {page}")
    if options.open:
        if "\n" in page:
            raise ValueError("No server shows this store yet: start the one above, and open the page then.")
        webbrowser.open(page)


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    parser.add_argument("run", nargs="?", metavar="RUN", help="the name of a run, or the beginning of its id")
    parser.add_argument("settings", nargs="*", metavar="storage=…", help="the storage root [artifacts]")
    parser.add_argument("--name", default="", help="one pipeline's only")
    parser.add_argument("--limit", type=int, default=50, help="of the newest runs [%(default)s]")
    parser.add_argument("--open", action="store_true", help="show its page in a browser")
    parser.add_argument("--json", action="store_true", help="print JSON, for another program")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(argv)
    set_environment()
    return run_plainly(lambda: show(options))


if __name__ == "__main__":
    sys.exit(main())
