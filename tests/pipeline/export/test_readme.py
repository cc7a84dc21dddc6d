"""The README about other programs: what it names is what the job writes, and each that is here opens it."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from jobs import export
from pipeline.config import load_config
from pipeline.export.sources import open_source
from tests.model.llama_cpp import HAS_SERVER, LlamaCpp
from tests.pipeline.tiny_registry import TinyRegistry, make_registry

ROOT = Path(__file__).parents[3]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SECTION = README.partition("## Take it with you")[2].partition("\n## ")[0]
PROGRAMS = dict(re.findall(r"^\| ([\w.-]+) \| `(.+)` \|$", SECTION, re.MULTILINE))


def test_each_program_has_its_line() -> None:
    assert list(PROGRAMS) == ["transformers", "vLLM", "llama.cpp", "ollama", "lm-eval"]


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> TinyRegistry:
    """One whose model splits text as llama.cpp can."""
    found = make_registry(tmp_path_factory.mktemp("registry"))
    found.add_version(seed=1, alias="champion", pattern="llama-bpe")
    return found


@pytest.fixture(scope="module")
def exported(registry: TinyRegistry, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the README's exports were run."""
    folder = tmp_path_factory.mktemp("exported")
    registry.current()
    lines = [line.partition("#")[0] for line in SECTION.splitlines() if line.startswith("python -m jobs.export")]
    assert len(lines) == 3
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MLFLOW_TRACKING_URI", registry.tracking_uri)
        for line in lines[:2]:
            words = [word.replace("models:/mine", "models:/tiny") for word in shlex.split(line)[3:]]
            assert export.main([*words, f"--preset={ROOT}/jobs/presets/demo.yaml"]) == 0
    return folder


@pytest.mark.slow
def test_transformers_opens_the_folder(exported: Path) -> None:
    command = shlex.split(PROGRAMS["transformers"])
    done = subprocess.run(
        [sys.executable, *command[1:]], cwd=exported, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Once upon")


def test_llama_cpp_and_ollama_are_told_the_file_that_is_there(exported: Path) -> None:
    file = exported / shlex.split(PROGRAMS["llama.cpp"])[-1].replace("mine-v1", "tiny-v1")
    assert file.is_file()
    modelfile = exported / shlex.split(PROGRAMS["ollama"])[-1]
    assert f"FROM ./{file.name}" in modelfile.read_text()


@pytest.mark.slow
@pytest.mark.skipif(not HAS_SERVER, reason="needs xllamacpp (the extra llama-cpp)")
def test_llama_cpp_answers_from_the_file(exported: Path, registry: TinyRegistry) -> None:
    server = LlamaCpp(exported / "mine-gguf/tiny-v1-f16.gguf", 64)
    registry.current()
    with open_source(load_config(None, ["name=tiny"]), "champion") as source:
        from model.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(source.folder)
    assert server.ids("Once upon") == tokenizer.encode("Once upon").tolist()
    assert server.ask("/v1/completions", prompt="Once upon", max_tokens=4)["choices"][0]["text"]
