"""Some megabytes of real English on every machine: the documentation that Python and its packages carry.

Docstrings are read out of the .py files, nothing is imported: importing a package may do anything.
"""

import ast
import importlib.metadata
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

LIMIT_BYTES = 10_000_000
# Packages that the pipeline's own dependencies bring, those with the most prose first.
PACKAGES = ("numpy", "pandas", "networkx", "scipy", "sklearn", "matplotlib", "sqlalchemy", "torch")
MIN_CHARACTERS = 200

_SKIPPED_FOLDERS = {"test", "tests", "testing", "idlelib", "lib2to3", "site-packages", "dist-packages", "_vendor"}
# A triple-quoted string at the start of a file or right after a line that ends in a colon.
_DOCSTRING = re.compile(
    r'(?:\A(?:[ \t]*#[^\n]*\n|[ \t]*\n)*|:[ \t]*\n[ \t]*)([rR]?"""[^"\\]*(?:(?:\\.|"(?!""))[^"\\]*)*""")', re.DOTALL
)
_LETTERS = re.compile(r"[A-Za-z ]+")
_WORDS = re.compile(r"[a-z']+")
_COMMON_WORDS = re.compile(r"\b(?:the|of|to|and|a|in|is|for|that|if|it|be|as|are|this|or|with|by|not|an|from|on|can)\b")


def packages() -> list[str]:
    """Name the packages that are read, with their versions."""
    names = {"sklearn": "scikit-learn"}
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(names.get(package, package))}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def documents(limit_bytes: int = LIMIT_BYTES) -> Iterator[str]:
    """Yield the language reference, then docstrings that read like prose, each once, up to a limit."""
    seen: set[str] = set()
    left = limit_bytes
    for text in _raw_documents():
        text = _clean(text)
        if text in seen or not _is_prose(text):
            continue
        seen.add(text)
        left -= len(text.encode("utf-8", "replace"))
        if left < 0:
            return
        yield text


def _raw_documents() -> Iterator[str]:
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield topics[name]
    paths = sysconfig.get_paths()
    yield from _docstrings(Path(paths["stdlib"]))
    for package in PACKAGES:
        yield from _docstrings(Path(paths["purelib"]) / package)


def _docstrings(folder: Path) -> Iterator[str]:
    for _, source in python_files(folder):
        for match in _DOCSTRING.finditer(source):
            if len(match[1]) >= MIN_CHARACTERS and (text := read_literal(match[1])):
                yield text


def python_files(folder: Path) -> Iterator[tuple[Path, str]]:
    """Yield each .py file below a folder and its source, in a fixed order; tests and what others brought left out."""
    for path in sorted(folder.rglob("*.py"), key=lambda path: path.relative_to(folder).parts):
        if _SKIPPED_FOLDERS & set(path.relative_to(folder).parts):
            continue
        try:
            yield path, path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue


def read_literal(literal: str) -> str:
    """The text of a string as it stands in a source; empty where Python would not read it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an unknown escape in somebody's docstring
            return str(ast.literal_eval(literal))
    except (SyntaxError, ValueError):
        return ""


def _clean(text: str) -> str:
    """Take away the indentation, and the paragraphs that are console sessions, not prose."""
    lines = text.expandtabs().splitlines()
    indents = [len(line) - len(line.lstrip()) for line in lines[1:] if line.strip()]
    indent = min(indents, default=0)
    text = "\n".join([line.strip() for line in lines[:1]] + [line[indent:].rstrip() for line in lines[1:]])
    paragraphs = [each for each in re.split(r"\n\s*\n", text) if ">>>" not in each and each.strip()]
    return "\n\n".join(paragraph.strip("\n") for paragraph in paragraphs).strip()


def _is_prose(text: str) -> bool:
    """Mostly ASCII letters, with the commonest English words: code, tables and lists of names are not."""
    if len(text) < MIN_CHARACTERS:
        return False
    if sum(map(len, _LETTERS.findall(text))) < 0.75 * len(text):
        return False
    lower = text.lower()
    return len(_COMMON_WORDS.findall(lower)) > 0.2 * len(_WORDS.findall(lower))
