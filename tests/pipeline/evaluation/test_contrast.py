from dataclasses import replace
from pathlib import Path

import mlflow
import pytest
import torch

from model.checkpoint import save_model
from model.config import ModelConfig
from model.gpt import GPT
from pipeline.artifacts import artifact_at
from pipeline.config import Config
from pipeline.evaluation.contrast import Contrast, Side, describe, draw_page, find_side, measure
from pipeline.evaluation.evaluators import EVALUATORS
from pipeline.evaluation.tasks import Task
from tests.pipeline.tiny_registry import TEXT, make_registry, tiny_tokenizer
from tests.pipeline.tiny_training import tiny_config

TEXTS = [f"{TEXT[0][:80]} {n}" for n in range(60)]
PAIRS = tuple(EVALUATORS["pair"].read({"good": f"Return {n}.", "bad": f"{n} return."}) for n in range(20))


def write_model(folder: Path, *, width: int = 32, seed: int = 1) -> Path:
    tokenizer = tiny_tokenizer()
    torch.manual_seed(seed)
    model = GPT(
        ModelConfig(family="classic", num_layers=1, width=width, num_heads=2, context_length=64), tokenizer.vocab_size
    )
    save_model(folder, model.eval(), tokenizer)
    return folder


@pytest.fixture
def config(storage: str) -> Config:
    return tiny_config(storage)


@pytest.fixture
def sides(config: Config, tmp_path: Path) -> tuple[Side, Side]:
    first = find_side(config, str(write_model(tmp_path / "first")))
    second = find_side(config, str(write_model(tmp_path / "second", width=16, seed=2)))
    return replace(first, name="first"), replace(second, name="second")


@pytest.fixture
def contrast(sides: tuple[Side, Side]) -> Contrast:
    return measure(*sides, TEXTS, [Task("mine", "pair", PAIRS)], ["<b>Return"], sample_tokens=4)


def test_what_differs_is_found(contrast):
    assert contrast.settings == [("model.mlp_width", "128", "64"), ("model.width", "32", "16")]
    assert contrast.gain.documents == 60
    gained = contrast.bits_per_byte[0] - contrast.bits_per_byte[1]
    assert contrast.gain.bits_per_byte == pytest.approx(gained)
    [row] = contrast.tasks
    assert row.change.n == 20
    assert row.change.difference == pytest.approx(row.second[0] - row.first[0])
    assert contrast.samples[0][1] != contrast.samples[0][2]


def test_a_model_beside_itself_shows_no_difference(sides):
    same = measure(sides[0], sides[0], TEXTS, [], ["Return"], sample_tokens=4)
    assert same.settings == []
    assert same.gain.bits_per_byte == same.gain.low == same.gain.high == 0
    assert same.samples[0][1] == same.samples[0][2]
    assert "no difference is shown" in describe(same)


def test_the_text_says_all_of_it(contrast):
    text = describe(contrast)
    for words in (
        "model.width",
        "Bits per byte of 60 held-out documents",
        "mine, acc",
        "points",
        "Samples after",
        "So ",
    ):
        assert words in text


def test_the_page_says_it_too_and_runs_nothing_of_it(contrast):
    page = draw_page(contrast)
    for words in ("model.width", "mine, acc", f"{contrast.bits_per_byte[0]:.4f}", "&lt;b&gt;Return"):
        assert words in page
    assert "<b>Return" not in page
    assert "http" not in page


def test_versions_runs_and_trainings_are_found(config, tmp_path):
    store = make_registry(tmp_path)
    store.add_version(seed=3, alias="champion")
    assert find_side(config, "champion").name == find_side(config, "1").name == "tiny version 1"
    write_model(tmp_path / "export" / "checkpoint")
    trained = artifact_at(config.storage, config.name, "train", "2" * 20)
    with mlflow.start_run(experiment_id=mlflow.get_experiment_by_name("tiny").experiment_id) as run:
        mlflow.log_params({"artifact": trained.url, "train.steps": 12})
    trained.commit({"mlflow_run_id": run.info.run_id}, trained.upload(tmp_path / "export"))
    by_run, by_folder = find_side(config, run.info.run_id), find_side(config, trained.url)
    assert by_run.settings == by_folder.settings
    assert by_run.settings["train.steps"] == "12"


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("/nowhere/at/all", "no checkpoint's folder and no training's"),
        ("0" * 32, "MLflow has no run 0000"),
        ("7", "tiny"),
    ],
)
def test_what_is_none_of_them_is_said(config, tmp_path, name, sentence):
    make_registry(tmp_path)
    with pytest.raises(ValueError, match=sentence):
        find_side(config, name)


def test_no_text_is_no_comparison(sides):
    with pytest.raises(ValueError, match="no held-out text"):
        measure(*sides, [])
