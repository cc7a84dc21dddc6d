import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from model.tokenizer import train_bpe
from pipeline import register, tracking
from pipeline.artifacts import Artifact, Manifest, artifact_at
from pipeline.config import Config, RegisterConfig, load_config
from pipeline.evaluation.model_card import summarise_card
from pipeline.registry import PROBE_TAG, resolve
from tests.pipeline.test_evaluate_tasks import DESCRIBED
from tests.pipeline.tiny_training import write_shards, write_tokenizer

TEXTS = [f"Document number {n} says that the cat sat on mat {n * n}." for n in range(1000)]


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's tables, made once: that takes longer than a test."""
    storage = tmp_path_factory.mktemp("store")
    tracking.connect(load_config(None, [f"storage={storage}", "name=unused"]))
    return storage / "mlflow.db"


@pytest.fixture
def config(storage: str, empty_store: Path) -> Config:
    Path(storage).mkdir()
    shutil.copy(empty_store, storage)
    return load_config(None, [f"storage={storage}", "name=tiny"])


@pytest.fixture
def without_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Versions that hold nothing: writing a model takes seconds, and the gate reads none here."""

    def log_version(
        config: Config, client: Any, train: Any, trained: Any, run_id: str, tags: dict[str, str], card: str
    ) -> str:
        if not client.search_registered_models(f"name = '{config.registered_name}'"):
            client.create_registered_model(config.registered_name)
        return str(client.create_model_version(config.registered_name, source=config.storage, tags=tags).version)

    monkeypatch.setattr(register, "log_version", log_version)


@pytest.fixture(autouse=True)
def scores(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Bits per byte that a model needs on every document, give or take: by its weights' content; 2 if not said."""
    told: dict[str, float] = {}

    def score_documents(sources: Sequence[Any], texts: Sequence[str], place: object) -> list[list[float]]:
        scored = []
        for source in sources:
            if isinstance(source, Artifact):
                weights = source.read_text("checkpoint/model.safetensors")
            else:
                weights = source.record.tags["weights_for_the_test"]
            noise = np.random.default_rng(list(weights.encode())).normal(0, 0.02, len(texts))
            rate = told.get(weights, 2.0)
            scored.append([(rate + more) * math.log(2) * len(t.encode()) for t, more in zip(texts, noise, strict=True)])
        return scored

    monkeypatch.setattr(register, "score_documents", score_documents)
    monkeypatch.setattr(register, "wants_gpu", lambda options, **_: False)
    monkeypatch.setattr(register, "worker_resources", lambda options, use_gpu: {"CPU": 1.0})
    return told


class Project:
    """A pipeline whose stages before register are done; each model is a text that stands for its weights."""

    def __init__(self, config: Config) -> None:
        self.config = config
        tracking.connect(config)
        tokenizer = train_bpe(TEXTS[:20], 300)
        self.tokenizer = write_tokenizer(artifact_at(config.storage, config.name, "tokenizer", "t" * 20), tokenizer)
        self.shards = write_shards(config, tokenizer, TEXTS)

    def inputs(self, weights: str, *, bits: float = 1.5, evaluation: str = "e", right: list[bool] | None = None):
        with mlflow.start_run() as run:
            counts = {"mlflow_run_id": run.info.run_id, "num_parameters": 7}
        train = self.finished("train", f"{weights:0<20}", counts, **{"checkpoint/model.safetensors": weights})
        figures = {"bits_per_byte": bits, PROBE_TAG: 2.5}
        evaluate = self.finished("evaluate", f"{weights}{evaluation:0<19}"[:20], figures, right=right)
        return {"tokenizer": self.tokenizer, "prepare": self.shards, "train": train, "evaluate": evaluate}

    def finished(
        self, stage: str, fingerprint: str, counts: dict[str, Any], right: list[bool] | None = None, **files: str
    ) -> Artifact:
        artifact = artifact_at(self.config.storage, self.config.name, stage, fingerprint)
        records = {name: artifact.write_text(name, text) for name, text in files.items()}
        if right is not None:
            sink = pa.BufferOutputStream()
            pq.write_table(pa.table({"right": right}).replace_schema_metadata({"digest": "d"}), sink)
            records["tasks/mine.parquet"] = artifact.write_bytes("tasks/mine.parquet", sink.getvalue().to_pybytes())
        artifact.commit(counts, records)
        return artifact

    def register(self, weights: str, fingerprint: str = "", *settings: str, **how: Any) -> Manifest:
        """Register one model, with settings over the config's."""
        chosen = load_config(None, [f"storage={self.config.storage}", "name=tiny", *settings])
        output = artifact_at(self.config.storage, self.config.name, "register", f"{fingerprint or weights:0<20}")
        manifest = register.run(chosen, self.inputs(weights, **how), output)
        client = mlflow.MlflowClient()
        client.set_model_version_tag("tiny", manifest.counts["version"], "weights_for_the_test", weights)
        return manifest


