"""Every preset that is shipped loads, and its model is the size that it says."""

from pathlib import Path

import pytest
import torch

from model.gpt import GPT, count_parameters
from pipeline.config import load_config, to_yaml

PRESETS = sorted((Path(__file__).parents[2] / "jobs/presets").glob("*.yaml"))


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_a_preset_loads(preset: Path, tmp_path: Path) -> None:
    config = load_config(preset)
    assert config.name == preset.stem
    (tmp_path / "resolved.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert load_config(tmp_path / "resolved.yaml") == config


@pytest.mark.parametrize(
    ("preset", "vocab_size", "parameters", "tolerance"),
    [
        # As its author wrote it; 0.1 % is what names and shapes of another code base may differ by.
        ("gpt-53m-char", 32_172, 53_175_468, 0.001),
        ("gpt2-124m", 50_257, 124_439_808, 0.0),
        ("gpt-100m", 16_384, 12 * (4 * 768**2 + 3 * 768 * 2048 + 2 * 768 + 2 * 128) + 768 + 2 * 16_384 * 768, 0.0),
        ("smollm2-135m-chat", 49_152, 134_515_008, 0.0),
    ],
)
def test_the_model_has_the_parameters_of_its_reference(
    preset: str, vocab_size: int, parameters: int, tolerance: float
) -> None:
    config = load_config(PRESETS[0].with_name(f"{preset}.yaml"))
    assert config.tokenizer.kind == "gpt2" or config.tokenizer.vocabulary_size == vocab_size
    # Shapes alone, no weights: the counts are the built model's, not those of a formula beside it.
    with torch.device("meta"):
        model = GPT(config.model, vocab_size)
    assert model.num_parameters() == count_parameters(config.model, vocab_size)
    assert model.num_parameters() == pytest.approx(parameters, rel=tolerance, abs=0)


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_a_presets_batch_is_whole_sequences_for_its_workers(preset: Path) -> None:
    config = load_config(preset)
    assert config.train.batch_tokens % config.model.context_length == 0
    assert config.train.batch_tokens // config.model.context_length >= config.train.most_workers
