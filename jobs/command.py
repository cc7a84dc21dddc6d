"""What every job does around its one call: the environment, the arguments, Ray, and errors in one sentence."""

import argparse
import io
import json
import logging
import math
import os
import select
import shlex
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs import completion, log_lines
from model.cores import count_cores
from pipeline.stages import STAGES

if TYPE_CHECKING:
    from pipeline.config import Config

# What Ray and MLflow read when they are imported. A value that the user has set stays.
ENVIRONMENT = {
    # Unset, a local ray.init() leaves a token in the home folder that a later `ray start` trips over.
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "300",  # of seconds; a busy machine takes more than the 60 that Ray gives it
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # else every print of a training worker appears twice
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "15",  # a wrong guess of the elastic policy costs this long
    "RAY_DATA_METADATA_PREFETCH_ON_THREAD": "0",  # for tasks that give back much; with it a worker waits 0.05 s longer
    "RAY_AIR_NEW_OUTPUT": "0",  # else Tune tells of itself in tables; search/tuning.py says a line for each result
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Serve's proxies speak OpenAI's error shape too: see pipeline/serving/errors.py.
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "pipeline.serving.errors.proxy_middlewares",
    # Seconds, three times over; with Serve's own 5 a busy machine's proxy was killed again and again before it ran.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "30",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # the end of a job names the page once
    "AWS_EC2_METADATA_DISABLED": "true",
}


class Command:
    """The command line of one job: a preset, `section.key=value` settings, and the job's own options.

    command = Command(__doc__)
    command.parser.add_argument("--from", dest="first")
    command.add_flag("--force", "register.force=true", "what it means")
    sys.exit(command.main(lambda config, options: ...))
    """

    def __init__(
        self,
        description: str | None,
        *,
        may_be_bare: bool = False,
        reads_start: bool = True,
        only_calculates: bool = False,
    ) -> None:
        """`may_be_bare`: the job means something without a preset and without settings.

        `reads_start`: it must know what `start.model` says of the model, and refuse settings that contradict.
        `only_calculates`: where a start cannot be read, the preset's own settings of the model will do.
        """
        self.may_be_bare = may_be_bare
        self.reads_start = reads_start
        self.only_calculates = only_calculates
        self.parser = make_parser(description)
        self.parser.add_argument("preset", nargs="?", help="a preset's name, such as demo, or a YAML file")
        self.parser.add_argument("settings", nargs="*", metavar="section.key=value", help="settings over the preset")
        self.parser.add_argument("--verbose", action="store_true", help="show Ray's own logs, and tracebacks")
        self.parser.add_argument(
            "--log-format",
            choices=log_lines.FORMATS,
            default="text",
            help="json: an object a line, for a cluster's logs",
        )

    def add_flag(self, flag: str, setting: str, meaning: str) -> None:
        """Let a flag stand for a setting."""
        self.parser.add_argument(
            flag, dest="flags", action="append_const", const=setting, help=f"{meaning}; short for {setting}"
        )

    def main(self, run: Callable[["Config", argparse.Namespace], int | None], argv: Sequence[str] | None = None) -> int:
        """Parse, load the config, call `run`; returns the exit status: 2 for what the user can mend."""
        set_environment()
        print_what_the_terminal_can()
        from pipeline.config import build_config, describe_settings, read_settings

        self.parser.epilog = "settings, with their defaults:\n" + "\n".join(
            f"  {key:<36} {meaning} [{json.dumps(default)}]" for key, default, meaning in describe_settings()
        )
        options, unknown = self.parser.parse_known_args(argv)
        if options.log_format == "json":
            os.environ.setdefault("RAY_SERVE_LOG_ENCODING", "JSON")
            log_lines.write_json()
        stray = [word for word in unknown if word.startswith("-")]
        if stray:
            self.parser.error(f"there is no option {stray[0]}")
        words = [*options.settings, *unknown, *(getattr(options, "flags", None) or [])]
        if options.preset is not None and "=" in options.preset:
            words.insert(0, options.preset)
            options.preset = None
        options.settings = words
        options.words = [*([options.preset] if options.preset is not None else []), *words]
        if options.preset is None and not words and not self.may_be_bare:
            self.parser.error("say what to run: a preset, such as demo, or settings over the defaults")

        def load_and_run() -> int | None:
            check_spaces(options.words)
            return run(build_config(self.read_start(read_settings(options.preset, words))), options)

        stopped = "Stopped. What was finished is kept; the same command goes on from there."
        return run_plainly(load_and_run, verbose=options.verbose, stopped=stopped)

    def read_start(self, values: dict[str, Any]) -> dict[str, Any]:
        """Add what the start decides of the settings, where there is one."""
        if not (self.reads_start and values.get("start.model")):
            return values
        from pipeline.training.start import resolve_start  # it loads torch

        try:
            return resolve_start(values)
        except ValueError as error:
            if not (self.only_calculates and "model.num_layers" in values):
                raise
            print(f"{error} What follows is calculated from the model.* settings that are given.\n")
            return values