@pytest.fixture
def project(config: Config) -> Project:
    return Project(config)


def aliases(name: str = "tiny") -> dict[str, str]:
    return {alias: str(version) for alias, version in mlflow.MlflowClient().get_registered_model(name).aliases.items()}


def tags(version: str) -> dict[str, str]:
    return dict(mlflow.MlflowClient().get_model_version("tiny", version).tags)


def test_a_version_says_where_it_came_from(project):
    project.register("a")
    champion = mlflow.MlflowClient().get_model_version_by_alias("tiny", "champion")
    assert champion.tags["data_digest"] == project.shards.fingerprint
    assert champion.tags["bits_per_byte"] == "1.50000"
    assert champion.tags["checkpoint_url"].endswith("/checkpoint")
    assert champion.run_id == champion.tags["mlflow_run_id"]


def test_a_versions_card_is_its_description_and_lies_in_its_folder(project, tmp_path):
    inputs = project.inputs("a")
    tasks = {"mine": DESCRIBED["blimp"]}
    inputs["evaluate"].write_text("evaluation.json", json.dumps({"bits_per_byte": 1.5, "tasks": tasks, "samples": []}))
    output = artifact_at(project.config.storage, "tiny", "register", "9" * 20)
    register.run(project.config, inputs, output)
    champion = mlflow.MlflowClient().get_model_version_by_alias("tiny", "champion")
    folder = Path(mlflow.artifacts.download_artifacts("models:/tiny@champion", dst_path=str(tmp_path)))
    card = (folder / "artifacts/checkpoint/README.md").read_text()
    assert "| mine | acc | 0.6000 | 0.0500 | 100 | 0.5000 |" in card
    assert champion.description == summarise_card(card)
    assert output.read_text("README.md") == card
    assert "library_name: transformers" in card
    assert "library_name" not in champion.description


def test_a_version_holds_the_weights_and_no_pickle(project, tmp_path):
    project.register("a")
    folder = mlflow.artifacts.download_artifacts("models:/tiny@champion", dst_path=str(tmp_path))
    names = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert "model.safetensors" in names
    assert not {name for name in names if name.endswith((".pkl", ".pickle", ".pt", ".bin"))}, folder


def test_mlflows_weights_are_a_second_name_of_the_trainings(project):
    inputs = project.inputs("a")
    register.run(project.config, inputs, artifact_at(project.config.storage, "tiny", "register", "s" * 20))
    ours = Path(inputs["train"].file("checkpoint/model.safetensors"))
    named = [path for path in Path(project.config.storage).rglob("*.safetensors") if path.samefile(ours)]
    assert len(named) == 2
    inputs["train"].delete()  # and what has lost one name has the other
    (left,) = [path for path in named if path.exists()]
    assert left.read_text() == "a"


def test_the_name_can_be_chosen(project, config):
    chosen = replace(config, register=replace(config.register, model_name="chosen"))
    output = artifact_at(config.storage, config.name, "register", "9" * 20)
    assert register.run(chosen, project.inputs("a"), output).counts["model_name"] == "chosen"
    assert aliases("chosen") == {"champion": "1"}


def test_a_run_that_was_deleted_before_takes_the_version(project):
    inputs = project.inputs("a")
    run_id = inputs["train"].manifest().counts["mlflow_run_id"]
    mlflow.MlflowClient().delete_run(run_id)
    register.run(project.config, inputs, artifact_at(project.config.storage, "tiny", "register", "9" * 20))
    assert mlflow.MlflowClient().get_model_version_by_alias("tiny", "champion").run_id == run_id


def test_a_version_whose_run_is_gone_for_good_gets_another(project):
    inputs = project.inputs("a")
    inputs["train"].commit({"mlflow_run_id": "0" * 32, "num_parameters": 7}, inputs["train"].manifest().files)
    register.run(project.config, inputs, artifact_at(project.config.storage, "tiny", "register", "9" * 20))
    champion = mlflow.MlflowClient().get_model_version_by_alias("tiny", "champion")
    assert champion.run_id == champion.tags["mlflow_run_id"] != "0" * 32


