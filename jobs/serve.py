"""Serve the registry's champion over HTTP, OpenAI's API and a page to talk to it, until Ctrl-C.

    python -m jobs.serve jobs/presets/demo.yaml [--version 3] [section.key=value ...]

On a cluster: `serve deploy` of a file made by `serve build jobs.serve:app -o serve.yaml`, with
`args: {preset: jobs/presets/demo.yaml, serve.replicas: 2}` in it.
"""

import argparse
import logging
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from jobs.command import Command, ray_session, set_environment

if TYPE_CHECKING:
    from ray import serve

    from pipeline.config import Config


def app(arguments: dict[str, Any]) -> "serve.Application":
    """What `serve run`, `serve build` and `serve deploy` call; the arguments are a preset and settings over it."""
    set_environment()
    from pipeline.config import load_config
    from pipeline.serve import describe_app, settings_of

    return describe_app(load_config(arguments.get("preset"), settings_of(arguments)))


@contextmanager
def serving(config: "Config") -> Iterator[str]:
    """Serve inside the `with`, in the Ray session that is already there; gives the address."""
    from pipeline.serve import deploy, take_down

    # Importing Serve gives its logger a level of its own; --verbose decides for all of Ray's.
    logging.getLogger("ray.serve").setLevel(logging.getLogger("ray").level)
    address = deploy(config)
    try:
        yield address
    finally:
        take_down(config)


def serve_until_stopped(config: "Config") -> None:
    """Serve until Ctrl-C or SIGTERM; what has begun to be answered is finished."""
    from pipeline.access import read_keys
    from pipeline.serve import describe_access, model_name

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with serving(config) as address:
        name = model_name(config)
        print(
            f"\nserving       {', '.join(f'{name}@{selector}' for selector in config.serve.versions)}\n"
            f"playground    {address}/\n"
            f"API           {address}/v1/completions   (documentation: {address}/docs)\n"
            f"access        {describe_access(config.serve, read_keys())}\n"
            f"Ctrl-C ends it.",
            flush=True,
        )
        try:
            while True:
                time.sleep(3600)
        except KeyboardInterrupt:
            print("\nFinishing what is being answered …", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    def run(config: "Config", options: argparse.Namespace) -> None:
        if options.version:
            config = replace(config, serve=replace(config.serve, versions=options.version))
        with ray_session(options.verbose):
            serve_until_stopped(config)

    command = Command(__doc__)
    command.parser.add_argument(
        "--version", action="append", help="a version number or an alias, instead of the champion; may be repeated"
    )
    return command.main(run, argv)


if __name__ == "__main__":
    sys.exit(main())