def run_plainly(work: Callable[[], int | None], *, verbose: bool = False, stopped: str = "Stopped.") -> int:
    """Do a job's work and return its exit status; an error ends as one sentence.

    The status is 2 for what the user can mend, 1 for what nobody foresaw (with its traceback), 130 after Ctrl-C, and
    141 where the reader of the output has gone.
    """
    try:
        status = work() or 0
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print(f"\n{stopped}", file=sys.stderr)
        return 130
    except Exception as error:
        if isinstance(error, BrokenPipeError) and output_is_closed():
            return 141  # as a program that SIGPIPE has ended
        sentence = explain(error)
        if verbose or sentence is None:
            sys.stderr.write("".join(traceback.format_exception(error)))  # at once: one record of a JSON log
        print(f"error: {sentence or f'{type(error).__name__}: {error}'}", file=sys.stderr)
        return 1 if sentence is None else 2


class Parser(argparse.ArgumentParser):
    """Offers what fits where a shell asks at TAB, and parses otherwise."""

    def parse_known_args(self, *arguments: Any, **named: Any) -> Any:
        self._answer_shell()
        return super().parse_known_args(*arguments, **named)

    def parse_known_intermixed_args(self, *arguments: Any, **named: Any) -> Any:
        self._answer_shell()
        return super().parse_known_intermixed_args(*arguments, **named)

    def _answer_shell(self) -> None:
        if completion.is_asked(os.environ) and type(self) is Parser:  # argcomplete parses with a class of its own
            completion.complete(self)


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """A job's parser: its help keeps the lines of `description`, its usage names it as the user did."""
    module = getattr(sys.modules["__main__"], "__spec__", None)  # of `python -m jobs.plan`; argparse would say plan.py
    name = "jobs.__main__" if module is None else module.name  # `gpt plan` says so in argv
    return Parser(
        prog=Path(sys.argv[0]).name if name == "jobs.__main__" else f"python -m {name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def print_json(value: Any) -> None:
    """Print what another program reads; what is no number, which JSON does not have, is null."""

    def plain(found: Any) -> Any:
        if isinstance(found, Mapping):
            return {str(key): plain(each) for key, each in found.items()}
        if isinstance(found, (list, tuple)):
            return [plain(each) for each in found]
        return None if isinstance(found, float) and not math.isfinite(found) else found

    print(json.dumps(plain(value), indent=1, ensure_ascii=False, allow_nan=False))


def set_environment() -> None:
    """Give Ray and MLflow the defaults that this project needs; call it before importing either."""
    from pipeline import addresses

    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    addresses.go_direct()


def print_what_the_terminal_can() -> None:
    """Let a question mark stand for each character that the output cannot hold, such as … in Latin-1."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def output_is_closed() -> bool:
    """Whether the reader of our output has gone, as `head` does; what is left to print goes nowhere then."""
    try:
        descriptor = sys.stdout.fileno()
    except OSError:  # no file at all
        return False
    watched = select.poll()
    watched.register(descriptor, 0)
    if not any(event & select.POLLERR for _, event in watched.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)  # else Python complains when it ends
    return True


def check_spaces(words: Sequence[str]) -> None:
    """Raise `ValueError` where a shell has cut `train.steps = 20` into words."""
    for before, word, after in zip(["", *words], words, [*words[1:], ""], strict=False):
        if word.startswith("="):
            value = after if word == "=" else word[1:]
            raise ValueError(f"Write {before}={value} without spaces around the equals sign.")


def explain(error: BaseException) -> str | None:
    """Find the sentence for the user inside an error, through the wrappers that Ray puts around it."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        found = waiting.pop(0)
        if found is None or id(found) in seen:
            continue
        seen.add(id(found))
        cause = getattr(found, "cause", None)
        failures = getattr(found, "worker_failures", None) or {}
        inner = [*failures.values()] + ([cause] if isinstance(cause, BaseException) else []) + [found.__cause__]
        inner = [each for each in inner if each is not None]
        # botocore's own (no such endpoint, no credentials) are neither; naming its module imports nothing.
        if type(found).__module__.startswith("botocore."):
            return f"S3 cannot be used: {' '.join(str(found).split())}"
        if not inner and isinstance(found, (ValueError, OSError, ConnectionError, ModuleNotFoundError)):
            return " ".join(str(found).split())
        waiting += inner
    return None


@contextmanager
def ray_session(verbose: bool = False) -> Iterator[None]:
    """Join the cluster at RAY_ADDRESS, or start Ray on this machine; leaves it at the end."""
    import ray

    from pipeline import tracking

    logging.getLogger("ray").setLevel(logging.INFO if verbose else logging.ERROR)
    if not verbose:
        # Ray and MLflow warn about their own future; a user of this project can do nothing about it.
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"(ray|mlflow)\.")
    if os.environ.get("MLFLOW_TRACKING_URI"):
        tracking.check_address(os.environ["MLFLOW_TRACKING_URI"])
    address = os.environ.get("RAY_ADDRESS")
    arguments: dict[str, Any] = {"log_to_driver": verbose, "logging_level": "INFO" if verbose else "ERROR"}
    if address:
        check_cluster_answers(address)
        arguments["address"] = address
    else:
        # Two workers and the tasks beside them need two logical CPUs even where there is one core.
        arguments |= {"address": "local", "num_cpus": max(2, count_cores()), "include_dashboard": True}
    try:
        ray.init(**arguments)
    except ConnectionError as error:
        raise ValueError(f"No Ray cluster answers at RAY_ADDRESS={address}: {error}") from None
    except Exception as error:
        # A busy machine can miss the half minute that Ray gives its own processes to start.
        if address or not any(words in str(error) for words in ("timed out during startup", "dashboard")):
            raise
        ray.shutdown()
        ray.init(**arguments)
    try:
        yield
    finally:
        ray.shutdown()


