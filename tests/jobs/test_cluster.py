import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from jobs import cluster
from jobs.cluster import Cluster


@pytest.fixture
def sleeper():
    """A process that has a child of its own."""
    code = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)']);"
    process = subprocess.Popen([sys.executable, "-c", code + "print('up', flush=True); time.sleep(300)"], stdout=-1)
    assert process.stdout is not None
    process.stdout.readline()
    found = psutil.Process(process.pid)
    children = found.children()
    yield found
    process.kill()
    for child in children:  # else it holds the pipe open for five minutes
        if child.is_running():
            child.kill()
    process.communicate()


def test_its_files_are_private_and_its_ports_its_own(tmp_path: Path) -> None:
    one, two = Cluster(tmp_path / "one"), Cluster(tmp_path / "two")
    states = [one.create(workers=2, cpus=2)]
    taken = [socket.create_server(("", port)) for port in states[0].ports.values()]  # as while it runs
    states.append(two.create(workers=2, cpus=2))
    for each in taken:
        each.close()
    for name in ("token", "keys.json", "environment", "cluster.json"):
        assert stat.S_IMODE((tmp_path / "one" / name).stat().st_mode) == 0o600, name
    assert not set(states[0].ports.values()) & set(states[1].ports.values())
    assert states[0].network != states[1].network
    assert len({states[0].address(node) for node in states[0].nodes}) == 3
    assert (tmp_path / "one/token").read_text() != (tmp_path / "two/token").read_text()
    assert one.load() == states[0]
    for cluster_ in (one, two):
        assert cluster_.down() == []
    assert one.load() is None
    assert not Path(states[0].scratch).exists()


def test_each_node_has_a_port_of_its_own_for_all_that_ray_listens_on(tmp_path: Path) -> None:
    from ray.scripts.scripts import start

    known = {name.removeprefix("--") for option in start.params for name in option.opts if "port" in name}
    # Ray looks for free ones for its workers, and there is no Redis.
    by_itself = {"min-worker-port", "max-worker-port", "worker-port-list", "redis-shard-ports"}
    assert known - by_itself == {*cluster.HEAD_PORTS.values(), *cluster.NODE_PORTS.values()}
    own = Cluster(tmp_path)
    ports = own.create(workers=2, cpus=1).ports
    assert len(set(ports.values())) == len(ports)
    assert {f"{node} {name}" for node in ("head", "worker-1", "worker-2") for name in cluster.NODE_PORTS} <= set(ports)
    own.down()


def test_a_node_that_runs_and_starts_no_jobs_is_told_from_one_that_does(
    tmp_path: Path, sleeper: psutil.Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Cluster(tmp_path)
    state = own.create(workers=1, cpus=1)
    assert own.condition(state, "head").startswith("DEAD")
    state.processes["head"] = {"pid": sleeper.pid, "created": sleeper.create_time()}
    assert own.condition(state, "head").startswith("runs, but its agent does not answer and starts no jobs")
    monkeypatch.setattr(cluster, "answers", lambda url, words: f":{state.ports['head agent']}/" in url)
    assert own.condition(state, "head") == "runs"
    own.down()


def test_a_node_that_has_just_come_back_counts_before_it_has_told_of_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Cluster(tmp_path)
    state = own.create(workers=1, cpus=1)
    summary = [
        {"ip": "127.0.0.1", "raylet": {"state": "ALIVE", "nodeManagerAddress": "127.0.0.1"}},
        {"ip": "127.0.0.2", "raylet": {"state": "DEAD", "nodeManagerAddress": ""}},
        {"raylet": {"state": "ALIVE", "nodeManagerAddress": "127.0.0.2"}},
        {"ip": "127.0.0.3"},
    ]
    monkeypatch.setattr(own, "ask_head", lambda state, path: {"data": {"summary": summary}})
    assert own.alive_addresses(state) == {"127.0.0.1", "127.0.0.2"}
    own.down()


def test_the_environment_file_is_what_a_shell_reads(tmp_path: Path) -> None:
    own = Cluster(tmp_path)
    state = own.create(workers=1, cpus=1)
    command = f". {tmp_path}/environment && env"
    shown = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True).stdout
    for name, value in own.environment(state).items():
        assert f"{name}={value}" in shown.splitlines()
    own.down()


def test_a_process_is_ended_with_its_children_and_no_other(tmp_path: Path, sleeper: psutil.Process) -> None:
    own = Cluster(tmp_path)
    state = own.create(workers=1, cpus=1)
    child = sleeper.children()[0]
    state.processes["s3"] = {"pid": sleeper.pid, "created": sleeper.create_time()}
    # A process id that another process has by now: the cluster started its own long before that one.
    state.processes["mlflow"] = {"pid": os.getpid(), "created": psutil.Process().create_time() - 100}
    own.save(state)
    assert own.down() == ["s3"]
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
    assert psutil.pid_exists(os.getpid())


def test_what_does_not_run_cannot_be_killed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cluster.main(["kill", "worker-1", "--folder", str(tmp_path)]) == 2
    assert "'worker-1' does not run" in capsys.readouterr().err


def test_without_a_cluster_status_and_down_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cluster.main(["status", "--folder", str(tmp_path)]) == 0
    assert cluster.main(["down", "--folder", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "No cluster runs here; `make cluster` starts one.\nended: nothing was running\n"


def test_without_postgresql_it_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter(()))
    with pytest.raises(ValueError, match="apt-get install postgresql"):
        cluster._postgresql_binaries()


def test_a_server_that_dies_while_starting_is_told_with_its_last_words(tmp_path: Path) -> None:
    own = Cluster(tmp_path)
    state = own.create(workers=1, cpus=1)
    own.start(state, "s3", [sys.executable, "-c", "raise SystemExit('no room')"], dict(os.environ))
    with pytest.raises(ChildProcessError, match=r"(?s)s3 ended while it was starting.*no room"):
        cluster._wait(state, "s3", lambda: False, own.log("s3"))
    own.down()
