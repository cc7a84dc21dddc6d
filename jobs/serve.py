"""Serve the registry's champion over HTTP, OpenAI's API and a page to talk to it, until Ctrl-C.

    python -m jobs.serve jobs/presets/demo.yaml [--version 3] [section.key=value ...]

On a cluster, with Ray's own commands:

    serve build jobs.serve:app -o serve.yaml      the preset and settings come from SERVE_PRESET and SERVE_SETTINGS,
    serve deploy serve.yaml                       here and in the file's runtime_env.env_vars

or with a file of one's own, whose `import_path: jobs.serve:build` takes `args: {preset: ..., serve.replicas: 2}`.
"""

import argparse
import logging
import os
import shlex
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


def build(arguments: dict[str, Any]) -> "serve.Application":
    """Describe the application that a Serve config file asks for; its `args` are a preset and settings over it."""
    set_environment()
    from pipeline.serve import settings_of

    return describe(arguments.get("preset"), settings_of(arguments))


def describe(preset: str | None, settings: list[str]) -> "serve.Application":
    """Describe the application of a preset and settings over it."""
    set_environment()
    from pipeline.config import load_config
    from pipeline.serve import describe_app

    return describe_app(load_config(preset, settings))


def __getattr__(name: str) -> Any:
    """`app`, made when somebody looks at it: `serve build` wants an application, and importing does nothing."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return describe(os.environ.get("SERVE_PRESET") or None, shlex.split(os.environ.get("SERVE_SETTINGS", "")))


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
    from pipeline.serve import describe_access
    from pipeline.serving.access import read_keys

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with serving(config) as address:
        name = config.registered_name
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

    command = Command(__doc__, reads_start=False)
    command.parser.add_argument(
        "--version", action="append", help="a version number or an alias, instead of the champion; may be repeated"
    )
    return command.main(run, argv)


if __name__ == "__main__":
    sys.exit(main())
