"""What comes from storage is not trusted: pickles do not run, names do not leave their folder, keys are not shown."""

import os
import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from model.checkpoint import load_model, load_training_state, save_model
from model.gpt import GPT, ModelConfig
from pipeline.artifacts import Artifact, FileRecord, Manifest, artifact_at, record_file
from pipeline.config import SourceConfig
from pipeline.corpus.files import slices
from pipeline.corpus.formats import sample_documents
from pipeline.corpus.shards import TokenCache, open_shards
from tests.infra.manifests import ROOT
from tests.mlflow_store import point_mlflow_at


class Payload:
    """What an attacker pickles: unpickled, it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    mark = tmp_path / "the-pickle-ran"
    pickle.loads(pickle.dumps(Payload(mark)))
    assert mark.is_dir(), "the payload works"
    mark.rmdir()
    return mark


def test_a_pickle_in_the_training_state_is_refused(tmp_path: Path, mark: Path) -> None:
    torch.save({"step": Payload(mark)}, tmp_path / "training_state.pt")
    with pytest.raises(ValueError, match="is damaged"):
        load_training_state(tmp_path)
    (tmp_path / "training_state.pt").write_bytes(pickle.dumps(Payload(mark)))
    with pytest.raises(ValueError, match="is damaged"):
        load_training_state(tmp_path)
    assert not mark.exists()


def test_a_pickle_in_the_place_of_weights_is_refused(tmp_path: Path, mark: Path) -> None:
    config = ModelConfig(num_layers=1, width=16, num_heads=2, context_length=16)
    save_model(tmp_path, GPT(config, 300))
    (tmp_path / "model.safetensors").write_bytes(pickle.dumps(Payload(mark)))
    torch.save(Payload(mark), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="is damaged"):
        load_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"pytorch_model\.bin, a pickle, which can run code and is not read"):
        load_model(tmp_path)
    assert not mark.exists()


def pickled_column(payload: object, column: str) -> pa.Table:
    """A Parquet column of the type that Ray Data stores Python objects in, and unpickles on reading."""
    import ray.data.extensions  # registers the type, as it is registered in a worker
    from ray.data._internal.object_extensions.arrow import ArrowPythonObjectType

    assert ray.data.extensions
    storage = pa.array([pickle.dumps(payload)], type=pa.large_binary())
    return pa.table({column: pa.ExtensionArray.from_storage(ArrowPythonObjectType(), storage)})


def shard_artifact(storage: str, table: pa.Table) -> Artifact:
    artifact = artifact_at(storage, "attack", "prepare", "0" * 20)
    path = Path(artifact.path) / "train/00000.parquet"
    path.parent.mkdir(parents=True)
    pq.write_table(table, path)
    write_manifest(artifact, {"train/00000.parquet": record_file(path)})
    return artifact


def write_manifest(artifact: Artifact, files: dict[str, FileRecord]) -> None:
    manifest = Manifest("prepare", artifact.fingerprint, 1, {}, {}, {}, files)
    Path(artifact.path).mkdir(parents=True, exist_ok=True)
    (Path(artifact.path) / "manifest.json").write_text(manifest.to_json())


def test_a_pickle_in_a_shard_is_refused(storage: str, tmp_path: Path, mark: Path) -> None:
    artifact = shard_artifact(storage, pickled_column(Payload(mark), "tokens"))
    with pytest.raises(ValueError, match=r"is not a token shard|holds tokens as"):
        open_shards(artifact, "train")
    assert not mark.exists()


def test_a_pickle_in_the_metadata_of_a_shard_is_not_read(storage: str, tmp_path: Path, mark: Path) -> None:
    tokens = pa.table({"tokens": pa.array([[1, 2, 3]], type=pa.list_(pa.uint16()))})
    table = tokens.append_column("extra", pickled_column(Payload(mark), "extra").column("extra"))
    table = table.replace_schema_metadata({"tokenizer": pickle.dumps(Payload(mark))})
    (shard,) = open_shards(shard_artifact(storage, table), "train")
    assert TokenCache(tmp_path / "cache").open(shard).tolist() == [1, 2, 3]
    assert not mark.exists()


def test_a_pickle_in_the_corpus_is_refused(tmp_path: Path, mark: Path) -> None:
    corpus = tmp_path / "corpus.parquet"
    pq.write_table(pickled_column(Payload(mark), "text"), corpus)
    source = SourceConfig(kind="files", paths=[str(corpus)])
    with pytest.raises(ValueError, match="text"):
        list(sample_documents(source, 1000, slices(source, 10**6)))
    assert not mark.exists()


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../../b", "~/x", "..\\x", "C:x", "a//b", ""])
def test_a_manifest_that_names_a_file_outside_is_refused(storage: str, tmp_path: Path, name: str) -> None:
    artifact = artifact_at(storage, "attack", "prepare", "0" * 20)
    write_manifest(artifact, {name: FileRecord(1, "0" * 64)})
    for read in (artifact.manifest, lambda: open_shards(artifact, "train"), lambda: artifact.download(tmp_path / "to")):
        with pytest.raises(ValueError, match="outside of itself"):
            read()
    assert not (tmp_path / "to").exists()


def test_a_file_with_other_bytes_than_its_manifest_says_is_refused(storage: str, tmp_path: Path) -> None:
    artifact = artifact_at(storage, "attack", "prepare", "0" * 20)
    write_manifest(artifact, {"tokenizer.json": FileRecord(2, "0" * 64)})
    (Path(artifact.path) / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="is damaged: its digest"):
        artifact.download(tmp_path / "to")


def test_no_code_reads_pickles_or_runs_strings() -> None:
    refused = ("pickle.load", "cloudpickle", "weights_only=False", "yaml.load(", "eval(", "exec(", "shell=True")
    for path in [path for room in ("model", "pipeline", "jobs") for path in (ROOT / room).rglob("*.py")]:
        code = path.read_text()
        found = [word for word in refused if word in code.replace(".eval()", "").replace("literal_eval(", "")]
        assert not found, f"{path.name}: {found}"
        assert code.count("torch.load(") == code.count("weights_only=True"), path.name


def test_addresses_are_shown_without_their_user(monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline import tracking
    from pipeline.config import Config

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://someone:planted-password@127.0.0.1:9/")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    import mlflow

    before = mlflow.get_tracking_uri()
    with pytest.raises(ValueError, match="does not answer") as told:
        tracking.connect(Config())
    point_mlflow_at(before)
    assert "planted" not in str(told.value)


def test_a_preset_has_no_place_for_a_secret() -> None:
    from pipeline.config import describe_settings

    words = ("password", "secret", "token_path", "api_key", "access_key", "credential")
    assert [key for key, _, _ in describe_settings() if any(word in key for word in words)] == []
