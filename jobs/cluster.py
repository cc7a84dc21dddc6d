"""A whole cluster on this machine: what runs on Kubernetes or AWS, small, behind loopback addresses.

    python -m jobs.cluster up          start it, or start again what has died
    python -m jobs.cluster status      say what runs and where
    python -m jobs.cluster down        end exactly the processes that it started

    Ray        a head and two workers: one raylet each, own address, own folder; token authentication on
    S3         moto's server over HTTP; it keeps its objects in memory
    MLflow     mlflow server: its runs in PostgreSQL, its artifacts on S3

`source artifacts/cluster/environment` gives a shell the addresses and keys; `make submit` reads that file by itself.
"""

import contextlib
import json
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from jobs.command import ENVIRONMENT, make_parser
from jobs.processes import end_processes, processes_below
from pipeline.addresses import answers, go_direct, open_own

FOLDER = Path("artifacts/cluster")
BUCKET = "gpt"
NODE_ATTEMPTS = 4
# `ray start`'s options for what it would else put on a fixed port, also on 127.0.0.1, where another Ray may be.
HEAD_PORTS = {"gcs": "port", "client": "ray-client-server-port", "dashboard": "dashboard-port"}
NODE_PORTS = {
    "agent": "dashboard-agent-listen-port",
    "agent-grpc": "dashboard-agent-grpc-port",
    "runtime-env": "runtime-env-agent-port",
    "metrics": "metrics-export-port",
    "raylet": "node-manager-port",
    "objects": "object-manager-port",
}
START_SECONDS = 300  # ten times what a quiet machine takes
# Room for shuffles and weights of a demo; what does not fit spills to disk.
OBJECT_STORE_BYTES = 400_000_000


@dataclass
class State:
    """What `up` has started: kept in a file, so that `up` can mend it and `down` can end it."""

    scratch: str  # short, because Unix sockets lie in it and their paths end at 107 characters
    network: str  # this cluster's own loopback network: nodes differ by address, as on real machines
    ports: dict[str, int]
    workers: int
    cpus: int
    processes: dict[str, dict[str, float]] = field(default_factory=dict)  # name -> pid and its start time

    @property
    def nodes(self) -> list[str]:
        return ["head", *(f"worker-{index}" for index in range(1, self.workers + 1))]

    def address(self, node: str) -> str:
        return f"{self.network}.{1 + self.nodes.index(node)}"

    def process(self, name: str) -> psutil.Process | None:
        """The process of that name if it still runs; a recycled process id is not mistaken for it."""
        record = self.processes.get(name)
        try:
            process = psutil.Process(int(record["pid"])) if record else None
        except psutil.NoSuchProcess:
            return None
        if process is None or record is None or abs(process.create_time() - record["created"]) > 1:
            return None
        return None if process.status() == psutil.STATUS_ZOMBIE else process