def check_cluster_answers(address: str, seconds: float = 10.0) -> None:
    """Raise `ValueError` unless a head answers at HOST:PORT; Ray itself tries for minutes, without a word."""
    import grpc

    if "://" in address and not address.startswith("ray://"):
        raise ValueError(
            f"RAY_ADDRESS={address} is not the address of a head: write HOST:6379."
            f" Jobs are sent to a dashboard with `python -m jobs.submit`, which reads RAY_API_SERVER_ADDRESS."
        )
    place = address.removeprefix("ray://")
    if ":" not in place and address not in ("auto", "local"):
        raise ValueError(
            f"RAY_ADDRESS={address} names no port: write HOST:6379, or unset RAY_ADDRESS to run on this machine."
        )
    if ":" not in place or os.environ.get("RAY_USE_TLS", "0") != "0":
        return  # `auto` and `local` name no place, and a head behind TLS wants keys
    with grpc.insecure_channel(place, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=seconds)
        except grpc.FutureTimeoutError:
            raise ValueError(
                f"No Ray cluster answers at RAY_ADDRESS={address}. Start it, correct the address,"
                f" or unset RAY_ADDRESS to run on this machine."
            ) from None


def where_mlflow_shows(config: "Config", run_id: str) -> str:
    """The page of a run in MLflow; for a store without a server, with the command that shows it."""
    import mlflow

    from pipeline import registry, tracking

    uri = tracking.address(config)
    try:
        page = registry.place_of_run(run_id)
    except mlflow.exceptions.MlflowException:  # it is away, or the run was deleted meanwhile
        return tracking.without_password(uri)
    if uri.startswith("http"):
        return f"{tracking.without_password(uri).rstrip('/')}/{page}"
    store = shlex.quote(tracking.without_password(uri))
    return (
        f"http://127.0.0.1:5000/{page} once this runs:\n{' ' * 15}python -m mlflow server --backend-store-uri {store}"
    )


def name_command(job: str, options: argparse.Namespace) -> str:
    """The command line of another job with the same preset and settings; a cluster's is sent there again."""
    called = Path(sys.argv[0]).name.split(" ")  # `gpt` puts the job's name beside its own
    words = [called[0], job] if len(called) == 2 else ["python", "-m", f"jobs.{job}"]
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        words = ["python", "-m", "jobs.submit", "--job", job]
    extending = ["--extend"] if job in STAGES and getattr(options, "extend", False) else []
    return shlex.join([*words, *options.words, *extending])


def extend(config: "Config") -> "Config":
    """Have the training go on from the finished run that it differs from in its steps or schedule alone."""
    from pipeline import orchestrator
    from pipeline.training.extend import find_finished

    return find_finished(config, orchestrator.locate(config)["train"])


EXTEND_HELP = "go on from a finished run that has fewer steps or another schedule, in its MLflow run"


def run_stage(
    stage: str,
    description: str | None,
    argv: Sequence[str] | None = None,
    *,
    flags: Sequence[tuple[str, str, str]] = (),
) -> int:
    """Be the whole command of one stage: its inputs must be done, and it is skipped when it is done itself.

    `flags` are those of `Command.add_flag`.
    """

    def run(config: "Config", options: argparse.Namespace) -> None:
        if getattr(options, "extend", False):
            config = extend(config)
        with ray_session(options.verbose):
            from pipeline import orchestrator

            manifests = orchestrator.run(config, only=stage, first=stage if options.again else None)
        following = [*STAGES, "serve"][list(STAGES).index(stage) + 1]
        print()
        if stage == "train":
            print(f"MLflow run     {where_mlflow_shows(config, manifests[stage].counts['mlflow_run_id'])}")
        print(f"next           {name_command(following, options)}", flush=True)

    command = Command(description)
    command.parser.add_argument("--again", action="store_true", help="do it again although it is done")
    for flag in flags:
        command.add_flag(*flag)
    if stage not in ("tokenizer", "prepare"):
        command.parser.add_argument("--extend", action="store_true", help=EXTEND_HELP)
    return command.main(run, argv)
