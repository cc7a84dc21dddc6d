"""The house keeps its shape: imports run one way, importing does nothing, and what is named is there.

infra ··names··▶ jobs ▶ pipeline ▶ model ▶ torch
                        verbs ▶ wings ▶ frame; of the wings only training ▶ corpus and search ▶ training
"""

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
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


# Which parts of pipeline/ a part may import.
FRAME = {
    "addresses",
    "config",
    "presets",
    "artifacts",
    "stages",
    "tracking",
    "registry",
    "lease",
    "preflight",
    "orchestrator",
}
WINGS = {"corpus", "training", "evaluation", "search", "serving", "records", "export"}
MAY_IMPORT = {
    "verb": {"frame", *WINGS},
    "frame": {"frame"},
    "preflight": {"frame", "corpus", "training"},  # tries what the wings will do
    "orchestrator": {"frame", "corpus", "lease"},  # the text's fingerprint; stages by name
    "lease": {"frame"},
    "corpus": {"frame", "corpus"},
    "training": {"frame", "training", "corpus"},
    "evaluation": {"frame", "evaluation"},
    "search": {"frame", "orchestrator", "lease", "training", "search"},  # a trial is a training, asked for by name
    "serving": {"frame", "serving"},
    "records": {"frame", "records", "corpus", "training", "lease"},  # reads what all have made
    "export": {"frame", "export"},
}


def part_of(name: str) -> str:
    """Which part of pipeline/ a module belongs to; those at the top of the frame are parts of their own."""
    first = name.split(".")[1]
    if first in WINGS or first in MAY_IMPORT:
        return first
    return "frame" if first in FRAME else "verb"


@pytest.mark.parametrize("module", [module for module in MODULES if module.startswith("pipeline.")])
def test_imports_run_one_way_inside_the_pipeline(module: str) -> None:
    modules = {name for name in imports_of(module) if name in MODULES and name.startswith("pipeline.")}
    wings = {name for name in imports_of(module) if name in {f"pipeline.{wing}" for wing in WINGS}}
    assert {part_of(name) for name in modules | wings} <= MAY_IMPORT[part_of(module)]


def test_every_module_of_the_pipelines_first_level_is_a_verb_or_the_frames() -> None:
    first_level = {path.stem for path in (ROOT / "pipeline").glob("*.py")} - {"__init__"}
    assert first_level == FRAME | {verb.partition(".")[2] for verb in VERBS}
    assert len(first_level) <= 16, "a new verb or frame file makes room first"
    assert {path.parent.name for path in (ROOT / "pipeline").glob("*/__init__.py")} == WINGS


def test_only_the_live_engine_knows_the_engine() -> None:
    knowing = {module for module in MODULES if "model.engine" in set(imports_of(module))}
    assert {module for module in knowing if not module.startswith("model.")} == {"pipeline.serving.live_engine"}


def test_a_trainings_loop_reads_its_plan_and_never_the_config() -> None:
    assert "pipeline.config.Config" not in set(imports_of("pipeline.training.worker"))


@pytest.mark.parametrize("module", [module for module in MODULES if not module.startswith("jobs.")])
def test_ray_is_started_in_jobs_alone(module: str) -> None:
    calls = [node.func for node in ast.walk(ast.parse(source_of(module).read_text())) if isinstance(node, ast.Call)]
    starts = [call for call in calls if isinstance(call, ast.Attribute) and ast.unparse(call) == "ray.init"]
    assert not starts


@pytest.mark.parametrize("module", MODULES)
def test_no_pattern_has_what_early_pythons_3_11_match_wrongly(module: str) -> None:
    """`(a+|b)*+` finds nothing before Python 3.11.5, Debian's 3.11.2 among them (python/cpython#106052)."""
    calls = [node for node in ast.walk(ast.parse(source_of(module).read_text())) if isinstance(node, ast.Call)]
    patterns = [
        str(part.value, "latin-1") if isinstance(part.value, bytes) else part.value
        for call in calls
        if ast.unparse(call.func).startswith("re.") and call.args
        for part in ast.walk(call.args[0])
        if isinstance(part, ast.Constant) and isinstance(part.value, str | bytes)
    ]
    assert not [pattern for pattern in patterns if re.search(r"(?<!\\)[*+?}]\+|\(\?>", pattern)]


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_has_one_name_in_every_room(stage: str) -> None:
    assert source_of(f"pipeline.{stage}").exists()
    assert source_of(f"jobs.{stage}").exists()
    assert list((ROOT / "tests/pipeline").glob(f"test_{stage}*.py"))


def test_infra_holds_no_python_logic() -> None:
    assert not list((ROOT / "infra").rglob("*.py"))


def tracked(*patterns: str) -> list[Path]:
    """The files that belong to the project, as git sees them."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *patterns]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    found = [ROOT / name for name in done.stdout.splitlines()]
    return sorted(path for path in found if path.exists())


PYTHON_FILES = tracked("*.py")


@pytest.mark.parametrize("path", PYTHON_FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_file_over_450_lines_says_at_its_head_why(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 450 or "Long because" in (ast.get_docstring(ast.parse(text)) or "")


def tree_of(readme: Path) -> set[str]:
    """What a README's tree names: files and folders, those under a folder with the folder before them."""
    blocks = re.findall(r"^```\n(.*?)^```$", readme.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    (tree,) = [block for block in blocks if re.match(r"[\w.-]+(/|\.py) ", block)]
    names: set[str] = set()
    folder = ""
    for indent, words in re.findall(r"^( *)(\S.*)$", tree, re.MULTILINE):
        listed = re.match(r"((?:[\w.-]+(?:/|\.\w+)\s+)+)", words)
        assert listed, words
        for name in listed[1].split():
            folder = name if name.endswith("/") and not indent else folder
            names.add(f"{folder}{name}" if indent else name)
    return names


@pytest.mark.parametrize("readme", ["README.md", "model/README.md", "pipeline/README.md"])
def test_the_tree_that_a_readme_draws_is_the_tree_on_disk(readme: str) -> None:
    drawn, room = tree_of(ROOT / readme), (ROOT / readme).parent
    files = {path.relative_to(room) for path in tracked() if path.is_relative_to(room)}
    there = {f"{path.parts[0]}/" for path in files if len(path.parts) > 1 and not path.parts[0].startswith(".")}
    if room != ROOT:
        there |= {path.name for path in files if len(path.parts) == 1 and path.suffix == ".py"}
        # A folder is drawn file by file, or not at all.
        opened = {name.partition("/")[0] for name in drawn if not name.endswith("/") and "/" in name}
        there |= {
            path.as_posix() if len(path.parts) == 2 else f"{path.parts[0]}/{path.parts[1]}/"
            for path in files
            if path.parts[0] in opened
        }
    assert drawn == {name for name in there if not name.endswith("__init__.py")}


def test_what_is_installed_is_every_package_there_is() -> None:
    rooms = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"][
        "packages"
    ]
    assert set(rooms) == set(ROOMS)  # each with all that lies in it
    folders = {path.parent for path in PYTHON_FILES if path.relative_to(ROOT).parts[0] in ROOMS}
    assert not {folder for folder in folders if not (folder / "__init__.py").exists()}


def texts() -> list[Path]:
    """What a person reads or a cluster runs."""
    infra = [path for path in (ROOT / "infra").rglob("*") if path.is_file() and path.suffix != ".json"]
    return [*tracked("*README.md"), *infra, ROOT / "Makefile"]


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
