import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import lease
from pipeline.artifacts import filesystem_of
from tests.s3_server import s3_server


@pytest.fixture(scope="module")
def s3_storage() -> Iterator[str]:
    with s3_server():
        filesystem_of("s3://leases")[0].mkdir("leases")
        yield "s3://leases/root"


@pytest.fixture(params=["local", "s3"])
def any_storage(request: pytest.FixtureRequest, storage: str) -> str:
    return storage if request.param == "local" else request.getfixturevalue("s3_storage")


def test_the_second_is_told_who_holds_the_name(any_storage: str) -> None:
    with lease.hold(any_storage, "novel", who="Ada on laptop"):
        with pytest.raises(ValueError, match=r"'novel' is being run by Ada on laptop, since 20") as told:
            lease.Lease(any_storage, "novel").acquire()
        assert "choose another name" in str(told.value)
        with lease.hold(any_storage, "poem"):
            pass
    with lease.hold(any_storage, "novel"):
        pass


def test_a_name_is_given_back_when_the_work_fails(any_storage: str) -> None:
    with pytest.raises(ZeroDivisionError), lease.hold(any_storage, "failing"):
        raise ZeroDivisionError
    with lease.hold(any_storage, "failing"):
        pass


def test_a_local_lease_dies_with_its_process(storage: str) -> None:
    script = f"from pipeline.lease import hold\nwith hold({storage!r}, 'x', 'child'): print('held'); input()"
    root = Path(__file__).parents[2]
    child = subprocess.Popen(
        [sys.executable, "-u", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match="run by child"):
        lease.Lease(storage, "x").acquire()
    child.kill()
    child.communicate()
    lease.Lease(storage, "x").acquire()


def test_a_stale_lease_is_taken_over_and_its_old_holder_learns_of_it(
    s3_storage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = lease.Lease(s3_storage, "stale", who="sleeper")
    first.acquire()
    with pytest.raises(ValueError, match="run by sleeper"):
        lease.Lease(s3_storage, "stale").acquire()
    monkeypatch.setattr(lease, "SECONDS", 0.0)
    second = lease.Lease(s3_storage, "stale", who="waker")
    second.acquire()
    first.check()  # it does not know yet
    first.renew()
    with pytest.raises(ValueError, match=r"lost the pipeline's name 'stale'.*waker"):
        first.check()
    first.release()
    assert _held_by(s3_storage, "stale") == "waker", "the loser leaves the winner's lease alone"
    second.release()


def test_of_two_that_find_the_same_stale_lease_one_wins(s3_storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    old = lease.Lease(s3_storage, "race")
    old.acquire()
    monkeypatch.setattr(lease, "SECONDS", 0.0)
    winner = lease.Lease(s3_storage, "race", who="winner")
    loser = lease.Lease(s3_storage, "race", who="loser")
    seen = loser._read()
    winner.acquire()
    # The loser acts on what it saw before the winner wrote.
    reads = iter([seen])
    monkeypatch.setattr(loser, "_read", lambda: next(reads, (winner.holder, "")))
    with pytest.raises(ValueError, match="run by winner"):
        loser.acquire()


def test_renewing_keeps_the_lease_fresh(s3_storage: str) -> None:
    held = lease.Lease(s3_storage, "fresh")
    held.acquire()
    before = _content(s3_storage, "fresh")["renewed"]
    time.sleep(0.02)
    held.renew()
    held.renew()
    assert _content(s3_storage, "fresh")["renewed"] > before
    held.release()


def test_a_ray_job_names_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    metadata = {"metadata": {"job_submission_id": "novel-pipeline-1122-225501"}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(metadata))
    assert lease.describe_this_process().startswith("job novel-pipeline-1122-225501, ")


def _content(storage: str, name: str) -> dict[str, float | str]:
    filesystem, path = filesystem_of(f"{storage}/{name}/{lease.LEASE}")
    return json.loads(filesystem.cat_file(path))


def _held_by(storage: str, name: str) -> float | str:
    return _content(storage, name)["who"]
