"""The pipeline on a real cluster: three Ray nodes, S3 over HTTP, MLflow on PostgreSQL; nodes and servers are killed."""

import json
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from pipeline.stages import STAGES
from tests.infra.manifests import ROOT
from tests.infra.running_cluster import TINY, MetricNames, RunningCluster, require_postgresql
from tests.infra.test_grafana import DASHBOARDS, metrics_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

# Planted where a careless line would print it: an environment variable of every process of the cluster.
PLANTED = {
    "SERVE_API_KEYS": "planted-serve-key-5a1b",
    "HF_TOKEN": "planted-hub-token-77ce",
    "MLFLOW_TRACKING_PASSWORD": "planted-password-e40f",
}
GPU_METRICS = {"ray_gpt_train_gpu_memory_gigabytes"}
# Shown once something of the kind has happened: a counter is born with its first event.
EVENTFUL_METRICS = {"gpt_model_swaps_total", "gpt_cancelled_requests_total"}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCluster]:
    require_postgresql()
    patch = pytest.MonkeyPatch()
    for name, value in PLANTED.items():
        patch.setenv(name, value)
    patch.setenv("MLFLOW_TRACKING_USERNAME", "ada")  # no secret: MLflow names it beside every run
    running = RunningCluster(tmp_path_factory.mktemp("cluster"))
    try:
        for part in range(8):
            lines = (
                f"Line {part}.{number}: a cluster is many machines that fail one at a time." for number in range(400)
            )
            running.put(f"corpus/part-{part}.txt", "\n".join(lines).encode())
        yield running
    finally:
        running.cluster.down()
        patch.undo()


@pytest.fixture(scope="module")
def metric_names(running: RunningCluster) -> Iterator[MetricNames]:
    names = MetricNames(running)
    names.start()
    yield names
    names.end()


