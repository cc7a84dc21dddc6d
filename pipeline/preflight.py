"""Can this cluster run this config? Each check is tried for real, and ends ok or in one sentence on what to do.

    for check in preflight.run(config, report=print): ...

What is tried: the nodes' versions, the dashboard's lock, the workers that training asks for and their GPUs, storage
from every node, MLflow with an artifact as large as the model, an all-reduce between the workers, and room on local
disks.
Nothing of it is left behind.
"""

import os
import posixpath
import secrets
import shutil
import socket
import tempfile
import time
import urllib.error
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import ray
from fsspec.implementations.local import LocalFileSystem
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from model.gpt import count_parameters
from pipeline import addresses, tracking
from pipeline.artifacts import expand_home, filesystem_of, resolve_storage
from pipeline.config import Config
from pipeline.corpus.shards import default_cache_folder
from pipeline.training.rehearsal import Workers, choose_address, time_all_reduce, training_workers, try_gpu

PACKAGES = ("ray", "torch", "numpy", "pyarrow", "s3fs", "mlflow", "tiktoken", "tokenizers", "safetensors")
PROBE_BYTES = 8_000_000  # enough to see the rate, little enough to pay for from every node
LARGEST_ARTIFACT_BYTES = 512_000_000
# Gradients that take longer than this in every step make more workers slower, not faster.
SLOWEST_GRADIENTS_SECONDS = {"nccl": 1.0, "gloo": 15.0}
CHECKPOINTS_AT_ONCE = 2  # on a local disk: the one being written and the one being uploaded
NODE_SECONDS = 120.0
GPU_SECONDS = 300.0  # for the first use of CUDA on a node, and for compiling


@dataclass(frozen=True)
class Check:
    """One line of the preflight: what was tried, and how it went or what to do."""

    subject: str
    ok: bool
    sentence: str

    def __str__(self) -> str:
        return f"{'ok  ' if self.ok else 'FAIL'}  {self.subject:<14} {self.sentence}"


class Failed(Exception):
    """A check that failed; its text is one sentence on what to do."""


def run(config: Config, *, wait_seconds: float = 30.0, report: Callable[[str], None] = print) -> list[Check]:
    """Try everything that the pipeline will need; report each line as it is known and return them all.

    With an autoscaler, `wait_seconds` is how long its nodes may take to come.
    """
    checks: list[Check] = []

    def attempt(subject: str, action: Callable[[], str]) -> None:
        try:
            check = Check(subject, True, action())
        except Failed as failure:
            check = Check(subject, False, str(failure))
        except (RayError, OSError, ValueError) as error:
            check = Check(subject, False, _one_line(error))
        checks.append(check)
        report(str(check))

    attempt("authentication", check_authentication)
    with training_workers(config.train, wait_seconds) as workers:
        # The autoscaler's nodes are there now, so the checks of every node see them too.
        attempt("workers", workers.check)
        attempt("versions", check_versions)
        attempt("storage", lambda: check_storage(config))
        attempt("disk", lambda: check_disk(config))
        if workers.resources.get("GPU"):
            attempt("gpus", lambda: check_gpus(config, workers))
        attempt(
            "all-reduce",
            lambda: check_all_reduce(config, workers, usable=checks[-1].subject != "gpus" or checks[-1].ok),
        )
    attempt("mlflow", lambda: check_mlflow(config))
    return checks


# ---------------------------------------------------------------------------------------------- the nodes


def nodes() -> dict[str, str]:
    """The living nodes: id -> name for people."""
    return {node["NodeID"]: _node_name(node) for node in ray.nodes() if node["Alive"]}


def _node_name(node: dict[str, Any]) -> str:
    name, address = node.get("NodeName", ""), node["NodeManagerAddress"]
    return address if name in ("", address) else f"{name} ({address})"


