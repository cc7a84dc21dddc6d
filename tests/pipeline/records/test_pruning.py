"""Only what nothing needs goes, beside a running pipeline, another prune, and after one that was killed."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import lease
from pipeline.artifacts import Artifact, filesystem_of
from pipeline.records.inventory import Registered, take_inventory
from pipeline.records.pruning import Choice, Wish, choose, prune
from tests.pipeline.records.tiny_store import fill_store, put
from tests.s3_server import s3_server

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def s3_storage() -> Iterator[str]:
    with s3_server():
        filesystem_of("s3://prune")[0].mkdir("prune")
        yield "s3://prune/root"


@pytest.fixture(params=["local", "s3"])
def any_storage(request: pytest.FixtureRequest, storage: str) -> str:
    return storage if request.param == "local" else request.getfixturevalue("s3_storage")


def select(storage: str, wish: Wish, registered: list[Registered] | None = None) -> Choice:
    registered = registered or []
    return choose(take_inventory(storage, registered), registered, wish)


def names(choice: Choice) -> list[str]:
    return [each.stage for each in choice.going]


def version_of(train: Artifact) -> Registered:
    return Registered("novel version 1", frozenset({"/".join(train.url.split("/")[-2:])}), frozenset())


def test_a_chain_goes_from_its_end(any_storage: str) -> None:
    store = fill_store(any_storage, "whole")
    choice = select(any_storage, Wish(name="whole"))
    assert names(choice) == ["evaluate", "train", "prepare", "tokenizer"]
    assert all(outcome.deleted for outcome in prune(choice, list))
    assert not any(artifact.is_done or artifact.list_files() for artifact in store.values())


def test_what_the_registry_names_stays_with_all_that_it_was_made_from(any_storage: str) -> None:
    store = fill_store(any_storage, "named")
    registered = [version_of(store["train"])]
    choice = select(any_storage, Wish(name="named"), registered)
    assert names(choice) == ["evaluate"]
    assert {each.stage: needs for each, needs in choice.staying}["train"].startswith("novel version 1")
    assert [outcome.deleted for outcome in prune(choice, lambda: registered)] == [True]
    assert store["train"].is_done
    assert store["tokenizer"].is_done


def test_age_and_count_choose_together(storage: str) -> None:
    old, new = fill_store(storage, mark="1", days_old=40), fill_store(storage, mark="2")
    assert {each.url for each in select(storage, Wish(older_than_days=30)).going} == {a.url for a in old.values()}
    assert {each.url for each in select(storage, Wish(keep=1)).going} == {a.url for a in old.values()}
    assert not select(storage, Wish(keep=2)).going
    assert not select(storage, Wish(older_than_days=30, name="poem")).going
    assert not {each.url for each in select(storage, Wish(name="novel", keep=1)).going} & {a.url for a in new.values()}


def test_an_input_outlives_what_is_too_young_to_go(storage: str) -> None:
    old = fill_store(storage, days_old=40)
    put(storage, "novel", "evaluate", "f" * 20, {"train": old["train"].fingerprint})
    assert names(select(storage, Wish(older_than_days=30))) == ["evaluate"]


def test_an_unfinished_training_may_need_any_shards_of_its_name(storage: str) -> None:
    old = fill_store(storage, days_old=40)
    old["evaluate"].delete()
    put(storage, "novel", "train", "b" * 20, done=False)
    assert names(select(storage, Wish(older_than_days=30))) == ["train"]
    choice = select(storage, Wish(unfinished=True))
    assert [each.fingerprint for each in choice.going] == ["b" * 20]


def test_a_wish_says_something() -> None:
    with pytest.raises(ValueError, match="Say what may go"):
        Wish()
    with pytest.raises(ValueError, match="Say what may go"):
        Wish(training_state=True)
    for wrong in ({"older_than_days": -1.0}, {"older_than_days": float("nan")}, {"keep": -1}):
        with pytest.raises(ValueError, match="not below zero"):
            Wish(**wrong)


def test_a_running_pipeline_keeps_all_of_its_name(any_storage: str) -> None:
    running, other = fill_store(any_storage, "running"), fill_store(any_storage, "resting")
    choice = select(any_storage, Wish(name="r*ing"))
    with lease.hold(any_storage, "running", who="Ada on laptop"):
        outcomes = list(prune(choice, list))
    (refused,) = [outcome for outcome in outcomes if not outcome.deleted]
    assert "'running' is being run by Ada on laptop" in refused.why
    assert all(artifact.is_done for artifact in running.values())
    assert not any(artifact.is_done for artifact in other.values())


def test_what_was_registered_or_used_since_it_was_shown_stays(storage: str) -> None:
    store = fill_store(storage)
    choice = select(storage, Wish(name="novel"))
    later = put(storage, "novel", "register", "9" * 20, {"evaluate": store["evaluate"].fingerprint})
    again = choose(take_inventory(storage), [], choice.wish)
    assert len(again.going) == 5  # the new one matches the name too
    outcomes = list(prune(choice, lambda: [version_of(store["train"])]))
    assert [outcome.deleted for outcome in outcomes] == [False] * 4
    assert all(artifact.is_done for artifact in (*store.values(), later))


def test_only_the_training_state_of_a_finished_run_goes(storage: str) -> None:
    store = fill_store(storage)
    unfinished = put(storage, "novel", "train", "b" * 20, done=False)
    choice = select(storage, Wish(name="novel", training_state=True), [version_of(store["train"])])
    assert [each.url for each in choice.going] == [store["train"].url]
    assert choice.bytes == 2000
    assert [outcome.deleted for outcome in prune(choice, list)] == [True]
    assert store["train"].is_done
    assert store["train"].exists("checkpoint/model.safetensors")
    assert not store["train"].exists("checkpoints/step-00000003-aa/training_state.pt")
    assert unfinished.exists("checkpoints/step-00000003-aa/training_state.pt")


KILLED = """
import sys, time
from pipeline.artifacts import Artifact
from pipeline.records.inventory import take_inventory
from pipeline.records.pruning import Wish, choose, prune

