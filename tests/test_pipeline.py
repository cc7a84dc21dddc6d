"""The demo preset made smaller, from text to a registered model, and what a user sees of it from outside."""

import json
import threading
from pathlib import Path

import mlflow
import pyarrow.parquet
import pytest
import tokenizers
import torch
import transformers

from model.checkpoint import load_model
from pipeline import orchestrator, prepare
from pipeline.config import Config, load_config
from pipeline.stages import STAGES

SMALLER = [
    "source.kind=files",
    "tokenizer.vocabulary_size=300",
    "prepare.validation_fraction=0.2",
    "prepare.shard_tokens=4000",
    "model.num_layers=2",
    "model.width=32",
    "model.num_heads=2",
    "model.context_length=32",
    "train.steps=6",
    "train.batch_tokens=256",
    "train.micro_batch_sequences=2",
    "train.evaluate_every_steps=3",
    "train.checkpoint_every_steps=3",
    "train.evaluation_tokens=512",
    "train.cpus_per_worker=0.5",
    "train.sample_tokens=8",
    "evaluate.max_tokens=512",
    "evaluate.sample_tokens=8",
]
DOCUMENTS = [
    f"Chapter {number}. The {animal} — or so they say — counted {number * number} stars.\r\nThen it slept. 🌙"
    for number, animal in enumerate(["fox", "heron", "badger", "owl", "hare"] * 20)
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "stories.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def config(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    storage = tmp_path_factory.mktemp("storage")
    return load_config(
        "jobs/presets/demo.yaml", [*SMALLER, "name=small", f"storage={storage}", f"source.paths=[{corpus}]"]
    )


@pytest.fixture(scope="module")
def manifests(config: Config, ray_session: None):
    return orchestrator.run(config)


@pytest.fixture(scope="module")
def artifacts(config: Config, manifests):
    return orchestrator.locate(config)


@pytest.fixture(scope="module")
def checkpoint(artifacts) -> Path:
    return Path(artifacts["train"].path) / "checkpoint"


def run_and_list(config: Config, **choice) -> dict[str, str]:
    """Run the pipeline; say of each stage whether it was done already or done now."""
    lines: list[str] = []
    orchestrator.run(config, report=lines.append, **choice)
    return {line.split()[0]: "skipped" if "done already" in line else "run" for line in lines if not line.endswith("…")}


def test_every_stage_leaves_a_finished_artifact(manifests, artifacts):
    assert list(manifests) == list(STAGES)
    assert all(artifacts[stage].is_done for stage in STAGES)


def test_a_second_run_skips_every_stage(config, manifests):
    assert run_and_list(config) == dict.fromkeys(STAGES, "skipped")


def test_a_changed_setting_runs_exactly_the_stages_that_depend_on_it(config, manifests):
    from dataclasses import replace

    changed = replace(config, evaluate=replace(config.evaluate, max_tokens=256))
    depending = {"evaluate"}
    for stage, inputs in STAGES.items():
        depending |= {stage} if depending & set(inputs) else set()
    assert run_and_list(changed) == {stage: "run" if stage in depending else "skipped" for stage in STAGES}
    assert "register" in depending


def test_from_runs_that_stage_and_those_after_it_again(config, manifests):
    ran = run_and_list(config, first="evaluate")
    before = list(STAGES)[: list(STAGES).index("evaluate")]
    assert ran == {stage: "skipped" if stage in before else "run" for stage in STAGES}


def test_a_stage_alone_asks_for_the_ones_before_it(config, ray_session):
    from dataclasses import replace

    other = replace(config, tokenizer=replace(config.tokenizer, vocabulary_size=280))
    with pytest.raises(ValueError, match="prepare needs the tokenizer stage"):
        orchestrator.run(other, only="prepare")


def test_the_next_stage_gets_ready_while_one_runs(config, ray_session, monkeypatch):
    from dataclasses import replace

    begun = threading.Event()
    monkeypatch.setattr(prepare, "get_ready", lambda config: begun.set())

    def run(stage: str, *rest: object) -> None:
        assert stage == "tokenizer"
        assert begun.wait(20)
        raise ValueError("that will do")

    monkeypatch.setattr(orchestrator, "_run_through_outages", run)
    other = replace(config, tokenizer=replace(config.tokenizer, vocabulary_size=281))
    with pytest.raises(ValueError, match="that will do"):
        orchestrator.run(other)
    begun.clear()
    monkeypatch.setattr(orchestrator, "_run_through_outages", lambda stage, *rest: begun.wait(0.2))
    orchestrator.run(other, only="tokenizer")
    assert not begun.is_set(), "nothing comes after it"


def test_any_parquet_reader_decodes_the_documents_exactly(artifacts, manifests):
    folder = Path(artifacts["prepare"].path)
    tokenizer = tokenizers.Tokenizer.from_file(str(Path(artifacts["tokenizer"].path) / "tokenizer.json"))
    decoded = []
    for shard in sorted(folder.glob("*/*.parquet")):
        for tokens in pyarrow.parquet.read_table(shard)["tokens"].to_pylist():
            decoded.append(tokenizer.decode(tokens[:-1], skip_special_tokens=False))
    assert sorted(decoded) == sorted(DOCUMENTS)


def test_transformers_opens_the_checkpoint_and_continues_a_text_token_for_token(checkpoint, manifests):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    ours = load_model(checkpoint).eval()
    tokens = torch.tensor([transformers.AutoTokenizer.from_pretrained(checkpoint)("The heron")["input_ids"]])
    expected = theirs.generate(tokens, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    with torch.no_grad():
        assert (ours(tokens) - theirs(tokens).logits).abs().max() < 1e-4
        for _ in range(12):
            tokens = torch.cat([tokens, ours(tokens)[:, -1:].argmax(-1)], dim=1)
    assert tokens.tolist() == expected.tolist()


def test_mlflow_shows_one_run_with_what_a_person_looks_for(config, manifests):
    runs = mlflow.search_runs(experiment_names=[config.name])
    runs = runs[runs["params.train.steps"].notna()]  # the data card has a run of its own
    assert len(runs) == 1
    run = runs.iloc[0]
    assert run["run_id"] == manifests["train"].counts["mlflow_run_id"]
    assert run["params.train.steps"] == "6"
    client = mlflow.MlflowClient()
    files = {file.path for file in client.list_artifacts(run["run_id"])}
    assert {"loss.png", "config.yaml", "evaluation.json"} <= files
    assert run["metrics.evaluate/bits_per_byte"] == pytest.approx(manifests["evaluate"].counts["bits_per_byte"])


def test_the_registered_champion_completes_a_prompt_through_pyfunc(config, manifests):
    completion = mlflow.pyfunc.load_model("models:/small@champion")
    answers = completion.predict(["The heron", "Chapter"], params={"max_tokens": 5, "seed": 1})
    assert len(answers) == 2
    assert all(isinstance(answer, str) and answer for answer in answers)
    assert answers == completion.predict(["The heron", "Chapter"], params={"max_tokens": 5, "seed": 1})


def test_registering_the_same_model_again_makes_no_second_version(config, manifests):
    before = len(mlflow.MlflowClient().search_model_versions("name = 'small'"))
    orchestrator.run(config, only="register", first="register")
    assert len(mlflow.MlflowClient().search_model_versions("name = 'small'")) == before


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["source.paths=[/no/such/file.txt]"], "/no/such/file.txt"),
        (["source.text_column=body"], "body"),
        (["train.batch_tokens=10000000"], "batch"),
        (["model.context_length=1000000", "train.batch_tokens=1000000"], "too small|tokens"),
    ],
)
def test_what_a_user_gets_wrong_is_one_sentence(config, corpus, ray_session, settings, sentence):
    base = [*SMALLER, "name=small", f"storage={config.storage}", f"source.paths=[{corpus}]", *settings]
    with pytest.raises(Exception, match=sentence) as caught:
        orchestrator.run(load_config("jobs/presets/demo.yaml", base))
    from jobs.command import explain

    assert explain(caught.value) is not None