def on_every_node(function: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
    """Call a function once on each node and return its answers by the node's name."""
    task = ray.remote(num_cpus=0, max_retries=0)(function)
    waiting = {
        name: task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(*arguments)
        for node, name in nodes().items()
    }
    answers = {}
    for name, reference in waiting.items():
        try:
            answers[name] = ray.get(reference, timeout=NODE_SECONDS)
        except ray.exceptions.GetTimeoutError:
            raise Failed(f"Node {name} did not answer in {NODE_SECONDS:.0f} s; replace it.") from None
        except ray.exceptions.RayTaskError as error:
            raise Failed(f"Node {name}: {_one_line(error.cause)}") from None
    return answers


def check_authentication() -> str:
    """An unauthenticated request to the dashboard, which runs code for whoever is let in, must be refused."""
    from ray._private.worker import get_dashboard_url  # Ray has no public name for it

    url = get_dashboard_url()
    many = len(nodes()) > 1
    if not url:
        if many and os.environ.get("RAY_AUTH_MODE") != "token":
            raise Failed("Start every node with RAY_AUTH_MODE=token and one token (infra/SECURITY.md).")
        return "no dashboard runs"
    try:
        with addresses.open_own(f"http://{url}/api/jobs/", timeout=10):
            pass
    except urllib.error.HTTPError as error:
        # Ray's own words: another's 403 on the way would say nothing about the dashboard.
        if error.code in (401, 403) and b"authentication token" in error.read(1000):
            return f"the dashboard at {url} refuses strangers"
        raise Failed(
            f"What answers {error.code} at {url} is not Ray's dashboard asking for a token; look into the dashboard's"
            f" log on the head node, and at what listens on that port."
        ) from None
    host = url.rpartition(":")[0]
    if not many and host in ("127.0.0.1", "localhost", "[::1]"):
        return "off, and the dashboard listens on this machine alone"
    raise Failed(
        f"Anyone who reaches {url} can run code as you: start every node with RAY_AUTH_MODE=token (infra/SECURITY.md)."
    )


def check_versions() -> str:
    """Every node must run the same Python and the same packages: shards, weights and messages go between them."""
    found: dict[str, dict[str, str]] = on_every_node(node_versions)
    differing = {}
    for package in next(iter(found.values())):
        by_version: dict[str, list[str]] = {}
        for node, versions in found.items():
            by_version.setdefault(versions[package], []).append(node)
        if len(by_version) > 1:
            differing[package] = by_version
    if differing:
        package, by_version = next(iter(differing.items()))
        told = "; ".join(f"{version} on {', '.join(each)}" for version, each in by_version.items())
        raise Failed(f"Give all nodes the same image: {package} is {told}.")
    versions = next(iter(found.values()))
    return f"Python {versions['python']}, ray {versions['ray']}, torch {versions['torch']} on {_count(found, 'node')}"


def node_versions() -> dict[str, str]:
    """What is installed where this runs."""
    import platform

    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            # Without the build: torch for CPUs on the head and for CUDA on the workers is one version.
            found[package] = metadata.version(package).partition("+")[0]
        except metadata.PackageNotFoundError:
            found[package] = "missing"
    return found


def check_disk(config: Config) -> str:
    """Each node keeps two windows of decoded shards, and a checkpoint while it is on its way to storage."""
    bytes_per_token = 2 if config.tokenizer.most_tokens <= 65536 else 4
    tokens = 2 * config.stream.window_tokens
    if not config.train.minutes:
        tokens = min(tokens, config.train.steps * config.train.batch_tokens)
    cache = min(tokens * bytes_per_token, int(config.stream.cache_gigabytes * 1e9))
    # Weights and two moments of the optimizer, in float32.
    checkpoints = CHECKPOINTS_AT_ONCE * 3 * model_bytes(config)
    free = on_every_node(free_bytes, config.stream.cache_folder)
    for node, (cache_folder, cache_free, temporary, temporary_free, same_disk) in free.items():
        needs = [(cache_folder, cache_free, cache + (checkpoints if same_disk else 0), "stream.cache_folder")]
        if not same_disk:
            needs.append((temporary, temporary_free, checkpoints, "TMPDIR"))
        for folder, available, bytes_needed, knob in needs:
            if available < bytes_needed:
                raise Failed(
                    f"Node {node} has {_gigabytes(available)} free at {folder} and needs {_gigabytes(bytes_needed)}:"
                    f" give it a larger disk, or point {knob} at one."
                )
    least = min(cache_free for _, cache_free, *_ in free.values())
    return (
        f"{_gigabytes(cache)} for decoded shards, {_gigabytes(checkpoints)} for checkpoints; {_gigabytes(least)} free"
    )


def free_bytes(cache_folder: str) -> tuple[str, int, str, int, bool]:
    """Free space for the shard cache and for temporary files where this runs, and whether they share a disk."""
    cache = expand_home(cache_folder) if cache_folder else default_cache_folder()
    existing = next(folder for folder in (cache, *cache.parents) if folder.exists())
    temporary = Path(tempfile.gettempdir())
    same = existing.stat().st_dev == temporary.stat().st_dev
    return str(cache), shutil.disk_usage(existing).free, str(temporary), shutil.disk_usage(temporary).free, same


# ---------------------------------------------------------------------------------------------- storage


def check_storage(config: Config) -> str:
    """What the driver writes every node must read, and what a node writes the driver must be able to delete."""
    root = posixpath.join(resolve_storage(config.storage), config.name, f"preflight-{secrets.token_hex(4)}")
    filesystem, path = filesystem_of(root)
    expected = os.urandom(1000)
    try:
        if isinstance(filesystem, LocalFileSystem):  # on S3 this would make the bucket, whatever was mistyped
            filesystem.makedirs(path, exist_ok=True)
        filesystem.pipe_file(posixpath.join(path, "from-driver"), expected)
    except Exception as error:
        raise Failed(_storage_help(config, _one_line(error))) from None
    try:
        rates = on_every_node(probe_storage, root, expected)
    except Failed as failure:
        raise Failed(_storage_help(config, str(failure))) from None
    finally:
        filesystem.rm(path, recursive=True)
    slowest = min(min(rate) for rate in rates.values())
    return f"{config.storage} read and written by {_count(rates, 'node')}, the slowest at {slowest:.0f} MB/s"


def probe_storage(root: str, expected: bytes) -> tuple[float, float]:
    """Read what the driver wrote, write and read back some megabytes; returns MB/s of writing and reading."""
    filesystem, path = filesystem_of(root)
    try:
        shared = filesystem.cat_file(posixpath.join(path, "from-driver")) == expected
    except FileNotFoundError:
        shared = False
    if not shared:
        raise ValueError("it does not see what the driver wrote: storage must be one place for all nodes")
    content = os.urandom(PROBE_BYTES)
    mine = posixpath.join(path, f"from-{socket.gethostname()}-{secrets.token_hex(4)}")
    began = time.monotonic()
    filesystem.pipe_file(mine, content)
    written = time.monotonic()
    if filesystem.cat_file(mine) != content:
        raise ValueError("storage gave back other bytes than were written")
    read = time.monotonic()
    return PROBE_BYTES / 1e6 / max(written - began, 1e-6), PROBE_BYTES / 1e6 / max(read - written, 1e-6)


def _storage_help(config: Config, reason: str) -> str:
    if "://" not in config.storage:
        return f"Give storage=s3://bucket/prefix, which all nodes share: {reason}"
    return f"Give every node the keys or the role that may list, read, write and delete {config.storage}: {reason}"


# ---------------------------------------------------------------------------------------------- MLflow


def check_mlflow(config: Config) -> str:
    """MLflow must answer, and take an artifact of the model's size from where the driver runs and from a node."""
    try:
        uri = tracking.connect(config)
    except ValueError as error:
        raise Failed(f"Start the server, or mend MLFLOW_TRACKING_URI on every node: {error}") from None
    size = min(model_bytes(config), LARGEST_ARTIFACT_BYTES)
    task = ray.remote(num_cpus=0, max_retries=0)(send_artifact)
    try:
        seconds = ray.get(task.options(scheduling_strategy="SPREAD").remote(uri, config.name, size), timeout=600)
    except RayError as error:
        cause = _one_line(getattr(error, "cause", None) or error)
        raise Failed(
            f"MLflow at {tracking.without_password(uri)} does not take an artifact of {size / 1e6:.0f} MB; see its own"
            f" keys for storage and the body limit of any proxy before it: {cause}"
        ) from None
    return f"{tracking.without_password(uri)} took {size / 1e6:.0f} MB at {size / 1e6 / max(seconds, 1e-6):.0f} MB/s"


def send_artifact(uri: str, experiment: str, size: int) -> float:
    """Log one artifact to a run of its own, read it back, remove both; returns the seconds of sending."""
    from mlflow import MlflowClient
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    tracking.prepare_client(uri)
    client = MlflowClient(tracking_uri=uri)
    found = client.get_experiment_by_name(experiment)
    if found is None:
        raise ValueError(f"the experiment {experiment!r} is gone again; is this the same server?")
    run = client.create_run(found.experiment_id, run_name="preflight")
    try:
        with tempfile.TemporaryDirectory() as folder:
            content = os.urandom(1_000_000) * (size // 1_000_000 + 1)
            sent = Path(folder) / "preflight.bin"
            sent.write_bytes(content[:size])
            began = time.monotonic()
            client.log_artifact(run.info.run_id, str(sent))
            seconds = time.monotonic() - began
            back = Path(folder) / "back"
            back.mkdir()
            returned = Path(client.download_artifacts(run.info.run_id, sent.name, str(back)))
            if returned.stat().st_size != size:
                raise ValueError(f"{size} bytes were sent and {returned.stat().st_size} came back")
        get_artifact_repository(run.info.artifact_uri, uri).delete_artifacts()
    finally:
        client.delete_run(run.info.run_id)
    return seconds


# ---------------------------------------------------------------------------------------------- the workers


def check_gpus(config: Config, workers: Workers) -> str:
    """Try each worker's GPU: its driver, a product, and what torch.compile makes for it."""
    if workers.group is None:
        raise Failed("Not tried: it needs the workers above.")
    task = ray.remote(num_cpus=workers.resources["CPU"], num_gpus=1, max_calls=1, max_retries=0)(try_gpu)
    waiting = [
        task.options(scheduling_strategy=PlacementGroupSchedulingStrategy(workers.group, rank)).remote(
            config.train.compile
        )
        for rank in range(workers.count)
    ]
    try:
        found = ray.get(waiting, timeout=GPU_SECONDS)
    except ray.exceptions.GetTimeoutError:
        raise Failed(f"A GPU did not answer in {GPU_SECONDS:.0f} s; look at its node with nvidia-smi.") from None
    except RayError as error:
        raise Failed(_one_line(getattr(error, "cause", None) or error)) from None
    kinds = Counter(sentence for sentence, _ in found)
    compiled = f", compiled in {max(seconds for _, seconds in found):.0f} s" if config.train.compile else ""
    return "; ".join(f"{count} × {kind}" for kind, count in kinds.items()) + compiled


def check_all_reduce(config: Config, workers: Workers, *, usable: bool = True) -> str:
    """Sum the model's gradients over all workers, as every training step will."""
    if workers.group is None or not usable:
        raise Failed(f"Not tried: it needs the {'workers' if workers.group is None else 'GPUs'} above.")
    if workers.count == 1:
        return "one worker needs none"
    backend = "nccl" if workers.resources.get("GPU") else "gloo"
    cpus, gpus = workers.resources.get("CPU", 0), workers.resources.get("GPU", 0)
    task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_calls=1, max_retries=0)(time_all_reduce)
    places = [PlacementGroupSchedulingStrategy(workers.group, rank) for rank in range(workers.count)]
    choose = ray.remote(num_cpus=cpus, num_gpus=gpus)(choose_address)
    address = ray.get(choose.options(scheduling_strategy=places[0]).remote(), timeout=NODE_SECONDS)
    size = model_bytes(config)
    waiting = [
        task.options(scheduling_strategy=place).remote(address, rank, workers.count, backend, size)
        for rank, place in enumerate(places)
    ]
    try:
        seconds = max(ray.get(waiting, timeout=NODE_SECONDS))
    except RayError as error:
        for each in waiting:
            ray.cancel(each, force=True)
        raise Failed(
            f"Open all ports between the nodes (and set NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME if they have several"
            f" networks): the workers could not sum over {backend}: {_one_line(getattr(error, 'cause', None) or error)}"
        ) from None
    # Each worker sends and receives 2 (n - 1) / n of the buffer: the bandwidth of the link, whatever n.
    gigabytes = size * 2 * (workers.count - 1) / workers.count / 1e9
    told = f"{size / 1e6:.0f} MB of gradients over {backend} in {seconds:.2f} s, {gigabytes / seconds:.2f} GB/s"
    if seconds > SLOWEST_GRADIENTS_SECONDS[backend]:
        raise Failed(f"Use fewer workers, one larger machine or a faster network: {told} in each step.")
    return told


# ---------------------------------------------------------------------------------------------- sizes


def model_bytes(config: Config) -> int:
    """Bytes of the weights, and of the gradients, in float32."""
    return 4 * count_parameters(config.model, config.tokenizer.most_tokens)


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB"


def _count(things: Any, noun: str) -> str:
    return f"{len(things)} {noun}{'' if len(things) == 1 else 's'}"


def _one_line(error: BaseException | None) -> str:
    lines = (str(error).strip() or type(error).__name__).splitlines()
    return tracking.without_password(lines[0])
