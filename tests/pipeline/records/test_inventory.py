"""What lies under a root is found, with what it came from and what needs it; nothing that is not ours is touched."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.artifacts import filesystem_of
from pipeline.records.inventory import Registered, bytes_freed, describe_age, describe_bytes, take_inventory
from tests.pipeline.records.tiny_store import fill_store, put
from tests.s3_server import s3_server


@pytest.fixture(scope="module")
def s3_storage() -> Iterator[str]:
    with s3_server():
        filesystem_of("s3://store")[0].mkdir("store")
        yield "s3://store/root"


@pytest.fixture(params=["local", "s3"])
def any_storage(request: pytest.FixtureRequest, storage: str) -> str:
    return storage if request.param == "local" else request.getfixturevalue("s3_storage")


def test_every_artifact_is_listed_with_what_needs_it(any_storage: str) -> None:
    store = fill_store(any_storage)
    registered = [
        Registered("novel version 1 (champion)", frozenset({f"novel/train-{store['train'].fingerprint}"}), frozenset())
    ]
    found = {each.stage: each for each in take_inventory(any_storage, registered).stored}
    needs = take_inventory(any_storage, registered).needs
    assert set(found) == {"tokenizer", "prepare", "train", "evaluate"}
    assert needs[found["train"].url] == ["novel version 1 (champion)", found["evaluate"].folder]
    assert needs[found["tokenizer"].url] == [found[stage].folder for stage in ("prepare", "train", "evaluate")]
    assert needs[found["evaluate"].url] == []
    assert found["train"].bytes > 1000
    assert found["train"].run_id == "a" * 32
    assert found["train"].inputs["prepare"] == found["prepare"].fingerprint
    assert 0 <= found["train"].age_days() < 1


def test_a_half_written_and_a_damaged_artifact_are_told_apart(storage: str) -> None:
    store = fill_store(storage)
    put(storage, "novel", "train", "b" * 20, done=False)
    Path(store["evaluate"].path, "manifest.json").write_text("{half")
    states = {each.folder: each.state for each in take_inventory(storage).stored}
    assert states[f"train-{'b' * 20}"] == "unfinished"
    assert states[f"evaluate-{store['evaluate'].fingerprint}"] == "damaged"
    assert states[f"train-{store['train'].fingerprint}"] == "done"


def test_what_is_not_ours_is_no_artifact(storage: str) -> None:
    fill_store(storage)
    root = Path(storage)
    (root / "novel" / "notes").mkdir()
    (root / "novel" / "notes" / "diary.txt").write_text("mine")
    (root / "mlflow" / "1").mkdir(parents=True)
    (root / "mlflow" / "1" / "model").write_bytes(b"x" * 10)
    elsewhere = root.parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("not here")
    (root / "novel" / f"train-{'c' * 20}").symlink_to(elsewhere)
    inventory = take_inventory(storage)
    assert len(inventory.stored) == 4
    assert inventory.others["mlflow"] == 10
    assert inventory.others["novel"] >= 4


def test_a_file_with_two_names_is_freed_with_the_last(storage: str) -> None:
    store = fill_store(storage)
    weights = Path(store["train"].path, "checkpoint/model.safetensors")
    before = {each.stage: each for each in take_inventory(storage).stored}["train"]
    os.link(weights, Path(storage) / "a-second-name")
    after = {each.stage: each for each in take_inventory(storage).stored}["train"]
    assert bytes_freed([before]) - bytes_freed([after]) == weights.stat().st_size


def test_an_artifact_is_found_by_the_beginning_of_its_name(storage: str) -> None:
    store = fill_store(storage)
    inventory = take_inventory(storage)
    assert inventory.find(store["train"].url).stage == "train"
    assert inventory.find(f"train-{store['train'].fingerprint[:6]}").stage == "train"
    with pytest.raises(ValueError, match="holds no artifact 'trane'"):
        inventory.find("trane")
    put(storage, "poem", "train", store["train"].fingerprint)
    inventory = take_inventory(storage)
    with pytest.raises(ValueError, match=r"can be any of novel/train-.*, poem/train-"):
        inventory.find("train-")


def test_a_pipelines_name_leads_nowhere_else(storage: str) -> None:
    fill_store(storage)
    for name in ("..", "novel/../..", "."):
        with pytest.raises(ValueError, match="is no name of a pipeline"):
            take_inventory(storage, pipeline=name)


def test_a_root_that_is_not_there_is_said(storage: str) -> None:
    with pytest.raises(ValueError, match="There is no folder"):
        take_inventory(f"{storage}/nowhere")


def test_sizes_and_ages_are_short() -> None:
    assert [describe_bytes(size) for size in (0, 999, 1500, 2.5e9)] == ["0 B", "999 B", "1.5 kB", "2.5 GB"]
    assert [describe_age(days) for days in (40, 0.5, 0.01)] == ["40 d", "12 h", "14 min"]
