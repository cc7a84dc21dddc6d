"""MLflow: where it is, whether it answers, and one run per training.

tracking.connect(config)                       # on the driver, before any worker
run_id = tracking.open_run(config, ...)        # a new run, or the old one of a resumed training
"""

import dataclasses
import getpass
import json
import logging
import os
import re
import shlex
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline import addresses
from pipeline.artifacts import Artifact, is_disk_full, resolve_storage
from pipeline.config import Config

logger = logging.getLogger(__name__)

LONGEST_PARAMETER = 6000  # characters; MLflow refuses more
# What MLflow's pages read of an experiment: model training, not generative AI, and which figure matters.
EXPERIMENT_TAGS = {
    "mlflow.experimentKind": "custom_model_development",
    "mlflow.experiment.primaryMetric.name": "validation/bits_per_byte",
    "mlflow.experiment.primaryMetric.greaterIsBetter": "False",
}
NOTE_TAG = "mlflow.note.content"  # a run's description, in Markdown
PARENT_TAG = "mlflow.parentRunId"
LONGEST_NOTE = 8000  # characters, as of any tag in MLflow's database
# The parameters that every run has; others have those that differ from the defaults. All are in its config.yaml.
TOLD_SETTINGS = (
    *("seed", "source.kind", "tokenizer.kind", "tokenizer.vocabulary_size"),
    *("model.family", "model.num_layers", "model.width", "model.num_heads", "model.context_length"),
    *("optimizer.kind", "optimizer.learning_rate", "optimizer.schedule"),
    *("train.steps", "train.batch_tokens", "train.num_workers", "train.precision"),
)
OF_OTHERS = ("serve", "register", "evaluate", "search")  # sections that say nothing of a training
# What a data set is to a run, in the words of MLflow's pages.
DATA_CONTEXTS = {"prepare": "training", "tokenizer": "tokenizer", "start": "start"}


DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
LOCKED = "database is locked"  # SQLite's words
LONGEST_TAG = 5000  # characters
CLOSE_SECONDS = 5.0  # of the thirty that a scheduler gives between its SIGTERM and its SIGKILL

_answered: set[str] = set()  # addresses that have answered this process once


class MlflowAway(ValueError):
    """Nothing answers at MLflow's address."""


def connect(config: Config) -> str:
    """Point MLflow at its store, make the experiment if it is new, and return the tracking URI.

    The driver calls this before any worker starts: several processes that open a fresh SQLite store at once
    break it for good.
    """
    import mlflow
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    uri = address(config)
    artifact_root = None
    is_ours = not os.environ.get("MLFLOW_TRACKING_URI")
    if is_ours:
        storage = resolve_storage(config.storage)
        Path(storage).mkdir(parents=True, exist_ok=True)
        artifact_root = f"{storage}/mlflow"
    prepare_client(uri)
    for name in ("alembic", "mlflow.tracking.fluent"):
        logging.getLogger(name).setLevel(logging.WARNING)  # else a page of migrations at the first use
    mlflow.set_tracking_uri(uri)
    if is_ours:
        # MLflow also writes it into the environment, where the next `connect` would take it for the user's wish.
        os.environ.pop("MLFLOW_TRACKING_URI", None)
    try:
        client = mlflow.MlflowClient(tracking_uri=uri)
        experiment = client.get_experiment_by_name(config.name)
        if experiment is None:
            _create_experiment(client, config.name, artifact_root)
        elif experiment.lifecycle_stage == "deleted":
            client.restore_experiment(experiment.experiment_id)
        elif "mlflow.experimentKind" not in experiment.tags:
            for key, value in EXPERIMENT_TAGS.items():
                client.set_experiment_tag(experiment.experiment_id, key, value)
        mlflow.set_experiment(config.name)
    except (MlflowException, SQLAlchemyError) as error:
        # Waiting frees no disk.
        kind = ValueError if is_disk_full(error) else MlflowAway
        raise kind(explain_trouble(error, uri)) from None
    _answered.add(uri)
    return uri


def _create_experiment(client: Any, name: str, artifact_root: str | None) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_experiment(name, artifact_location=artifact_root, tags=EXPERIMENT_TAGS)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":  # somebody else was first
            raise


