"""Run a job on a Ray cluster: check first, submit, follow its log.

    python -m jobs.submit jobs/presets/gpt-53m.yaml storage=s3://bucket/gpt      the whole pipeline
    python -m jobs.submit jobs/presets/gpt-53m.yaml --job prepare storage=…      one stage
    python -m jobs.submit --follow gpt-53m-pipeline-1122-225501                  back to a job's log

The cluster is the one at RAY_API_SERVER_ADDRESS (or RAY_ADDRESS), else the one that `make cluster` started here.
Its token comes from RAY_AUTH_TOKEN_PATH, RAY_AUTH_TOKEN or ~/.ray/auth_token. Keys for storage and MLflow are
the cluster's own: none travels with a job. Ctrl-C leaves the job running.
"""

import argparse
import asyncio
import logging
import os
import re
import shlex
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.command import EXTEND_HELP, Command
from pipeline.presets import find_preset
from pipeline.stages import STAGES

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

    from pipeline.config import Config

ROOT = Path(__file__).resolve().parent.parent
HEAD_SECONDS = 60.0
# How the log of every job begins, before the job itself has said anything.
RAYS_OWN_LINES = re.compile(r"^(\S+ \S+\tINFO job_manager\.py.*|Running entrypoint for job .*)\n", re.MULTILINE)
JOBS = ("pipeline", *STAGES, "search", "serve", "generate", "preflight")


def run(config: "Config", options: argparse.Namespace) -> int:
    address = cluster_address()
    client = connect(address, options.verbose)
    if options.follow:
        return follow(client, options.follow, address)
    if options.preset is None and not options.settings:
        raise ValueError("Say what to run: a preset, such as jobs/presets/demo.yaml; or --follow JOB.")
    if (options.prompt is not None) != (options.job == "generate"):
        raise ValueError("--job generate takes the text to go on with as --prompt TEXT, and no other job does.")
    if "://" not in config.storage:
        raise ValueError(
            f"storage={config.storage} is a folder, which the nodes of a cluster do not share;"
            f" give storage=s3://bucket/prefix."
        )
    preset = [] if options.preset is None else [relative_preset(options.preset)]
    arguments = [*preset, *options.settings]
    if not options.skip_preflight and options.job != "preflight":
        print("preflight: can this cluster do it?", flush=True)
        wait = [] if options.wait is None else [f"--wait={options.wait}"]
        checked = follow(client, submit(client, config, "preflight", [*arguments, *wait]), address)
        if checked != 0:
            print("error: The preflight failed; mend what it names, or give --skip-preflight.", file=sys.stderr)
            return 1
    extra = [*(["--serve"] if options.serve else []), *(["--extend"] if options.extend else [])]
    if options.job == "generate":  # its first word is the prompt, not the preset
        arguments = [options.prompt, *(["--preset", *preset] if preset else []), *options.settings]
    job = submit(client, config, options.job, [*arguments, *extra])
    print(f"submitted: {job}\n{how_to_return(job, address)}", flush=True)
    return 0 if options.detach else follow(client, job, address)


def use_local_cluster(environment: Path) -> None:
    """Take the address and the token's place from `make cluster`'s file, where the shell names no cluster."""
    if os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS") or not environment.is_file():
        return
    for line in environment.read_text().splitlines():
        name, _, value = line.removeprefix("export ").partition("=")
        if name.startswith("RAY_"):
            os.environ[name] = "".join(shlex.split(value))


def use_token() -> None:
    """Show the cluster the token that the shell names or the home folder holds, unless the shell says otherwise."""
    kept = Path.home() / ".ray/auth_token"
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH") or kept.is_file():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def cluster_address() -> str:
    address = os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS")
    if not address:
        raise ValueError(
            "No cluster is named: set RAY_API_SERVER_ADDRESS=http://HEAD:8265, or start one here with `make cluster`."
        )
    if not address.startswith(("http://", "https://")):
        raise ValueError(
            f"Jobs are submitted to the dashboard of the head, over HTTP; {address!r} is not its address."
            f" Set RAY_API_SERVER_ADDRESS=http://HEAD:8265."
        )
    return address


def connect(address: str, verbose: bool = False) -> "JobSubmissionClient":
    """Open the cluster's job interface; raises `ValueError` with what to do where it does not open."""
    import ray.dashboard.modules.job.sdk
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    from pipeline import addresses

    # Ray and these two modules of it set levels of their own when they are imported.
    submitting, asking = ray.dashboard.modules.job.sdk.logger, ray.dashboard.modules.dashboard_sdk.logger
    for logger in (logging.getLogger("ray"), submitting, asking):
        logger.setLevel(logging.INFO if verbose else logging.ERROR)
    addresses.go_direct(address)
    try:
        return JobSubmissionClient(address)
    except AuthenticationError:
        raise ValueError(
            f"The cluster at {address} refused the token; put its token into a file and set RAY_AUTH_MODE=token"
            f" and RAY_AUTH_TOKEN_PATH to that file."
        ) from None
    except (ConnectionError, RuntimeError) as error:
        raise ValueError(
            f"No Ray cluster answers at {address} ({str(error).splitlines()[0]});"
            f" start it, or open a tunnel to its port 8265."
        ) from None