@pytest.mark.parametrize("deleted", ["the registered model", "the version", "the version's files"])
def test_what_was_deleted_in_the_registry_is_registered_again(project, config, deleted):
    first = project.register("a")
    client = mlflow.MlflowClient()
    version = client.get_model_version_by_alias("tiny", "champion")
    if deleted == "the registered model":
        client.delete_registered_model("tiny")
    elif deleted == "the version":
        client.delete_model_version("tiny", version.version)
    else:
        client.delete_logged_model(version.source.removeprefix("models:/"))
    assert not register.still_holds(config, first)
    assert register.still_holds(config, project.register("a"))
    assert client.get_model_version_by_alias("tiny", "champion").source != version.source


@pytest.mark.parametrize("name", ["it's", 'a "b"', "a/b", "a:b", "`x`"])
def test_a_name_that_the_registry_cannot_search_for_is_refused_with_the_settings(name):
    with pytest.raises(ValueError, match=r"register\.model_name is "):
        RegisterConfig(model_name=name)


# A version is its weights -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("without_files")
def test_the_same_weights_stay_one_version_and_what_is_known_of_them_adds_up(project):
    project.register("a", "one")
    again = project.register("a", "two", bits=1.7, evaluation="f")
    assert (again.counts["version"], aliases()) == ("1", {"champion": "1"})
    assert tags("1")["bits_per_byte"] == "1.50000"
    assert tags("1")["bits_per_byte.af000000"] == "1.70000"


@pytest.mark.usefixtures("without_files")
def test_a_version_from_before_weights_were_noted_is_found_by_its_recipe(project):
    project.register("a", "one")
    client = mlflow.MlflowClient()
    client.delete_model_version_tag("tiny", "1", register.WEIGHTS_TAG)
    assert project.register("a", "one").counts["version"] == "1"
    assert project.register("b", "two").counts["version"] == "2"


# The champion is earned -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("without_files")
def test_a_better_model_becomes_the_champion_and_says_why(project, scores, capsys):
    scores["b"] = 1.9
    project.register("a")
    manifest = project.register("b")
    assert aliases() == {"champion": "2"}
    assert manifest.counts["alias"] == "champion"
    assert tags("2")["gate_reason"].startswith("against version 1: better: +0.")
    assert tags("1")["superseded_by"] == "2"
    assert "register  version 2 of tiny is the champion: against version 1: better" in capsys.readouterr().out
    artifact = artifact_at(project.config.storage, "tiny", "register", f"{'b':0<20}")
    assert "candidate_nats" in artifact.read_text("comparison.json")


@pytest.mark.parametrize(("bits", "reason"), [(2.1, "worse: -0."), (2.0, "no gain is shown: ")])
@pytest.mark.usefixtures("without_files")
def test_another_model_is_the_challenger_and_the_reason_is_everywhere(project, scores, capsys, bits, reason):
    scores["b"] = bits
    project.register("a")
    manifest = project.register("b")
    assert aliases() == {"champion": "1", "challenger": "2"}
    assert manifest.counts["alias"] == "challenger"
    assert reason in manifest.counts["reason"]
    assert reason in tags("2")["gate_reason"]
    assert f"version 2 of tiny is the challenger: against version 1: {reason}" in capsys.readouterr().out
    assert resolve("tiny", "champion").refused_challenger.startswith("version 2: against version 1")
    assert resolve("tiny", "challenger").gate_reason == tags("2")["gate_reason"]


@pytest.mark.usefixtures("without_files")
def test_not_worse_lets_an_equal_model_through_and_a_worse_one_not(project, scores):
    scores["c"] = 2.1
    project.register("a")
    project.register("b", "", "register.gate=not_worse")
    assert aliases() == {"champion": "2"}
    project.register("c", "", "register.gate=not_worse")
    assert aliases() == {"champion": "2", "challenger": "3"}


@pytest.mark.usefixtures("without_files")
def test_always_lets_every_model_through(project, scores):
    scores["b"] = 9.0
    project.register("a")
    project.register("b", "", "register.gate=always")
    assert aliases() == {"champion": "2"}
    assert tags("2")["gate"] == "always"


