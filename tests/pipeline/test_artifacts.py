import json
import os
import pickle
from pathlib import Path

import pytest

from pipeline.artifacts import Artifact, Recipe, artifact_at, resolve_storage


def commit(artifact: Artifact, **files: str) -> None:
    records = {name: artifact.write_text(name, text) for name, text in files.items()}
    artifact.commit({"tokens": 5}, records)


@pytest.fixture
def artifact(storage) -> Artifact:
    recipe = Recipe(2, {"steps": 3}, {"tokenizer": "t" * 20})
    return artifact_at(storage, "tiny", "prepare", recipe.fingerprint("prepare"), recipe=recipe)


def test_an_artifact_is_done_only_after_its_manifest(artifact):
    artifact.write_text("a.txt", "hello")
    assert not artifact.is_done
    commit(artifact)
    assert artifact.is_done


def test_what_was_written_downloads_unchanged(artifact, tmp_path):
    commit(artifact, **{"train/a.txt": "hello"})
    assert (artifact.download(tmp_path / "copy") / "train" / "a.txt").read_text() == "hello"


def test_a_damaged_file_is_named_with_both_digests(artifact, tmp_path):
    commit(artifact, **{"a.txt": "hello"})
    artifact.write_text("a.txt", "jello")
    with pytest.raises(ValueError, match=r"a\.txt is damaged: its digest is \w+… \(5 bytes\), its manifest says"):
        artifact.download(tmp_path / "copy")


def test_a_missing_file_is_named(artifact, tmp_path):
    commit(artifact, **{"a.txt": "hello"})
    artifact.filesystem.rm(artifact.file("a.txt"))
    with pytest.raises(ValueError, match=r"a\.txt is missing from"):
        artifact.download(tmp_path / "copy")


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../b", "~/x", "", "a//b", "c:/x", "a\\..\\b"])
def test_a_file_name_that_leaves_the_folder_is_refused(artifact, name):
    commit(artifact)
    facts = json.loads(artifact.read_text("manifest.json"))
    facts["files"][name] = {"bytes": 1, "sha256": "0"}
    artifact.write_text("manifest.json", json.dumps(facts))
    with pytest.raises(ValueError, match="outside of itself"):
        artifact.manifest()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"files": {}}', '{"files": 3}'])
def test_a_damaged_manifest_is_one_sentence(artifact, text):
    artifact.write_text("manifest.json", text)
    with pytest.raises(ValueError, match="is damaged"):
        artifact.manifest()


def test_the_manifest_of_another_config_is_not_taken_for_ours(artifact):
    commit(artifact)
    other = Artifact(url=artifact.url, stage="prepare", fingerprint="0" * 20)
    with pytest.raises(ValueError, match="made with other settings"):
        other.manifest()


def test_a_manifest_says_what_the_artifact_was_made_from(artifact):
    commit(artifact)
    manifest = artifact.manifest()
    assert (manifest.format_version, manifest.settings, manifest.inputs, manifest.counts) == (
        2,
        {"steps": 3},
        {"tokenizer": "t" * 20},
        {"tokens": 5},
    )


def test_a_fingerprint_follows_settings_inputs_and_format_and_nothing_else():
    base = Recipe(1, {"a": 1, "b": [2]}, {"prepare": "x"}).fingerprint("train")
    assert base == Recipe(1, {"b": (2,), "a": 1}, {"prepare": "x"}).fingerprint("train")
    changed = {
        Recipe(1, {"a": 1, "b": [2]}, {"prepare": "x"}).fingerprint("evaluate"),
        Recipe(2, {"a": 1, "b": [2]}, {"prepare": "x"}).fingerprint("train"),
        Recipe(1, {"a": 2, "b": [2]}, {"prepare": "x"}).fingerprint("train"),
        Recipe(1, {"a": 1, "b": [2]}, {"prepare": "y"}).fingerprint("train"),
    }
    assert len(changed | {base}) == 5


def test_a_fingerprint_is_what_it_always_was():
    """Artifacts that people have are found by it."""
    recipe = Recipe(1, {"kind": "bpe", "sizes": [1, 2.5], "naïve": None}, {"source": "0" * 20})
    assert recipe.fingerprint("tokenizer") == "c2d6ee69744d8db7261b"


def test_a_folder_uploads_with_records_of_its_bytes(artifact, tmp_path):
    folder = tmp_path / "checkpoint"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "a.bin").write_bytes(b"12345")
    assert artifact.upload(folder, "checkpoint")["checkpoint/deep/a.bin"].bytes == 5
    assert artifact.list_files() == {"checkpoint/deep/a.bin": 5}


def test_deleting_leaves_nothing(artifact):
    commit(artifact, **{"a.txt": "hello"})
    artifact.delete()
    assert not artifact.is_done
    assert artifact.list_files() == {}


def test_an_artifact_travels_to_a_worker(artifact):
    arrived = pickle.loads(pickle.dumps(artifact))
    assert arrived == artifact
    assert arrived.recipe == artifact.recipe


def test_other_storage_is_refused_in_one_sentence():
    with pytest.raises(ValueError, match="Storage on ftp:// is not supported"):
        artifact_at("ftp://host/x", "tiny", "prepare", "0" * 20).manifest()


def test_a_tilde_is_the_home_folder_or_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_storage("~/st") == str(tmp_path / "st")
    with pytest.raises(ValueError, match="'~nosuchuser/st' names the home folder of a user"):
        resolve_storage("~nosuchuser/st")


def test_a_kept_file_is_a_second_name_of_the_first_and_no_copy(artifact, tmp_path):
    first = tmp_path / "weights"
    first.write_text("hello")
    assert artifact.keep_file("w/weights", first).bytes == 5
    assert artifact.keep_file("w/weights", first).bytes == 5  # again, onto itself
    assert first.samefile(artifact.file("w/weights"))
    assert [path.name for path in Path(artifact.path, "w").iterdir()] == ["weights"]


def test_a_file_of_another_disk_is_copied(artifact, tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "weights").write_text("hello")
    artifact.keep_file("weights", tmp_path / "weights")
    assert artifact.read_text("weights") == "hello"
    assert not (tmp_path / "weights").samefile(artifact.file("weights"))