def submit(client: "JobSubmissionClient", config: "Config", job: str, arguments: Sequence[str]) -> str:
    """Send the working tree (less what .gitignore and .rayignore name) and start the job; return its id."""
    from pipeline.tracking import git_commit

    moment = datetime.now(UTC).strftime("%m%d-%H%M%S")
    deadline = time.monotonic() + HEAD_SECONDS
    while True:
        try:
            return client.submit_job(
                entrypoint=shlex.join(["python", "-m", f"jobs.{job}", *arguments]),
                submission_id=f"{config.name}-{job}-{moment}",
                runtime_env={
                    "working_dir": str(ROOT),
                    # .git stays at home, and the runs in MLflow should still name their commit.
                    "env_vars": {
                        "GIT_COMMIT": git_commit(ROOT),
                        "PYTHONUNBUFFERED": "1",
                        # Ray's 3 s are too few for the checkpoint that a training writes when it is told to stop.
                        "RAY_JOB_STOP_WAIT_TIME_S": "30",
                    },
                },
                metadata={"pipeline": config.name, "job": job},
            )
        except RuntimeError as error:
            # A head that has only just started answers before it can run jobs.
            if "No available agent" not in str(error):
                raise
            if time.monotonic() > deadline:
                raise ValueError("The cluster's head runs no jobs; look into its logs, or start it again.") from None
            time.sleep(2)


def follow(client: "JobSubmissionClient", job: str, address: str) -> int:
    """Print the job's log until it ends; returns 0 if it succeeded. Ctrl-C leaves it running."""
    try:
        client.get_job_status(job)
        asyncio.run(_print_log(client, job))
        details = client.get_job_info(job)
    except KeyboardInterrupt:
        print(f"\n{job} goes on running.\n{how_to_return(job, address)}", flush=True)
        return 130
    except OSError:  # what requests and aiohttp raise where nobody listens
        raise ValueError(
            f"The cluster at {address} no longer answers. If only the way to it is closed, open it, and"
            f" `python -m jobs.submit --follow {job}` goes on. If its head has died, so has the job; what it finished"
            f" is kept: start the cluster and submit the same again."
        ) from None
    except RuntimeError as error:
        if "does not exist" in str(error):
            raise ValueError(
                f"There is no job {job!r} at {address}; `ray job list --address {address}` names them."
            ) from None
        raise
    print(f"{job}: {str(details.status).lower()}", flush=True)
    if details.status != "SUCCEEDED" and details.message:
        # Ray repeats the log in its message; it has just been printed.
        print(f"error: {str(details.message).partition(', last available logs')[0]}", file=sys.stderr)
    return 0 if details.status == "SUCCEEDED" else 1


async def _print_log(client: "JobSubmissionClient", job: str) -> None:
    printed = 0  # a new connection tells the log from its beginning
    while True:
        position = 0
        try:
            async for text in client.tail_job_logs(job):
                fresh = text[max(0, printed - position) :]
                position += len(text)
                printed = max(printed, position)
                print(RAYS_OWN_LINES.sub("", fresh), end="", flush=True)
        except (RuntimeError, OSError):
            client.get_job_status(job)  # raises, with the reason, if the job or the cluster is not there
        if client.get_job_status(job).is_terminal():
            return
        await asyncio.sleep(2)


def how_to_return(job: str, address: str) -> str:
    return (
        f"  its log     python -m jobs.submit --follow {job}\n"
        f"  its status  ray job status --address {address} {job}\n"
        f"  to end it   ray job stop --address {address} {job}"
    )


def relative_preset(preset: str) -> str:
    """Name the preset as the cluster will see it: relative to the working tree that is sent."""
    path = find_preset(preset).resolve()
    if not path.is_relative_to(ROOT):
        raise ValueError(f"The preset {preset!r} lies outside of {ROOT}, which is all that is sent; copy it in there.")
    return path.relative_to(ROOT).as_posix()


def main(argv: Sequence[str] | None = None) -> int:
    # Ray reads how to authenticate when it is imported, and a job's own defaults would come first.
    use_local_cluster(ROOT / "artifacts/cluster/environment")
    use_token()
    command = Command(__doc__, may_be_bare=True, reads_start=False)
    add = command.parser.add_argument
    add("--job", choices=JOBS, default="pipeline", help="which job to run [%(default)s]")
    add("--serve", action="store_true", help="with the whole pipeline: serve the champion afterwards")
    add("--extend", action="store_true", help=EXTEND_HELP)
    add("--prompt", metavar="TEXT", help="with --job generate: the text to go on with")
    add("--follow", metavar="JOB", help="print the log of a job that runs or has ended")
    add("--detach", action="store_true", help="do not follow the log")
    add("--skip-preflight", action="store_true", help="do not check the cluster first")
    add("--wait", type=float, help="seconds the preflight waits for an autoscaler's nodes")
    return command.main(run, argv)


if __name__ == "__main__":
    sys.exit(main())