@pytest.mark.usefixtures("without_files")
def test_force_lets_a_refused_model_through_and_is_recorded(project, scores):
    scores["b"] = 2.5
    project.register("a")
    project.register("b")
    project.register("b", "", "register.force=true")
    assert aliases() == {"champion": "2"}  # and is nobody's challenger any more
    assert tags("2")["gate"] == "forced"
    assert tags("2")["gate_reason"] == "forced over version 1; the gate was not asked"


@pytest.mark.usefixtures("without_files")
def test_too_few_documents_are_said_to_be(project, scores):
    scores["b"] = 1.0
    project.register("a")
    project.register("b", "", "register.gate_documents=20")
    assert aliases() == {"champion": "1", "challenger": "2"}
    assert "too few documents for a decision: 20 held out, 50 are the fewest" in tags("2")["gate_reason"]


@pytest.mark.usefixtures("without_files")
def test_with_another_validation_set_the_champion_is_scored_again_on_the_candidates(project, monkeypatch):
    asked: list[tuple[int, list[str]]] = []

    def score_documents(sources: Sequence[Any], texts: Sequence[str], place: object) -> list[list[float]]:
        asked.append((len(sources), list(texts)))
        return [[10.0] * len(texts), [20.0] * len(texts)]

    monkeypatch.setattr(register, "score_documents", score_documents)
    project.register("a")
    others = [f"Another corpus has page {n}, about rivers and their {n * 7} bridges." for n in range(800)]
    # Ten times the texts, of which a tenth is held out: its own, and none of the champion's.
    project.shards = write_shards(project.config, train_bpe(TEXTS[:20], 300), others)
    project.register("b")
    assert asked == [(2, others[:80])]
    assert aliases() == {"champion": "2"}


@pytest.mark.usefixtures("without_files")
def test_a_task_that_got_worse_keeps_a_better_model_out(project, scores):
    scores["b"] = 1.9
    project.register("a", right=[True] * 100)
    project.register("b", right=[True] * 80 + [False] * 20)
    assert aliases() == {"champion": "1", "challenger": "2"}
    assert "worse at mine -20.0 ± 7.8 points" in tags("2")["gate_reason"]


@pytest.mark.usefixtures("without_files")
def test_a_task_that_only_one_of_them_answered_does_not_count(project, scores):
    scores["b"] = 1.9
    project.register("a")
    project.register("b", right=[False] * 100)
    assert aliases() == {"champion": "2"}


@pytest.mark.usefixtures("without_files")
def test_a_champion_that_cannot_be_loaded_stays_until_somebody_forces_it(project, monkeypatch):
    import ray

    def broken(*_: object) -> None:
        raise ray.exceptions.RayTaskError("score_texts", "traceback", ValueError("it is damaged"))

    monkeypatch.setattr(register, "score_documents", broken)
    project.register("a")
    project.register("b")
    assert aliases() == {"champion": "1", "challenger": "2"}
    assert "it cannot be scored (it is damaged)" in tags("2")["gate_reason"]


# What finished long ago moves nothing -----------------------------------------------------------------------------


@pytest.mark.usefixtures("without_files")
def test_an_older_finished_register_still_holds_and_never_takes_the_alias_back(project, config, scores):
    scores["b"] = 1.9
    first, second = project.register("a"), project.register("b")
    assert register.still_holds(config, first)
    assert register.still_holds(config, second)
    project.register("a")  # done again all the same
    assert aliases() == {"champion": "2", "challenger": "1"}
    assert "it was the champion until version 2 took over" in tags("1")["gate_reason"]
    project.register("a", "other", "register.gate=always")
    assert aliases()["champion"] == "2"
    project.register("a", "", "register.force=true")
    assert aliases() == {"champion": "1"}
    project.register("b")  # superseded now itself
    assert aliases()["champion"] == "1"


@pytest.mark.usefixtures("without_files")
def test_it_no_longer_holds_where_the_registry_lost_it_or_something_else_is_asked_for(project, config, scores):
    scores["b"] = 1.9
    first = project.register("a")
    forced = replace(config, register=replace(config.register, force=True))
    elsewhere = replace(config, register=replace(config.register, alias="staging"))
    assert register.still_holds(forced, first)
    assert not register.still_holds(elsewhere, first)
    project.register("b")
    assert not register.still_holds(forced, first)
    mlflow.MlflowClient().delete_model_version("tiny", "1")
    assert not register.still_holds(config, first)
    mlflow.MlflowClient().delete_registered_model_alias("tiny", "champion")
    assert not register.still_holds(config, first)
