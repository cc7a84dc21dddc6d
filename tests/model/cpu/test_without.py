"""Without the folder model/cpu everything works, more slowly."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model.engine import Engine, EngineSettings, GenerationRequest, SamplingSettings
from model.gpt import GPT, ModelConfig
from model.tokenizer import train_bpe
from model.training import parallelize

ROOT = Path(__file__).parents[3]

# The folder may also be found in another checkout that is installed: so its name is refused too.
HIDE = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[:2] == ["model", "cpu"]:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())
"""


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A copy of model/ without cpu/, and its tests."""
    shutil.copytree(ROOT / "model", tmp_path / "model", ignore=shutil.ignore_patterns("cpu", "__pycache__"))
    shutil.copytree(ROOT / "tests/model", tmp_path / "tests/model", ignore=shutil.ignore_patterns("cpu", "__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "sitecustomize.py").write_text(HIDE)
    return tmp_path


def run_there(folder: Path, *arguments: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def answer_and_loss() -> tuple[list[int], float]:
    """What a small model says and how far off it is."""
    tokenizer = train_bpe(["the quick brown fox jumps over the lazy dog. " * 20], 280)
    torch.manual_seed(3)
    model = GPT(ModelConfig(num_layers=2, width=32, num_heads=2, context_length=64), tokenizer.vocab_size)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.clear_padding()
    tokens = torch.randint(0, tokenizer.vocab_size, (2, 32))
    loss = parallelize(model)(tokens, tokens.roll(-1)).item()
    engine = Engine(model.eval(), tokenizer, EngineSettings(weights="float32"))
    engine.add(GenerationRequest("a", tokenizer.encode("the quick").tolist(), SamplingSettings(temperature=0)))
    said: list[int] = []
    while engine.has_work:
        for chunk in engine.step():
            said += chunk.tokens
    return said, loss


SAY = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("here", sys.argv[1])
here = importlib.util.module_from_spec(spec)
spec.loader.exec_module(here)
print(json.dumps(here.answer_and_loss()))
assert not [name for name in sys.modules if name.startswith("model.cpu")]
"""


def test_a_model_learns_and_speaks_the_same_without_the_folder(elsewhere: Path) -> None:
    said, loss = answer_and_loss()
    assert json.loads(run_there(elsewhere, "-c", SAY, __file__)) == [said, pytest.approx(loss, rel=1e-6)]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_models_and_the_engines_tests_pass_without_the_folder(elsewhere: Path) -> None:
    files = ("test_gpt", "test_generation", "test_engine", "test_training", "test_checkpoint")
    wanted = [f"tests/model/{file}.py" for file in files]
    # Left out: what needs the kernel, and what compares with transformers or runs several ranks, for its time alone.
    chosen = ["-m", "not slow", "-k", "not kernel and not transformers and not two_ranks"]
    run_there(elsewhere, "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen, *wanted)