class Cluster:
    """The processes of one cluster; `folder` holds its state, its token, its environment file and its logs."""

    def __init__(self, folder: Path = FOLDER) -> None:
        self.folder = folder.absolute()

    # ---------------------------------------------------------------- start

    def up(self, workers: int = 2, cpus: int = 2) -> State:
        """Start what does not run yet; return when all of it answers."""
        if not sys.platform.startswith("linux"):
            raise ValueError("A cluster of several Ray nodes on one machine needs Linux; elsewhere use `make demo`.")
        state = self.load() or self.create(workers, cpus)
        scratch = Path(state.scratch)
        environment = os.environ | ENVIRONMENT | self.environment(state)
        # Jobs say `python`, and mean the one that this cluster runs on.
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
        host, ports = state.address("head"), state.ports
        environment["DASHBOARD_METRIC_PORT"] = str(ports["dashboard-metrics"])  # it has no option

        self.start(state, "s3", [sys.executable, "-m", "moto.server", "-H", host, "-p", str(ports["s3"])], environment)
        database = self.start_postgresql(state, environment)
        _wait(state, "s3", lambda: answers(f"http://{host}:{ports['s3']}/moto-api/", "Moto"), self.log("s3"))
        self.create_bucket(state)

        mlflow = [sys.executable, "-m", "mlflow", "server", "--host", host, "--port", str(ports["mlflow"])]
        # It answers only to the name it is called by, so that no web page can reach it through a browser.
        mlflow += ["--allowed-hosts", f"{host}:{ports['mlflow']}"]
        mlflow += ["--workers", "1", "--backend-store-uri", database]
        mlflow += ["--artifacts-destination", f"s3://{BUCKET}/mlflow"]
        self.start(state, "mlflow", mlflow, environment)

        ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
        ray += [f"--num-cpus={state.cpus}", f"--object-store-memory={OBJECT_STORE_BYTES}"]
        gcs = f"{host}:{ports['gcs']}"
        head_is_new = state.process("head") is None
        if head_is_new:
            # Nodes belong to the head that they joined; a new one starts with none.
            joined = (state.process(node) for node in state.nodes[1:])
            end_processes([process for process in joined if process is not None], signal.SIGKILL)
        commands = {}
        for node in state.nodes:
            arguments = [f"--node-ip-address={state.address(node)}", f"--temp-dir={scratch / node}"]
            arguments += [f"--node-name={node}"]
            arguments += [f"--{option}={ports[f'{node} {name}']}" for name, option in NODE_PORTS.items()]
            if node == "head":
                arguments += ["--head", f"--dashboard-host={host}"]
                arguments += [f"--{option}={ports[name]}" for name, option in HEAD_PORTS.items()]
            else:
                arguments += [f"--address={gcs}"]
            commands[node] = [*ray, *arguments]
        self.start_node(state, "head", commands["head"], environment)
        for node in state.nodes:
            self.start(state, node, commands[node], environment)
        for node in state.nodes:
            self.start_node(state, node, commands[node], environment)
        _wait(
            state,
            "mlflow",
            lambda: answers(f"http://{host}:{ports['mlflow']}/health", "OK"),
            self.log("mlflow"),
        )
        if head_is_new:
            _wait(state, "head", lambda: self.has_run_a_job(state), self.log("head"))
        return state

    def create(self, workers: int, cpus: int) -> State:
        """Choose addresses, ports and keys; the files that hold keys can be read by nobody else."""
        self.folder.mkdir(parents=True, exist_ok=True)
        network = f"127.{secrets.randbelow(200) + 20}.{secrets.randbelow(250) + 1}"
        state = State(tempfile.mkdtemp(prefix="gpt-"), network, {}, workers, cpus)
        names = ["s3", "mlflow", "dashboard-metrics", *HEAD_PORTS]
        state.ports = _free_ports([*names, *(f"{node} {name}" for node in state.nodes for name in NODE_PORTS)])
        os.chmod(state.scratch, 0o711)  # PostgreSQL's user passes through it to its own folder
        keys = {"AWS_ACCESS_KEY_ID": secrets.token_hex(10), "AWS_SECRET_ACCESS_KEY": secrets.token_urlsafe(30)}
        _write_private(self.folder / "token", secrets.token_hex(32))
        _write_private(self.folder / "keys.json", json.dumps(keys))
        lines = [f"export {name}={shlex.quote(value)}\n" for name, value in self.environment(state).items()]
        _write_private(self.folder / "environment", "".join(lines))
        self.save(state)
        return state

    def environment(self, state: State) -> dict[str, str]:
        """The addresses and keys that jobs and people need: what Secrets and ConfigMaps hold on Kubernetes."""
        host, ports = state.address("head"), state.ports
        found = {
            "RAY_API_SERVER_ADDRESS": f"http://{host}:{ports['dashboard']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.folder / "token"),
            "MLFLOW_TRACKING_URI": f"http://{host}:{ports['mlflow']}",
            "AWS_ENDPOINT_URL": f"http://{host}:{ports['s3']}",
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            **json.loads((self.folder / "keys.json").read_text()),
        }
        go_direct(found["RAY_API_SERVER_ADDRESS"])
        return found | {name: os.environ[name] for name in ("no_proxy", "NO_PROXY")}

    def start(
        self, state: State, name: str, command: Sequence[str], environment: dict[str, str], user: str | None = None
    ) -> None:
        """Start one process in a session of its own and note its id, unless it runs already."""
        if state.process(name) is not None:
            return
        print(f"starting {name}", flush=True)
        folder = Path(state.scratch) / name
        folder.mkdir(exist_ok=True)
        log = self.log(name)
        log.parent.mkdir(exist_ok=True)
        with open(log, "ab") as output:
            process = subprocess.Popen(
                command,
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                user=user,
            )
        state.processes[name] = {"pid": process.pid, "created": psutil.Process(process.pid).create_time()}
        self.save(state)

    def start_node(self, state: State, node: str, command: Sequence[str], environment: dict[str, str]) -> None:
        """Start a Ray node and wait until it is up.

        Ray gives a node 30 s to start and then ends it; on a busy machine the second attempt finds it warm.
        """
        for attempt in range(1, NODE_ATTEMPTS + 1):
            self.start(state, node, command, environment)
            try:
                _wait(state, node, lambda: self.is_node_up(state, node), self.log(node))
                return
            except ChildProcessError:
                if attempt == NODE_ATTEMPTS:
                    raise

    def start_postgresql(self, state: State, environment: dict[str, str]) -> str:
        """Start PostgreSQL on a Unix socket only and return its URL for MLflow."""
        binaries = _postgresql_binaries()
        # It refuses to run as root, so root hands it to the user that Debian's package made.
        user = "postgres" if os.geteuid() == 0 else None
        data = Path(state.scratch) / "postgresql"
        if not data.exists():
            data.mkdir(mode=0o700)
            if user is not None:
                shutil.chown(data, user, user)
            initialise = [f"{binaries}/initdb", "--pgdata", str(data / "data"), "--username=mlflow", "--auth=trust"]
            initialise += ["--encoding=UTF8", "--no-locale", "--no-sync"]
            done = subprocess.run(initialise, user=user, capture_output=True, text=True, check=False, cwd=data)
            if done.returncode != 0:
                raise ValueError(f"initdb failed: {done.stderr.strip().splitlines()[-1]}")
        # Whoever may open the socket may log in; only the owner of the folder may.
        server = [f"{binaries}/postgres", "-D", str(data / "data"), "-k", str(data), "-c", "listen_addresses="]
        self.start(state, "postgresql", [*server, "-c", "fsync=off"], environment, user)
        psql = [f"{binaries}/psql", "--no-psqlrc", "-h", str(data), "-U", "mlflow", "-d", "postgres", "-Atc"]

        def database_there() -> bool:
            query = "SELECT 1 FROM pg_database WHERE datname = 'mlflow'"
            found = subprocess.run([*psql, query], capture_output=True, text=True, check=False)
            if found.returncode == 0 and not found.stdout.strip():
                found = subprocess.run([*psql, "CREATE DATABASE mlflow"], capture_output=True, text=True, check=False)
            return found.returncode == 0

        _wait(state, "postgresql", database_there, self.log("postgresql"))
        return f"postgresql+psycopg2://mlflow@/mlflow?host={data}"

    def create_bucket(self, state: State) -> None:
        import boto3

        names = {"AWS_ACCESS_KEY_ID": "aws_access_key_id", "AWS_SECRET_ACCESS_KEY": "aws_secret_access_key"}
        environment = self.environment(state)
        keys = {argument: environment[name] for name, argument in names.items()}
        client = boto3.client("s3", endpoint_url=environment["AWS_ENDPOINT_URL"], region_name="us-east-1", **keys)
        client.create_bucket(Bucket=BUCKET)

    def is_node_up(self, state: State, node: str) -> bool:
        """Whether the head knows the node, and the node's agent answers: the head's agent is who starts jobs."""
        return state.address(node) in self.alive_addresses(state) and self.agent_answers(state, node)

    def agent_answers(self, state: State, node: str) -> bool:
        port = state.ports[f"{node} agent"]
        return answers(f"http://{state.address(node)}:{port}/api/local_raylet_healthz", "success")

    def alive_addresses(self, state: State) -> set[str]:
        """The addresses of the nodes that the head believes alive; none while it does not answer."""
        try:
            summary = self.ask_head(state, "/nodes?view=summary")["data"]["summary"]
        except (OSError, ValueError, KeyError):
            return set()
        raylets = [node.get("raylet", {}) for node in summary]
        return {raylet["nodeManagerAddress"] for raylet in raylets if raylet.get("state") == "ALIVE"}

    def has_run_a_job(self, state: State) -> bool:
        """Whether the head runs jobs, tried with one that does nothing: it answers a while before it can."""
        job = "cluster-check"
        try:
            known = [each for each in self.ask_head(state, "/api/jobs/") if each["submission_id"] == job]
            if not known:
                self.ask_head(state, "/api/jobs/", "POST", {"entrypoint": "true", "submission_id": job})
            elif known[0]["status"] == "FAILED":
                self.ask_head(state, f"/api/jobs/{job}", "DELETE")
            else:
                return known[0]["status"] == "SUCCEEDED"
        except (OSError, ValueError, KeyError):
            pass
        return False

    def ask_head(self, state: State, path: str, method: str = "GET", body: object = None) -> Any:
        """Ask the head's dashboard with the cluster's token; raises `OSError` where it refuses or is not there."""
        token = (self.folder / "token").read_text()
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        url = self.environment(state)["RAY_API_SERVER_ADDRESS"] + path
        data = None if body is None else json.dumps(body).encode()
        with open_own(urllib.request.Request(url, data, headers, method=method), timeout=30) as answer:
            return json.load(answer)

    # ---------------------------------------------------------------- end

    def down(self) -> list[str]:
        """End every process that `up` started, with its children, and no other; return their names."""
        state = self.load()
        if state is None:
            return []
        running = {name: process for name in state.processes if (process := state.process(name)) is not None}
        # PostgreSQL last, and with SIGINT: it closes what MLflow has open and writes its files.
        database = running.pop("postgresql", None)
        end_processes(running.values())
        if database is not None:
            end_processes([database], signal.SIGINT)
            running["postgresql"] = database
        for orphan in processes_below(Path(state.scratch)):
            end_processes([orphan], signal.SIGKILL)
        shutil.rmtree(state.scratch, ignore_errors=True)
        for name in ("cluster.json", "token", "keys.json", "environment"):
            (self.folder / name).unlink(missing_ok=True)
        return list(running)

    def kill(self, name: str) -> None:
        """Kill one member without a warning, as a lost machine would go; `up` starts it again."""
        state = self.load()
        process = state.process(name) if state else None
        if process is None:
            raise ValueError(f"{name!r} does not run in the cluster of {self.folder}; see `status`.")
        end_processes([process], signal.SIGKILL)

    # ---------------------------------------------------------------- files

    def log(self, name: str) -> Path:
        return self.folder / "logs" / f"{name}.log"

    def load(self) -> State | None:
        try:
            return State(**json.loads((self.folder / "cluster.json").read_text()))
        except FileNotFoundError:
            return None

    def save(self, state: State) -> None:
        _write_private(self.folder / "cluster.json", json.dumps(asdict(state), indent=1))

    def condition(self, state: State, name: str) -> str:
        if state.process(name) is None:
            return "DEAD: `make cluster` starts it again"
        if name in state.nodes and not self.agent_answers(state, name):
            return f"runs, but its agent does not answer and starts no jobs: see {self.log(name)}, then kill it here"
        return "runs"

    def describe(self, state: State) -> str:
        environment = self.environment(state)
        lines = [f"{name:<12} {self.condition(state, name)}" for name in state.processes]
        try:
            shown: Path = self.folder.relative_to(Path.cwd())
        except ValueError:
            shown = self.folder
        lines += [
            "",
            f"dashboard    {environment['RAY_API_SERVER_ADDRESS']} (token: {shown / 'token'})",
            f"MLflow       {environment['MLFLOW_TRACKING_URI']}",
            f"S3           {environment['AWS_ENDPOINT_URL']} (bucket {BUCKET})",
            "",
            f"submit       make submit PRESET=demo SET=storage=s3://{BUCKET}/artifacts",
            f"a shell      source {shown / 'environment'}",
        ]
        return "\n".join(lines)


