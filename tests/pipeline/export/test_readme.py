"""The README about other programs: what it names is what the job writes, and each that is here opens it."""

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from jobs import export
from jobs.demo import free_port
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
    found.add_version(seed=1, alias="champion", pattern="llama-bpe", width=128)  # heads of 64, as vLLM takes them
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


def python_with_vllm() -> str | None:
    """A Python that has vLLM: this one, or the one that VLLM_PYTHON names."""
    return sys.executable if importlib.util.find_spec("vllm") else os.environ.get("VLLM_PYTHON")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(python_with_vllm() is None, reason="needs vLLM, here or in the Python that VLLM_PYTHON names")
def test_vllm_serves_the_folder(exported: Path) -> None:
    port = free_port(18_700)
    command, verb, folder = shlex.split(PROGRAMS["vLLM"])
    assert (command, verb) == ("vllm", "serve")
    # What the command starts: in the build for CPUs the command itself asks for the other package's version, and fails.
    server_module = [str(python_with_vllm()), "-m", "vllm.entrypoints.openai.api_server"]
    words = [*server_module, f"--model={folder}", f"--port={port}", "--host=127.0.0.1"]
    # By itself it takes half of a machine's memory, and leaves one core to its HTTP process.
    of_cpus = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}
    environment = os.environ | of_cpus | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with open(exported / "vllm.log", "w", encoding="utf-8") as log:
        server = subprocess.Popen(words, cwd=exported, stdout=log, stderr=log, env=environment)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            while True:
                assert server.poll() is None, (exported / "vllm.log").read_text()[-3000:]
                try:
                    if client.get("/health").status_code == 200:
                        break
                except httpx.TransportError:
                    time.sleep(1)
            asked = {"model": "mine-hf", "prompt": "Once upon", "max_tokens": 4, "temperature": 0}
            answer = client.post("/v1/completions", json=asked).json()
        assert answer["usage"]["completion_tokens"] == 4
    finally:
        server.terminate()
        server.wait(60)


# The reader of a task's data is not what the folder is about, and the hub is not there in a test.
LAMBADA_HERE = """
task: lambada_here
dataset_path: json
dataset_kwargs: {data_files: {test: lambada.jsonl}}
output_type: loglikelihood
test_split: test
doc_to_text: "{{context}}"
doc_to_target: "{{continuation}}"
metric_list: [{metric: perplexity}, {metric: acc}]
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs lm-eval (the extra peers-evaluate)")
def test_lm_eval_asks_the_folder(exported: Path) -> None:
    rows = [{"context": f"Return the {word}", "continuation": " list"} for word in ("first", "last", "next")]
    (exported / "lambada.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (exported / "lambada_here.yaml").write_text(LAMBADA_HERE)
    words = shlex.split(PROGRAMS["lm-eval"].replace("lambada_openai", "lambada_here"))
    command = [sys.executable, "-m", *words, "--include_path", ".", "--device", "cpu", "--output_path", "found"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(exported / "cache")}
    done = subprocess.run(command, cwd=exported, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = (exported / "found").rglob("*.json")
    found = json.loads(file.read_text())["results"]["lambada_here"]
    assert found["perplexity,none"] > 1
