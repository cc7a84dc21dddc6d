"""Versions that change: how one takes over from another, and which do not."""

import threading
from typing import Any

import httpx
import mlflow
import pytest

from pipeline import registry
from pipeline.serving import versions
from tests.pipeline.serving.asking import CLIENT, LONG, Start, post, slow_down, until
from tests.pipeline.tiny_registry import TinyRegistry, make_registry


@pytest.fixture(scope="module")
def moving(tmp_path_factory: pytest.TempPathFactory) -> TinyRegistry:
    """A registry with two good versions, and a third whose figures are not those of its weights."""
    registry = make_registry(tmp_path_factory.mktemp("moving"))
    registry.add_version(seed=1, alias="champion")
    registry.add_version(seed=2)
    registry.add_version(seed=3, probe_shift=1.0)
    return registry


def test_champion_moves_under_load_and_drops_nothing(start: Start, moving: TinyRegistry) -> None:
    moving.move_alias("star", "1")
    server = start(moving, versions=["star"], watch_seconds=0.2)
    slow_down(server, 0.005)
    answers: list[httpx.Response] = []
    ends = threading.Event()

    def ask() -> None:
        while not ends.is_set():
            answers.append(post(server, LONG | {"seed": 1}))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        until(lambda: len(answers) > 2)
        moving.move_alias("star", "2")
        until(lambda: answers[-1].headers.get("x-model-version") == "2", seconds=30)
    finally:
        ends.set()
        for thread in threads:
            thread.join(20)
    assert {answer.status_code for answer in answers} == {200}
    texts = {(each.headers["x-model-version"], each.json()["choices"][0]["text"]) for each in answers}
    assert sorted(version for version, _ in texts) == ["1", "2"]  # each version has one answer to one seed
    assert len(server.models.versions) == 1


def test_version_that_fails_its_probe_does_not_take_over(start: Start, moving: TinyRegistry) -> None:
    moving.move_alias("star", "1")
    server = start(moving, versions=["star"])
    seat = server.models._seats["star"]
    moving.move_alias("star", "3")
    server.call(server.models.follow(seat))
    assert post(server, {"prompt": "x"}).headers["x-model-version"] == "1"
    listed = CLIENT.get(f"{server.url}/v1/models").json()["data"]
    assert "Version 3 did not take over" in listed[0]["last_swap_error"]
    assert "the registry says" in listed[0]["last_swap_error"]
    moving.move_alias("star", "2")
    server.call(server.models.follow(seat))
    assert post(server, {"prompt": "x"}).headers["x-model-version"] == "2"
    assert CLIENT.get(f"{server.url}/v1/models").json()["data"][0]["last_swap_error"] is None


@pytest.mark.parametrize("broken", ["download", "read"])
def test_a_version_that_could_not_be_fetched_is_tried_again(
    start: Start, moving: TinyRegistry, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    moving.move_alias("star", "1")
    server = start(moving, versions=["star"])
    seat = server.models._seats["star"]
    moving.move_alias("star", "2")
    whole, calls = getattr(registry, broken), []

    def break_twice(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) <= 2:
            raise ConnectionError("the connection was reset")
        return whole(*arguments)

    monkeypatch.setattr(registry, broken, break_twice)
    server.call(server.models.follow(seat))
    assert "reset" in (seat.swap_error or "")
    assert "next attempt in" in (seat.swap_error or "")
    server.call(server.models.follow(seat))
    assert len(calls) == 1, "not before its time"

    def took_over() -> bool:
        seat.retry_at = 0.0  # its time has come
        server.call(server.models.follow(seat))
        return seat.version.record.version == "2"

    until(took_over)
    assert len(calls) == 3
    assert seat.swap_error is None
    assert post(server, {"prompt": "x"}).headers["x-model-version"] == "2"


def test_retries_come_ever_more_seldom() -> None:
    waits = [versions.retry_seconds(failures) for failures in range(1, 12)]
    assert waits[0] == versions.RETRY_SECONDS
    assert waits == sorted(waits)
    assert waits[-1] == versions.LONGEST_RETRY_SECONDS


def test_a_refused_version_is_not_tried_again(
    start: Start, moving: TinyRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    moving.move_alias("star", "1")
    server = start(moving, versions=["star"])
    seat = server.models._seats["star"]
    moving.move_alias("star", "3")
    server.call(server.models.follow(seat))
    monkeypatch.setattr(registry, "download", lambda *_: pytest.fail("its figures will not change"))
    monkeypatch.setattr(versions, "RETRY_SECONDS", 0.0)
    server.call(server.models.follow(seat))


def test_why_a_version_serves_and_what_was_refused_are_listed(start: Start, moving: TinyRegistry) -> None:
    moving.move_alias("star", "1")
    server = start(moving, versions=["star"])
    client = mlflow.MlflowClient(tracking_uri=moving.tracking_uri)
    client.set_model_version_tag(moving.name, "1", registry.GATE_TAG, "against version 0: better")
    client.set_model_version_tag(moving.name, "1", registry.REFUSED_TAG, "version 2: worse")
    server.call(server.models.follow(server.models._seats["star"]))
    listed = CLIENT.get(f"{server.url}/v1/models").json()["data"]
    assert {each["gate_reason"] for each in listed} == {"against version 0: better"}
    assert {each["refused_challenger"] for each in listed} == {"version 2: worse"}


def test_no_such_version_is_one_sentence(start: Start, tiny_registry: TinyRegistry) -> None:
    with pytest.raises(ValueError, match="has no version '77'; its versions are"):
        start(versions=["77"])
    with pytest.raises(ValueError, match="has no alias 'nobody'"):
        start(versions=["nobody"])