def _wait(state: State, name: str, ready: Callable[[], bool], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not ready():
        if state.process(name) is None:
            raise ChildProcessError(f"{name} ended while it was starting; the last lines of {log}:\n{_tail(log)}")
        if time.monotonic() > deadline:
            raise ValueError(f"{name} did not answer in {START_SECONDS} s; see {log}, then try `make cluster` again.")
        time.sleep(0.3)


def _tail(log: Path, lines: int = 5) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def _free_ports(names: Sequence[str]) -> dict[str, int]:
    """Choose a free port for each name, between those of Ray's workers and those of outgoing connections (32768)."""
    sockets: list[socket.socket] = []  # held together, so that they differ
    while len(sockets) < len(names):
        with contextlib.suppress(OSError):  # somebody has it
            sockets.append(socket.create_server(("", 20_000 + secrets.randbelow(12_000))))
    ports = {name: each.getsockname()[1] for name, each in zip(names, sockets, strict=True)}
    for each in sockets:
        each.close()
    return ports


def _postgresql_binaries() -> Path:
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: int(path.parts[-3]))
    found = [str(path) for path in installed] + [shutil.which("postgres") or ""]
    for path in reversed(found):
        if path and Path(path).resolve().with_name("initdb").exists():
            return Path(path).resolve().parent
    raise ValueError("PostgreSQL is not installed; on Debian and Ubuntu: apt-get install postgresql.")


def _write_private(path: Path, content: str) -> None:
    temporary = path.with_suffix(".new")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(descriptor, "w", encoding="utf-8") as file:
        file.write(content)
    os.replace(temporary, path)


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__)
    parser.add_argument("action", choices=("up", "down", "status", "kill"))
    parser.add_argument("member", nargs="?", help="for kill: head, worker-1, worker-2, mlflow, s3 or postgresql")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where its state and logs lie [%(default)s]")
    parser.add_argument("--workers", type=int, default=2, help="Ray nodes beside the head [%(default)s]")
    parser.add_argument("--cpus", type=int, default=2, help="logical CPUs of each node [%(default)s]")
    options = parser.parse_args(argv)
    cluster = Cluster(options.folder)
    try:
        if options.action == "up":
            print(f"\n{cluster.describe(cluster.up(options.workers, options.cpus))}")
        elif options.action == "down":
            print(f"ended: {', '.join(cluster.down()) or 'nothing was running'}")
        elif options.action == "kill":
            cluster.kill(options.member or "")
            print(f"killed {options.member}; `make cluster` starts it again")
        else:
            state = cluster.load()
            print(cluster.describe(state) if state else "No cluster runs here; `make cluster` starts one.")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