storage, seconds = sys.argv[1], float(sys.argv[2])
delete = Artifact.delete

def slowly(artifact):
    artifact.filesystem.rm(artifact.file("manifest.json"))
    print("begun", artifact.stage, flush=True)
    time.sleep(seconds)
    delete(artifact)

Artifact.delete = slowly
choice = choose(take_inventory(storage), [], Wish(name="novel"))
for outcome in prune(choice, lambda: []):
    print(outcome.deleted, outcome.why, flush=True)
"""


def start_prune(storage: str, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", KILLED, storage, str(seconds)]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ, stdout=subprocess.PIPE, text=True)


def test_a_prune_that_is_killed_leaves_nothing_half_there_and_done(storage: str) -> None:
    store = fill_store(storage)
    child = start_prune(storage, 60)
    assert child.stdout is not None
    assert child.stdout.readline() == "begun evaluate\n"
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert not store["evaluate"].is_done
    assert store["train"].is_done  # what it was made from is still whole
    choice = select(storage, Wish(name="novel"))
    assert names(choice) == ["evaluate", "train", "prepare", "tokenizer"]
    assert all(outcome.deleted for outcome in prune(choice, list))


def test_of_two_prunes_at_once_the_second_is_told(storage: str) -> None:
    fill_store(storage)
    child = start_prune(storage, 1)
    assert child.stdout is not None
    assert child.stdout.readline() == "begun evaluate\n"
    (outcome,) = prune(select(storage, Wish(name="novel")), list)
    assert not outcome.deleted
    assert "is being run by a prune by" in outcome.why
    rest, _ = child.communicate(timeout=60)
    assert rest.count("True") == 4
    assert not take_inventory(storage).stored


def test_a_folder_that_somebody_removes_by_hand_meanwhile_is_gone(storage: str) -> None:
    store = fill_store(storage)
    choice = select(storage, Wish(name="novel"))
    store["evaluate"].delete()
    outcomes = {outcome.name.partition("-")[0]: outcome for outcome in prune(choice, list)}
    assert outcomes["novel/evaluate"].why == "gone already"
    assert all(outcome.deleted for outcome in outcomes.values())