def open_data_experiment(config: Config) -> str:
    """The id of the experiment that holds what is known of a pipeline's data, apart from its trainings."""
    import mlflow

    client, name = mlflow.MlflowClient(), f"{config.name} data"
    found = client.get_experiment_by_name(name)
    if found is None:
        is_ours = not os.environ.get("MLFLOW_TRACKING_URI")
        _create_experiment(client, name, f"{resolve_storage(config.storage)}/mlflow" if is_ours else None)
        found = client.get_experiment_by_name(name)
    elif found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    return str(found.experiment_id)


def is_outage(error: BaseException | None) -> bool:
    """Tell whether MLflow, which had answered before, could not be reached; a refusal is an answer."""
    import requests
    from mlflow.exceptions import MlflowException, RestException

    if not _answered:
        return False
    while error is not None:
        if isinstance(error, (MlflowAway, requests.ConnectionError, requests.Timeout)):
            return True
        # The client's words for no connection, and for a gateway's answer in place of the server's.
        if isinstance(error, MlflowException) and not isinstance(error, RestException):
            return str(error).startswith("API request to") or LOCKED in str(error)
        error = error.__cause__ or error.__context__
    return False


def wait_for_answer(config: Config, deadline: float) -> bool:
    """Wait until MLflow answers; returns False if it does not before `deadline`, a time of time.monotonic()."""
    while time.monotonic() < deadline:
        time.sleep(min(5.0, max(0.0, deadline - time.monotonic())))
        try:
            connect(config)
        except MlflowAway:
            continue
        return True
    return False


def address(config: Config) -> str:
    """Return the tracking URI: MLFLOW_TRACKING_URI, else an SQLite file under a local storage root.

    Raises `ValueError` for what can be no such address; nothing is connected.
    """
    storage = resolve_storage(config.storage)
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if not uri and "://" in storage:
        raise ValueError(
            f"With storage at {storage} MLflow needs a server: set MLFLOW_TRACKING_URI"
            " (for a try: `mlflow server --artifacts-destination s3://bucket/mlflow`)."
        )
    if uri:
        check_address(uri)
    return uri or f"sqlite:///{storage}/mlflow.db"


def check_address(uri: str) -> None:
    """Raise `ValueError` for what can be no address of an MLflow server or store, as far as its text says."""
    scheme, separator, rest = uri.partition("://")
    told = f"MLFLOW_TRACKING_URI is {without_password(uri)!r}"
    if separator and re.fullmatch(r"https?", scheme):
        try:
            parsed = urllib.parse.urlsplit(uri)
            good = bool(parsed.hostname) and parsed.port != 0
        except ValueError:
            good = False
        if not good:
            raise ValueError(f"{told}, which names no host and port; write {scheme}://HOST:5000.")
    elif re.fullmatch(r"[\w.-]+:\d+(/.*)?", uri):
        raise ValueError(f"{told}, which lacks its scheme; write http://{uri}.")
    elif scheme == "file" or uri.startswith(("file:", ".", "/", "~")):
        raise ValueError(
            f"{told}, a folder, and MLflow keeps runs in folders no longer; write sqlite:////path/to/mlflow.db, or"
            " unset it for such a file beside the artifacts."
        )
    elif scheme == "sqlite" and "://" in rest:
        raise ValueError(
            f"{told}, and SQLite keeps no file at {rest.lstrip('/')}; write sqlite:////path/to/mlflow.db with a path of"
            " this machine, or http://HOST:5000 for a server."
        )
    elif not (separator and rest.strip("/") and scheme.partition("+")[0] in DATABASES):
        raise ValueError(
            f"{told}, which is no address of MLflow; write http://HOST:5000 or sqlite:////path/to/mlflow.db, or unset"
            " it for such a file beside the artifacts."
        )
    elif scheme != "sqlite":
        _check_driver(uri, told)


def _check_driver(uri: str, told: str) -> None:
    """Raise `ValueError` where Python lacks what speaks to this kind of database."""
    import sqlalchemy

    try:
        sqlalchemy.make_url(uri).get_dialect().import_dbapi()
    except ModuleNotFoundError as error:
        raise ValueError(f"{told}, and its driver {error.name!r} is not installed here: pip install it.") from None
    except sqlalchemy.exc.ArgumentError as error:
        raise ValueError(f"{told}, which is no address of a database: {error}.") from None


