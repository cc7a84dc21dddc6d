"""Conversations on every machine: what a function or class of Python does, and the first sentence of its docstring.

    for name, sentence in definitions(): ...     # "textwrap.dedent", "Remove any common leading whitespace …"

They come out of the same files as `python_docs`, which are read as text: nothing is imported.
"""

import hashlib
import json
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from pipeline.corpus.python_docs import PACKAGES, python_files, read_literal

LIMIT_BYTES = 2_000_000  # of conversations, about what there is; for progress
LENGTHS = range(20, 121)  # characters of a sentence
MOST_NAME_CHARACTERS = 40  # question and answer, which both say the name, fit into the 128 tokens of the demo
QUESTIONS = (
    "What does `{}` do?",
    "What is `{}`?",
    "What is `{}` for?",
    "Explain `{}`.",
    "Can you tell me what `{}` does?",
    "When would I use `{}`?",
)

_DEFINITION = re.compile(r"^([ ]*)(?:async )?(def|class) (\w+)", re.MULTILINE)
_DOCSTRING = re.compile(r':[ \t]*(?:#[^\n]*)?\n[ \t]*([rR]?"""[^"\\]*(?:(?:\\.|"(?!""))[^"\\]*)*""")', re.DOTALL)
# A point before a small letter ends no sentence: "e.g. an array".
_SENTENCE = re.compile(r"[A-Z](?:[^.!?]|[.!?](?!\s+[^a-z]|\s*\Z))*[.](?=\s+[^a-z]|\s*\Z)")
_PLAIN = re.compile(r"[A-Za-z0-9 ,.'`()\-]+")
# Names by which people know what lies in a file of another name.
_KNOWN_AS = {"posixpath": "os.path", "_collections_abc": "collections.abc", "_pydecimal": "decimal", "_pyio": "io"}


def conversations() -> Iterator[str]:
    """Yield each question and its answer as the JSON of `corpus.conversations`, in an order that tells nothing."""
    found = sorted(dict(definitions()).items(), key=lambda row: _digest(row[0]))
    for name, sentence in found:
        question = QUESTIONS[_digest(name)[-1] % len(QUESTIONS)].format(name)
        yield json.dumps([["user", question], ["assistant", f"`{name}`: {sentence}"]], separators=(",", ":"))


def definitions() -> Iterator[tuple[str, str]]:
    """Yield the public functions, methods and classes that have a docstring, each with its first sentence."""
    paths = sysconfig.get_paths()
    roots = [(Path(paths["stdlib"]), "")] + [(Path(paths["purelib"]) / package, package) for package in PACKAGES]
    for root, package in roots:
        for path, source in python_files(root):
            module = ".".join(filter(None, (package, *path.relative_to(root).with_suffix("").parts)))
            module = module.removesuffix(".__init__")
            yield from _definitions_of(_KNOWN_AS.get(module, module), source)


def _definitions_of(module: str, source: str) -> Iterator[tuple[str, str]]:
    """Yield the names and first sentences of one file; what is private, or within a function, is left out."""
    matches = list(_DEFINITION.finditer(source))
    around: list[tuple[int, str, str]] = []  # (indentation, kind, name) of what the next definition stands in
    for number, match in enumerate(matches):
        indentation, kind, name = len(match[1]), match[2], match[3]
        while around and around[-1][0] >= indentation:
            around.pop()
        around.append((indentation, kind, name))
        names = [*module.split("."), *(each for _, _, each in around)]
        if any(each.startswith("_") for each in names) or any(each == "def" for _, each, _ in around[:-1]):
            continue
        if len(".".join(names)) > MOST_NAME_CHARACTERS:
            continue
        end = matches[number + 1].start() if number + 1 < len(matches) else len(source)
        docstring = _DOCSTRING.search(source, match.end(), end)
        sentence = _first_sentence(read_literal(docstring[1])) if docstring else ""
        if sentence:
            yield ".".join(names), sentence


def _first_sentence(text: str) -> str:
    """The first sentence of a docstring if it is plain prose of a fair length, else nothing."""
    paragraph = " ".join(text.strip().split("\n\n")[0].split()).replace("``", "`")
    if not paragraph.endswith("."):
        paragraph += "."
    match = _SENTENCE.match(paragraph)
    if match is None or len(match[0]) not in LENGTHS or not _PLAIN.fullmatch(match[0]):
        return ""
    return match[0] if match[0].count("(") == match[0].count(")") else ""  # "(e.g." ends no sentence


def _digest(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()
