"""The house keeps its shape: imports run one way, importing does nothing, and what is named is there.

infra ··names··▶ jobs ▶ pipeline ▶ model ▶ torch
"""

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.stages import STAGES

ROOT = Path(__file__).parents[1]
ROOMS = ("model", "pipeline", "jobs")
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for room in ROOMS
    for path in (ROOT / room).rglob("*.py")
    if path.name != "__init__.py"
)
VERBS = {f"pipeline.{stage}" for stage in (*STAGES, "serve")}
OUT_OF_REACH = {
    "model": {"pipeline", "jobs", "ray", "mlflow", "fsspec", "s3fs", "boto3", "argparse", "fastapi"},
    "pipeline": {"jobs", "argparse", "tests"},
    "jobs": {"tests"},
}


def source_of(module: str) -> Path:
    return ROOT / f"{module.replace('.', '/')}.py"


def imports_of(module: str) -> Iterator[str]:
    """Every module that a module imports, inside functions too; `from a import b` may mean a.b."""
    for node in ast.walk(ast.parse(source_of(module).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: write imports in full"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_one_way(module: str) -> None:
    reached = {name.partition(".")[0] for name in imports_of(module)}
    assert not reached & OUT_OF_REACH[module.partition(".")[0]]


@pytest.mark.parametrize("stage", sorted(VERBS))
def test_stages_never_import_one_another(stage: str) -> None:
    assert not set(imports_of(stage)) & (VERBS - {stage} | {"pipeline.orchestrator"})


def test_only_the_live_engine_knows_the_engine() -> None:
    knowing = {name for name in MODULES if name.startswith("pipeline.") and "model.engine" in set(imports_of(name))}
    assert knowing == {"pipeline.serving.live_engine"}


@pytest.mark.parametrize("module", [module for module in MODULES if not module.startswith("jobs.")])
def test_ray_is_started_in_jobs_alone(module: str) -> None:
    calls = [node.func for node in ast.walk(ast.parse(source_of(module).read_text())) if isinstance(node, ast.Call)]
    starts = [call for call in calls if isinstance(call, ast.Attribute) and ast.unparse(call) == "ray.init"]
    assert not starts


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_has_one_name_in_every_room(stage: str) -> None:
    assert source_of(f"pipeline.{stage}").exists()
    assert source_of(f"jobs.{stage}").exists()
    assert list((ROOT / "tests/pipeline").glob(f"test_{stage}*.py"))


def test_infra_holds_no_python_logic() -> None:
    assert not list((ROOT / "infra").rglob("*.py"))


def texts() -> list[Path]:
    """What a person reads or a cluster runs."""
    infra = [path for path in (ROOT / "infra").rglob("*") if path.is_file() and path.suffix != ".json"]
    readmes = [ROOT / "README.md", *(ROOT / room / "README.md" for room in (*ROOMS, "tests/benchmarks"))]
    return [*readmes, *infra, ROOT / "Makefile"]


NAMED_FILE = r"(?<![\w/.])((?:model|pipeline|jobs|tests)/[\w/.-]+\.(?:py|yaml|html|md))"


@pytest.mark.parametrize("path", texts(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_job_and_preset_that_is_named_is_there(path: Path) -> None:
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    jobs = set(re.findall(r"-m[\s\",']+jobs\.([a-z_]+)", text))
    assert not {job for job in jobs if not source_of(f"jobs.{job}").exists()}
    named = set(re.findall(NAMED_FILE, text))
    assert not {name for name in named if not (ROOT / name).exists()}


# Imports everything afresh for each module, as if it were the first; what other packages do on import is their own.
IMPORT_EACH = """
import importlib, json, logging, os, sys
modules, others = json.loads(sys.argv[1])
for name in others:
    try:
        importlib.import_module(name)
    except ImportError:
        pass  # an optional one; a missing kept one fails below
events, ours = [], ("model", "pipeline", "jobs")
before = (list(logging.root.handlers), logging.root.level, dict(os.environ), os.getcwd())

def watch(event, arguments):
    if event in ("socket.connect", "socket.bind", "os.mkdir", "os.rename", "os.remove", "subprocess.Popen", "os.fork"):
        events.append([event, str(arguments)])
    elif event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
        events.append([event, str(arguments)])

sys.addaudithook(watch)
found = {}
for module in modules:
    for loaded in [name for name in sys.modules if name.partition(".")[0] in ours]:
        del sys.modules[loaded]
    events.clear()
    importlib.import_module(module)
    found[module] = list(events)
    after = (list(logging.root.handlers), logging.root.level, dict(os.environ), os.getcwd())
    if after != before:
        found[module].append(["logging, environment or folder changed", ""])
        before = after
print(json.dumps(found))
"""
# jobs.command sets the environment that Ray reads when it is imported: its one task on import.
MEANT = {"jobs.command": "logging, environment or folder changed"}


def test_importing_does_nothing(tmp_path: Path) -> None:
    others = {
        name
        for module in MODULES
        for name in imports_of(module)
        if name.partition(".")[0] not in (*ROOMS, *sys.stdlib_module_names)
    }
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "TMPDIR": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", IMPORT_EACH, json.dumps([MODULES, sorted(others)])],
        cwd=ROOT,
        env=environment | {"PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert set(found) == set(MODULES)
    assert {module: events for module, events in found.items() if events} == {}