def prepare_client(uri: str) -> None:
    """Have MLflow's client give up in seconds, and go past any proxy where the server is our own.

    Its default is to try for a quarter of an hour. A database's error is raised: the page that MLflow logs of it as
    well says nothing more.
    """
    addresses.go_direct(uri)
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)


def explain_trouble(error: BaseException, uri: str) -> str:
    """Say in one sentence why MLflow does not take or tell anything now."""
    where = without_password(uri)
    if LOCKED in str(error):
        return (
            f"MLflow's store at {where} is locked by another process: end that one (an old run, a backup, a shell in"
            " the database) or wait for it."
        )
    if is_disk_full(error):
        return f"No space left on the device of MLflow's store at {where}: make room there."
    return f"MLflow at {where} does not answer ({reason_of(error)}): start it, or correct MLFLOW_TRACKING_URI."


def reason_of(error: BaseException) -> str:
    """Return why a server did not answer, without the address and the retries that MLflow's client wraps around it."""
    line = first_line(error).rstrip(".")
    if not line.startswith("API request to"):
        return line
    inner = re.search(r"\[Errno -?\d+\] ([^\"')]+)|([Rr]ead timed out)", line)
    return (inner[1] or inner[2]) if inner else line.partition(" failed with ")[2] or line


def without_password(uri: str) -> str:
    """Return the address as it may appear in a log."""
    return re.sub(r"//[^/@]*@", "//…@", uri)


def first_line(error: BaseException) -> str:
    return without_password((str(error).strip() or type(error).__name__).splitlines()[0])


def open_run(
    config: Config, run_id: str | None, *, name: str, data: Mapping[str, Artifact], facts: Mapping[str, Any]
) -> str:
    """Return the MLflow run of this training: `run_id` if MLflow still has it, else a new one.

    A new run gets its parameters, git commit and data digests here; a resumed one has them already. Each start leaves
    its command line.
    """
    import mlflow
    from mlflow.entities import Param

    client = mlflow.MlflowClient()
    if run_id is not None and revive_run(run_id):
        client.update_run(run_id, status="RUNNING")
        client.set_tag(run_id, "command", command_line())
        return run_id
    experiment = client.get_experiment_by_name(config.name)
    assert experiment is not None, "connect() makes it"
    tags = {"mlflow.source.name": "jobs.train", "mlflow.source.type": "JOB", "command": command_line()} | git_tags()
    tags["mlflow.user"] = user_name()
    run = client.create_run(experiment.experiment_id, run_name=name, tags=tags)
    settings = tell_settings(config) | dict(facts)
    params = [Param(key, str(value)[:LONGEST_PARAMETER]) for key, value in settings.items()]
    for start in range(0, len(params), 100):
        client.log_batch(run.info.run_id, params=params[start : start + 100])
    log_data(str(run.info.run_id), data)
    return str(run.info.run_id)


def log_data(run_id: str, data: Mapping[str, Artifact]) -> None:
    """Say which data a run reads. MLflow fails where two runs are the first to name the same data at once."""
    import mlflow

    mlflow.MlflowClient().log_inputs(run_id, datasets=[_describe_data(stage, each) for stage, each in data.items()])


def tell_settings(config: Config) -> dict[str, Any]:
    """The few settings that a person looks for: what every training is asked for, and what was chosen for this one."""
    usual, told = flatten(dataclasses.asdict(Config())), {}
    for key, value in flatten(dataclasses.asdict(config)).items():
        chosen = value != usual.get(key) and "." in key and key.partition(".")[0] not in OF_OTHERS
        if key in TOLD_SETTINGS or chosen:
            told[key] = value
    return told


def read_settings(run_id: str) -> dict[str, str]:
    """All settings of a training's run, and its parameters; none where MLflow does not know it."""
    import mlflow
    import yaml
    from mlflow.exceptions import MlflowException

    if not run_id:
        return {}
    try:
        told = dict(mlflow.MlflowClient().get_run(run_id).data.params)
    except MlflowException:
        return {}
    try:
        whole = yaml.safe_load(mlflow.artifacts.load_text(f"runs:/{run_id}/config.yaml"))
    except (MlflowException, OSError, yaml.YAMLError):  # it has none, or not yet
        return told
    return {key: str(value) for key, value in flatten(whole).items()} | told


