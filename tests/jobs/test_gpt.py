"""`gpt`: every job by one name, from anywhere, and what a shell offers at TAB."""

import ast
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import jobs
import jobs.__main__ as gpt
from jobs import completion

ROOT = Path(__file__).parents[2]


def call(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `gpt` in a process of its own, away from the checkout."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return subprocess.run(
        [sys.executable, "-m", "jobs", *words],
        cwd="/",
        env=os.environ | {"PYTHONPATH": path} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_gpt_alone_lists_the_jobs_in_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpt.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    for job, does in gpt.list_jobs().items():
        (line,) = [line for line in lines if line.split()[:1] == [job]]
        assert line.endswith(does)
        assert does.endswith(".")


def test_what_can_be_started_as_a_module_is_a_job() -> None:
    started = set()
    for path in (ROOT / "jobs").glob("[a-z]*.py"):
        tests = [ast.unparse(node.test) for node in ast.parse(path.read_text()).body if isinstance(node, ast.If)]
        started |= {path.stem for test in tests if test == "__name__ == '__main__'"}
    assert set(gpt.list_jobs()) == started


def test_a_preset_goes_by_its_name_from_anywhere() -> None:
    done = call("plan", "gpt-53m", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["name"] == "gpt-53m"


def test_a_jobs_usage_says_how_it_was_called() -> None:
    done = call("plan")
    assert done.returncode == 2
    assert done.stderr.startswith("usage: python -m jobs plan ")
    assert "say what to run: a preset, such as demo" in done.stderr


def test_an_unknown_job_is_named_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        gpt.main(["plane"])
    assert left.value.code == 2
    assert "there is no job 'plane'; did you mean plan?" in capsys.readouterr().err


def test_the_version_says_what_it_stands_on(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        gpt.main(["--version"])
    assert left.value.code == 0
    told = capsys.readouterr().out
    assert told.startswith("gpt-53m ")
    assert f"Python {sys.version_info.major}.{sys.version_info.minor}" in told
    assert "ray 2." in told


@pytest.mark.parametrize(
    ("line", "number", "job"),
    [
        ("gpt ", 1, None),
        ("gpt pla", 1, None),  # still being typed
        ("gpt plan ", 1, "plan"),
        ("gpt plan demo 'train.sample_prompts=[a", 1, "plan"),
        ("python -m jobs plan de", 3, "plan"),
    ],
)
def test_the_job_before_the_cursor_completes_the_rest(line: str, number: int, job: str | None) -> None:
    environment = {completion.ASKED: str(number), "COMP_LINE": line, "COMP_POINT": str(len(line))}
    assert completion.job_being_typed(environment) == job
    assert environment[completion.ASKED] == str(number + (job is not None))


@pytest.mark.parametrize(
    ("line", "offered", "not_offered"),
    [
        ("gpt ", {"plan", "pipeline", "serve"}, {"demo.yaml", "command"}),
        ("gpt plan gpt", {"gpt-53m", "gpt2-124m"}, {"demo"}),
        ("gpt plan demo train.step", {"train.steps="}, {"train.seed="}),
        ("gpt plan demo --gpu", {"--gpu", "--gpus-per-node"}, {"--mfu"}),
        ("gpt generate hello --preset d", {"demo"}, {"name="}),
    ],
)
def test_a_shell_offers_what_fits(line: str, offered: set[str], not_offered: set[str], tmp_path: Path) -> None:
    told = tmp_path / "told"
    call(
        _ARGCOMPLETE="1",
        _ARGCOMPLETE_IFS="\n",
        _ARGCOMPLETE_STDOUT_FILENAME=str(told),
        COMP_LINE=line,
        COMP_POINT=str(len(line)),
        COMP_TYPE="9",
    )
    words = {word.strip() for word in told.read_text().splitlines()}
    assert offered <= words
    assert not not_offered & words


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_a_shell_gets_its_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpt.main(["--completion", shell]) == 0
    assert "_ARGCOMPLETE" in capsys.readouterr().out


def test_a_wheel_holds_the_presets_and_leaves_the_tree_clean(tmp_path: Path) -> None:
    tree, built = tmp_path / "tree", tmp_path / "built"
    for name in subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines():
        if (ROOT / name).exists():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_bytes((ROOT / name).read_bytes())
    before = {path.relative_to(tree) for path in tree.rglob("*")}
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(built)]
    subprocess.run(command, cwd=tree, check=True, capture_output=True)
    assert {path.relative_to(tree) for path in tree.rglob("*")} == before
    (wheel,) = built.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    assert {f"jobs/presets/{path.name}" for path in (Path(jobs.__path__[0]) / "presets").glob("*.yaml")} <= held
    assert {"model/cpu/kernel.cpp", "pipeline/tokenizer.py"} <= held
    assert not [name for name in held if name.startswith("tests/")]
    points = next(name for name in held if name.endswith("entry_points.txt"))
    assert "gpt = jobs.__main__:main" in zipfile.ZipFile(wheel).read(points).decode()