@pytest.fixture(scope="module")
def first(running: RunningCluster, metric_names: MetricNames) -> str:
    """The undisturbed pipeline, through Ray's own command; the others are compared with it."""
    command = [Path(sys.executable).with_name("ray"), "job", "submit", "--working-dir", ".", "--submission-id", "first"]
    command += ["--", "python", "-m", "jobs.pipeline", "jobs/presets/demo.yaml", "name=first", "train.steps=40", *TINY]
    done = subprocess.run(
        [str(word) for word in command], cwd=ROOT, env=running.shell, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return "first"


def test_starting_it_again_changes_nothing(running: RunningCluster) -> None:
    before = dict(running.state.processes)
    assert running.cluster.up().processes == before
    nodes = running.ask("/nodes?view=summary")["data"]["summary"]
    assert len({node["ip"] for node in nodes}) == 3


def test_the_whole_pipeline_runs_with_storage_on_s3_alone(running: RunningCluster, first: str) -> None:
    log = running.log(first)
    for stage in STAGES:
        assert re.search(rf"^{stage} +done in .*s3://gpt/artifacts/first/", log, re.MULTILINE), stage
        assert running.manifest("first", stage)["stage"] == stage
    assert running.keys("mlflow/"), "MLflow's artifacts lie on S3 too"


@pytest.mark.parametrize("job", STAGES)
def test_each_job_alone_finds_what_the_pipeline_made(running: RunningCluster, first: str, job: str) -> None:
    submitted = running.submit("first", "train.steps=40", job=job)
    assert running.wait_end(submitted) == "SUCCEEDED", running.log(submitted)[-2000:]
    assert re.search(rf"^{job} +done already: s3://gpt/artifacts/first/", running.log(submitted), re.MULTILINE)


def test_nothing_of_storage_lies_on_a_local_disk(running: RunningCluster, first: str) -> None:
    # Each node works in a folder of its own, so what is written to a relative path shows up below it.
    scratch = Path(running.state.scratch)
    assert len({(scratch / node).resolve() for node in running.state.nodes}) == 3
    wrong = {"manifest.json", "mlflow.db", "mlruns", "s3:", "run.json"}
    for place in (scratch, ROOT / "s3:", ROOT / "gpt"):
        found = [path for path in place.rglob("*") if path.name in wrong or path.suffix in (".parquet", ".safetensors")]
        found += [path for path in place.rglob("artifacts/**/*") if path.is_file()]  # Ray makes such folders, empty
        assert not found, found


def test_dashboards_name_only_metrics_that_the_running_system_shows(
    running: RunningCluster, first: str, metric_names: MetricNames
) -> None:
    wanted = {name for path in DASHBOARDS for name in metrics_of(path) if name.startswith("ray_")}
    assert wanted - metric_names.names - GPU_METRICS == set()


def test_the_second_run_of_a_name_is_told_who_holds_it(running: RunningCluster, first: str) -> None:
    holder = running.submit("held", "train.steps=100000")
    running.wait_for(holder, "training on")
    second = running.submit("held", "train.steps=100000")
    assert running.wait_end(second) == "FAILED"
    assert f"error: The pipeline 'held' is being run by job {holder}, " in running.log(second)
    running.ask(f"/api/jobs/{holder}/stop", "POST")
    assert running.wait_end(holder) == "STOPPED"


def test_leaving_the_log_leaves_the_job(running: RunningCluster, first: str) -> None:
    command = [sys.executable, "-m", "jobs.submit", "jobs/presets/demo.yaml", "name=left"]
    command += [*TINY, "train.steps=100000"]
    following = subprocess.Popen(command, cwd=ROOT, env=running.shell, stdout=subprocess.PIPE, text=True)
    assert following.stdout is not None
    said = []
    for line in following.stdout:
        said.append(line)
        if line.startswith("step "):
            break
    assert "All 7 checks are ok.\n" in said, "the preflight comes first"
    following.send_signal(signal.SIGINT)
    told = following.stdout.read()
    assert following.wait(60) == 130
    (job,) = re.findall(r"^(\S+) goes on running\.$", told, re.MULTILINE)
    assert running.status(job) == "RUNNING"
    back = [sys.executable, *re.findall(rf"python (-m jobs\.submit --follow {job})", told)[0].split()]
    again = subprocess.Popen(back, cwd=ROOT, env=running.shell, stdout=subprocess.PIPE, text=True)
    assert again.stdout is not None
    assert any(line.startswith("step ") for line in again.stdout), "the log from its beginning"
    stop = re.findall(r"(ray job stop .*)", told)[0].split()
    subprocess.run([str(Path(sys.executable).with_name("ray")), *stop[1:]], env=running.shell, check=True, timeout=120)
    assert f"{job}: stopped" in again.stdout.read()
    assert again.wait(60) == 1
    assert "stopping: writing a checkpoint first" in running.log(job)


def test_two_pipelines_survive_the_loss_of_nodes_and_of_mlflow(running: RunningCluster, first: str) -> None:
    one = running.submit("one", "train.steps=40")
    two = running.submit("two", "train.steps=150")
    running.wait_for(one, "prepare   …")
    running.cluster.kill("worker-1")
    running.cluster.up()
    running.wait_for(two, "training on")
    running.wait_for(two, "step ")
    running.cluster.kill("worker-2")
    running.cluster.kill("mlflow")
    time.sleep(10)
    running.cluster.up()
    assert running.wait_end(one) == "SUCCEEDED"
    assert running.wait_end(two) == "SUCCEEDED"
    assert running.shard_digests("one") == running.shard_digests("two") == running.shard_digests("first")
    weights = {
        name: running.manifest(name, "train")["files"]["checkpoint/model.safetensors"]["sha256"]
        for name in ("first", "one")
    }
    assert weights["one"] == weights["first"], "the same weights, whatever was killed"


def test_after_the_loss_of_the_head_the_same_command_goes_on(running: RunningCluster, first: str) -> None:
    job = running.submit("headless", "train.steps=60")
    running.wait_for(job, "step ")
    running.cluster.kill("head")
    running.cluster.up()
    time.sleep(60)  # the name is the dead run's until a minute after its last word
    again = running.submit("headless", "train.steps=60")
    assert running.wait_end(again) == "SUCCEEDED", running.log(again)[-2000:]
    assert "prepare   done already" in running.log(again)
    assert running.shard_digests("headless") == running.shard_digests("first")


def test_the_endpoint_survives_the_loss_of_a_node(running: RunningCluster, first: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    job = running.submit("first", f"serve.port={port}", "serve.replicas=2", "train.steps=40", job="serve")
    running.wait_for(job, "serving ")
    request = {"model": "first", "prompt": "Line 3", "max_tokens": 4}

    def ask() -> int:
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {PLANTED['SERVE_API_KEYS']}"}
        body = json.dumps(request).encode()
        url = f"http://127.0.0.1:{port}/v1/completions"
        try:
            with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=60) as answer:
                return answer.status if json.load(answer)["choices"] else 0
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0

    assert ask() == 200
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
        shown = {line.split("{")[0].split(" ")[0] for line in answer.read().decode().splitlines()}
    wanted = {name for path in DASHBOARDS for name in metrics_of(path) if not name.startswith("ray_")}
    assert wanted - shown - EVENTFUL_METRICS == set()
    running.cluster.kill("worker-1")
    deadline = time.monotonic() + 300
    answers = 0
    while answers < 5:
        answers = answers + 1 if ask() == 200 else 0
        assert time.monotonic() < deadline, running.log(job)[-2000:]
        time.sleep(1)
    running.cluster.up()
    running.ask(f"/api/jobs/{job}/stop", "POST")
    running.wait_end(job)


def test_no_secret_shows_up_in_a_log_a_record_or_an_object(running: RunningCluster, first: str) -> None:
    environment = running.environment
    secrets = [*PLANTED.values(), environment["AWS_SECRET_ACCESS_KEY"], (running.cluster.folder / "token").read_text()]
    own = {running.cluster.folder / name for name in ("token", "keys.json", "environment")}
    places: dict[str, bytes] = {}
    for folder in (Path(running.state.scratch), running.cluster.folder):
        for path in folder.rglob("*"):
            if path.is_file() and not path.is_symlink() and path not in own and "postgresql" not in path.parts:
                places[str(path)] = path.read_bytes()
    assert any("/logs/" in place for place in places)
    places |= {f"s3://gpt/{key}": running.read(key) for key in running.keys("")}
    data = Path(running.state.scratch) / "postgresql"
    dump = ["pg_dump", "-h", str(data), "-U", "mlflow", "mlflow"]
    places["MLflow's database"] = subprocess.run(dump, capture_output=True, check=True).stdout
    assert b"train/loss" in places["MLflow's database"]
    jobs = running.ask("/api/jobs/")
    places["the jobs as Ray lists them"] = json.dumps(jobs).encode()
    places |= {f"log of {job['submission_id']}": running.log(job["submission_id"]).encode() for job in jobs}
    told = [place for place, content in places.items() if any(secret.encode() in content for secret in secrets)]
    assert told == []


@pytest.mark.parametrize("token", ["", "0" * 64])
def test_a_job_without_the_token_is_refused(running: RunningCluster, token: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        running.ask("/api/jobs/", token=token)
    assert refused.value.code in (401, 403)
    shell = {name: value for name, value in running.shell.items() if not name.startswith("RAY_AUTH")}
    shell |= {"HOME": str(running.cluster.folder), "RAY_AUTH_MODE": "token"} | (
        {"RAY_AUTH_TOKEN": token} if token else {}
    )
    command = [sys.executable, "-m", "jobs.submit", "jobs/presets/demo.yaml", "storage=s3://gpt/x", "--skip-preflight"]
    done = subprocess.run(command, cwd=ROOT, env=shell, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: "), done.stderr
    assert "token" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_going_down_ends_exactly_its_own_processes(running: RunningCluster) -> None:
    # The last test: the cluster is gone after it.
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    own = [process for name in running.state.processes if (process := running.cluster.load().process(name))]
    family = own + [child for process in own for child in process.children(recursive=True)]
    assert len(family) > 20
    ended = running.cluster.down()
    assert set(ended) == set(running.state.processes)
    assert [process for process in family if process.is_running() and process.status() != psutil.STATUS_ZOMBIE] == []
    assert other.poll() is None
    other.kill()
    other.wait()
    assert not Path(running.state.scratch).exists()
    assert running.cluster.down() == []