def user_name() -> str:
    """Who starts this: MLflow's own name of the user where there is one, else the system's."""
    try:
        return os.environ.get("MLFLOW_TRACKING_USERNAME") or getpass.getuser()
    except (KeyError, OSError):  # a container's user id without a name
        return f"user {os.getuid()}"


def _describe_data(stage: str, artifact: Artifact) -> Any:
    """An artifact as one of MLflow's data sets, with what its page shows: where it lies, and how large it is."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    manifest = artifact.any_manifest()
    split = {} if manifest is None else manifest.counts.get("train", {})
    counts = {name: split[name] for name in ("documents", "tokens", "bytes") if name in split}
    scheme = artifact.url.partition("://")[0] if "://" in artifact.url else "local"
    dataset = Dataset(
        name=stage,
        digest=artifact.fingerprint,
        source_type=scheme,
        source=json.dumps({"uri": artifact.url}),
        schema=json.dumps({"mlflow_colspec": [{"name": "tokens", "type": "long"}]}) if stage == "prepare" else None,
        profile=json.dumps(counts) if counts else None,
    )
    return DatasetInput(dataset, tags=[InputTag("mlflow.data.context", DATA_CONTEXTS.get(stage, stage))])


def revive_run(run_id: str) -> bool:
    """Tell whether MLflow still has a run, which is brought back if somebody deleted it."""
    import mlflow
    from mlflow.exceptions import MlflowException

    client = mlflow.MlflowClient()
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return False
    if run.info.lifecycle_stage == "deleted":
        client.restore_run(run_id)
    return True


def find_run(config: Config, trained: Artifact) -> str:
    """Return the MLflow run of a training that is done, for the stages after it.

    Where it was purged, or this is another store, that is the run which took its place, if need be a new one.
    """
    import mlflow

    manifest = trained.manifest()
    assert manifest is not None
    run_id = str(manifest.counts["mlflow_run_id"])
    if revive_run(run_id):
        return run_id
    experiment = mlflow.MlflowClient().get_experiment_by_name(config.name)
    assert experiment is not None, "connect() makes it"
    same = f"params.fingerprint = '{trained.fingerprint}'"
    found = mlflow.MlflowClient().search_runs([experiment.experiment_id], same, max_results=1)
    if found:
        return str(found[0].info.run_id)
    logger.warning("MLflow no longer has the run %s of the training; what comes now goes to a new one.", run_id)
    facts = {"artifact": trained.url, "fingerprint": trained.fingerprint}
    return open_run(config, None, name=trained.url.rpartition("/")[2], data={}, facts=facts)


def close_run(run_id: str, status: str) -> None:
    """Say in MLflow how the run ended, if that takes a few seconds at most; how it ended does not depend on it."""
    import mlflow

    def tell() -> None:
        try:
            mlflow.MlflowClient().set_terminated(run_id, status)
        except Exception as error:
            logger.warning("MLflow was not told that the run is %s: %s", status, first_line(error))

    telling = threading.Thread(target=tell, name="close-run", daemon=True)
    telling.start()
    telling.join(CLOSE_SECONDS)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Name each leaf by its dotted path."""
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            leaves |= flatten(value, f"{prefix}{name}.")
        else:
            leaves[f"{prefix}{name}"] = value
    return leaves


def command_line() -> str:
    """The command that started this process, for the record."""
    return without_password(shlex.join(sys.orig_argv))[:LONGEST_TAG]


def git_tags() -> dict[str, str]:
    """Name the commit of this code, and whether files differ from it; GIT_COMMIT where there is no git."""
    commit = git_commit(Path(__file__).parent) or os.environ.get("GIT_COMMIT", "")
    if not commit:
        return {}
    return {"mlflow.source.git.commit": commit.rstrip("+"), "git_files_changed": str(commit.endswith("+")).lower()}


def git_commit(folder: Path) -> str:
    """The commit that is checked out, with a plus sign where files differ from it; empty outside of git."""
    try:
        command = ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
