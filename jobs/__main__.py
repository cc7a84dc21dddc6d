"""Every job by one name: `gpt` lists them, and `gpt JOB …` is `python -m jobs.JOB …`.

    gpt                                          the jobs, a line each
    gpt plan gpt-53m --gpu h100                  a preset goes by its name, wherever one stands
    gpt --version
    eval "$(gpt --completion bash)"              the shell completes jobs, options, presets and settings; also zsh, fish

`python -m jobs` is the same where nothing is installed.
"""

import ast
import difflib
import importlib
import importlib.metadata
import os
import pkgutil
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

import jobs
from jobs import completion
from jobs.command import make_parser, run_plainly

PROJECT = "gpt-53m"
TOLD_VERSIONS = ("torch", "ray", "mlflow")  # what a report of a fault needs beside our own


def list_jobs() -> dict[str, str]:
    """Each job's name and what it does, read from its file: importing all of them would take seconds."""
    found = {}
    for module in pkgutil.iter_modules(jobs.__path__):
        tree = ast.parse((Path(jobs.__path__[0]) / f"{module.name}.py").read_text(encoding="utf-8"))
        starts = any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body)
        if starts and not module.name.startswith("_"):
            found[module.name] = (ast.get_docstring(tree) or "").partition("\n")[0]
    return found


def describe_jobs() -> str:
    found = list_jobs()
    width = max(map(len, found))
    return "\n".join(f"  {name:<{width}}  {does}" for name, does in found.items())


def describe_version() -> str:
    """This project's version and those of what it stands on."""

    def version(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    others = ", ".join(f"{package} {version(package)}" for package in TOLD_VERSIONS)
    return f"{PROJECT} {version(PROJECT)} (Python {platform.python_version()}, {others})"


def start(job: str, words: Sequence[str]) -> int:
    """Be the job of that name; its usage line says how it was called."""
    sys.argv = [f"{called_as()} {job}", *words]
    status: int = importlib.import_module(f"jobs.{job}").main(list(words))
    return status


def called_as() -> str:
    name = Path(sys.argv[0]).name
    return "python -m jobs" if name == "__main__.py" else name


def choose(words: Sequence[str]) -> int:
    """Start the job that the first word names, or answer an option of `gpt` itself."""
    parser = make_parser(__doc__)
    parser.prog = called_as()
    parser.epilog = f"jobs:\n{describe_jobs()}"
    job = parser.add_argument("job", nargs="?", metavar="JOB", help="one of those below; JOB --help says what it takes")
    completion.offer(job, lambda prefix, **_: iter(list_jobs()))
    parser.add_argument("words", nargs="*", metavar="WORD", help="the job's own")
    parser.add_argument("--version", action="version", version=describe_version())
    parser.add_argument("--completion", choices=completion.SHELLS, help="print what makes a shell complete")
    options = parser.parse_args(words)
    if options.job is not None:
        near = difflib.get_close_matches(options.job, list_jobs(), n=1)
        parser.error(f"there is no job {options.job!r}" + (f"; did you mean {near[0]}?" if near else ""))
    if options.completion:
        print(completion.script(options.completion))
    else:
        print(f"{parser.prog} JOB …   (JOB --help says what it takes)\n\n{describe_jobs()}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    job = completion.job_being_typed(os.environ) if completion.is_asked(os.environ) else next(iter(words), None)
    if job in list_jobs():
        return start(job, words[1:])
    return run_plainly(lambda: choose(words))


if __name__ == "__main__":
    sys.exit(main())
