from pathlib import Path

import pytest

from jobs import compare
from model.tokenizer import load_tokenizer
from pipeline import orchestrator
from pipeline.config import load_config
from tests.pipeline.evaluation.test_contrast import TEXTS, write_model
from tests.pipeline.tiny_training import write_shards, write_tokenizer


@pytest.fixture
def words(storage: str, tmp_path: Path) -> list[str]:
    """Two checkpoints and the settings of a pipeline whose text is never read here."""
    (tmp_path / "text.txt").write_text("The text.")
    models = [write_model(tmp_path / "first"), write_model(tmp_path / "second", seed=2)]
    settings = ["name=tiny", f"storage={storage}", "source.kind=files", f"source.paths=[{tmp_path}/text.txt]"]
    return [*map(str, models), *settings, "evaluate.prompts=[Return]", "evaluate.sample_tokens=4"]


def test_two_checkpoints_are_compared_on_the_presets_held_out_text(words, tmp_path, monkeypatch, capsys):
    config = load_config("jobs/presets/demo.yaml", words[2:])
    found = orchestrator.locate(config)
    tokenizer = load_tokenizer(Path(words[0]))
    made = {
        "tokenizer": write_tokenizer(found["tokenizer"], tokenizer),
        "prepare": write_shards(config, tokenizer, TEXTS),
    }
    monkeypatch.setattr(orchestrator, "locate", lambda config: made)
    assert compare.main([*words, "--html", str(tmp_path / "page.html")]) == 0
    assert "Bits per byte of 6 held-out documents" in capsys.readouterr().out
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")


def test_text_that_is_not_prepared_is_said_in_one_sentence(words, capsys):
    assert compare.main(words) == 2
    error = capsys.readouterr().err
    assert error == (
        "error: The held-out text is not prepared with these settings; run python -m jobs.tokenizer first.\n"
    )
