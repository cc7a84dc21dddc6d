"""A model leaves as a folder, as GGUF, or for the hub: by any of its names, whole, and nothing unseen."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from jobs import export
from model.chat import CHAT_TEMPLATE, save_template
from model.checkpoint import load_model, save_training_state
from model.tokenizer import load_tokenizer
from pipeline.artifacts import Artifact, Recipe
from pipeline.config import load_config
from pipeline.export.folder import write_folder
from pipeline.export.sources import open_source
from tests.pipeline.export.fake_hub import TOKEN, FakeHub
from tests.pipeline.tiny_registry import TinyRegistry, make_registry

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> TinyRegistry:
    """One whose model splits text as llama.cpp can."""
    found = make_registry(tmp_path_factory.mktemp("registry"))
    found.add_version(seed=1, alias="champion", pattern="llama-bpe")
    return found


@pytest.fixture(scope="module")
def checkpoint(registry: TinyRegistry, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a version, with a chat template and the state of its training."""
    registry.current()
    folder = tmp_path_factory.mktemp("models") / "mine"
    with open_source(load_config(None, ["name=tiny"]), "champion") as source:
        write_folder(source.folder, folder, "mine")
    save_template(folder, CHAT_TEMPLATE)
    save_training_state(folder, {"step": torch.tensor(3)})
    return folder


def same_weights(one: Path, other: Path) -> bool:
    first, second = load_model(one).state_dict(), load_model(other).state_dict()
    return all(torch.equal(weight, second[name]) for name, weight in first.items())


def test_a_model_is_found_by_each_of_its_names(registry: TinyRegistry, checkpoint: Path, tmp_path: Path) -> None:
    registry.current()
    config = load_config(None, ["name=tiny"])
    trained = Artifact(str(tmp_path / "train-x"), "train", "f", Recipe())
    trained.commit({}, trained.upload(checkpoint, "checkpoint"))
    for name in ("champion", "1", "models:/tiny@champion", "models:/tiny/1", str(checkpoint), trained.url):
        with open_source(config, name) as source:
            assert same_weights(source.folder, checkpoint), name
            assert "/" not in source.name
    for name, says in [
        ("models:/tiny", "models:/name@alias"),
        ("models:/tiny@nobody", "no alias 'nobody'"),
        ("9", "no version '9'"),
        ("0" * 32, "no run"),
        (str(tmp_path), "no checkpoint's folder"),
    ]:
        with pytest.raises(ValueError, match=says), open_source(config, name):
            pass


def test_a_folder_is_the_model_and_nothing_of_ours(checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    files = write_folder(checkpoint, target, "mine")
    assert {file.name for file in files} == {
        *("README.md", "config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    }
    assert same_weights(target, checkpoint)
    assert "library_name: transformers" in (target / "README.md").read_text()
    with pytest.raises(ValueError, match="not empty"):
        write_folder(checkpoint, target, "mine")


def test_a_folder_opens_in_transformers(checkpoint: Path, tmp_path: Path) -> None:
    import transformers

    write_folder(checkpoint, tmp_path / "out", "mine")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = tokenizer("Return a new list", return_tensors="pt")["input_ids"]
    assert ids[0].tolist() == load_tokenizer(checkpoint).encode("Return a new list").tolist()
    assert torch.allclose(model(ids).logits, load_model(checkpoint)(ids)[..., : len(tokenizer)], atol=1e-4)


def test_the_job_writes_gguf_with_its_modelfile(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import gguf

    output = tmp_path / "out"
    assert export.main([str(checkpoint), "--to=gguf", "--type=q8_0", f"--output={output}"]) == 0
    said = capsys.readouterr().out
    assert "Mind: vLLM" in said  # its heads are tiny
    assert "ollama create mine -f" in said
    assert {path.name for path in output.iterdir()} == {"mine-q8_0.gguf", "Modelfile"}
    reader = gguf.GGUFReader(output / "mine-q8_0.gguf")
    template = reader.fields["tokenizer.chat_template"].contents()
    assert "generation" not in template.replace("add_generation_prompt", "")


def test_what_is_missing_is_said_before_anything_is_done(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["x", "--to=gguf"], ["x", "--to=hub"], ["x", "--to=paper", "--output=y"]):
        with pytest.raises(SystemExit):
            export.main(words)
    assert export.main(["./nowhere/at/all", "--to=folder", "--output=y"]) == 2
    assert "no config.json" in capsys.readouterr().err


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub() as serving:
        yield serving


@pytest.mark.slow
def test_the_hub_gets_nothing_until_it_was_shown(hub: FakeHub, checkpoint: Path, tmp_path: Path) -> None:
    environment = os.environ | {
        "HF_ENDPOINT": hub.address,
        "HF_TOKEN": TOKEN,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path),
        "HF_HUB_DISABLE_XET": "1",
        "PYTHONPATH": str(ROOT),
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }

    def run(*words: str, **changes: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "jobs.export", str(checkpoint), "--to=hub", *words]
        return subprocess.run(command, env=environment | changes, capture_output=True, text=True, timeout=120)

    shown = run("--repository=me/mine", "--private")
    assert shown.returncode == 0, shown.stderr
    assert "me/mine will be made, private, as me:" in shown.stdout
    assert "bytes  model.safetensors" in shown.stdout
    assert "training_state" not in shown.stdout
    assert "Nothing was uploaded" in shown.stdout
    assert TOKEN not in shown.stdout + shown.stderr
    assert not hub.created
    assert not hub.files

    done = run("--repository=me/mine", "--private", "--yes")
    assert done.returncode == 0, done.stderr
    assert f"Uploaded: {hub.address}/me/mine" in done.stdout
    assert hub.created[0]["visibility"] == "private"
    for name in ("model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"):
        assert hub.files[name] == (checkpoint / name).read_bytes(), name
    assert b"transformers" in hub.files["README.md"]
    assert not {name for name in hub.files if "training_state" in name}

    hub.refuses_commits = True
    refused = run("--repository=me/mine", "--yes")
    assert refused.returncode == 2
    assert "is there; files of the same names are replaced" in refused.stdout
    assert "The hub did not take me/mine" in refused.stderr
    nobody = run("--repository=me/mine", HF_TOKEN="")
    assert nobody.returncode == 2
    assert "set HF_TOKEN" in nobody.stderr
