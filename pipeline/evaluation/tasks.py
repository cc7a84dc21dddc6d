"""Which tasks there are, and where their data is: six by name, and any of one's own.

load_task("blimp")                           # from the hub
load_task("blimp=s3://data/blimp.jsonl.zst") # a copy: local or s3://, a file or a folder; or another hub name
load_task("data/mine.jsonl")                 # one's own, named by its file: rows of one shape of evaluators.py

{"good": "The cat sleeps.", "bad": "The cat sleep."}
{"context": "Two and two are", "choices": ["four", "five"], "gold": 0}
{"context": "The capital of France is", "target": " Paris"}
"""

import gzip
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any, cast

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from pipeline.artifacts import filesystem_of, resolve_storage
from pipeline.evaluation.evaluators import EVALUATORS, Item

ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Known:
    """A task known by name: its shape, how a row of its data becomes one of that shape, and where the hub has it."""

    shape: str
    normalise: Callable[[Row], Row]
    hub: str
    files: str  # a pattern that the hub's files of the split match


@dataclass(frozen=True)
class Task:
    """A task that was read: its name and its items, all of one shape."""

    name: str
    shape: str
    items: tuple[Item, ...]

    @cached_property
    def digest(self) -> str:
        """Sixteen hex digits of the items: figures compare where they are equal."""
        content = json.dumps([[i.context, i.endings, i.gold] for i in self.items], ensure_ascii=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]


def load_task(entry: str) -> Task:
    """Read the task that an entry of `evaluate.tasks` names.

    Raises `ValueError` with one sentence that names the file, and the row, that cannot be used.
    """
    name, where = parse_entry(entry)
    known = TASKS.get(name)
    filesystem, paths = find_files(where or (known.hub if known else name), known)
    shape, items = known.shape if known else "", []
    for path in paths:
        for number, row in enumerate(read_rows(filesystem, path), start=1):
            try:
                normal = known.normalise(row) if known else row
                shape = shape or shape_of(normal)
                items.append(EVALUATORS[shape].read(normal))
            except (KeyError, TypeError, ValueError) as error:
                reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
                raise ValueError(f"Row {number} of {path} is no item of the task {name}: {reason}.") from None
    if not items:
        raise ValueError(f"The task {name} has no items in {', '.join(paths)}.")
    return Task(name, shape, tuple(items))


def parse_entry(entry: str) -> tuple[str, str]:
    """Split an entry into the task's name and where its data is, empty for the hub's.

    Raises `ValueError` for what is neither a known name nor a place.
    """
    name, equals, where = entry.partition("=")
    if not equals:
        name, where = (entry, "") if entry in TASKS else (_stem(entry), entry)
    known = ", ".join(TASKS)
    if not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", name) or (equals and not where):
        raise ValueError(f"{entry!r} names no task; write {known}, a file, or name=file.")
    if not equals and where and "/" not in where and not where.endswith(ENDINGS):
        raise ValueError(f"There is no task {entry!r}; there are {known}, and files ({', '.join(ENDINGS)}).")
    return name, where


def parse_entries(entries: Sequence[str]) -> list[tuple[str, str]]:
    """Split every entry; raises `ValueError` where two have one name, under which their figures would meet."""
    parsed = [parse_entry(entry) for entry in entries]
    names = [name for name, _ in parsed]
    double = next((name for name in names if names.count(name) > 1), None)
    if double is not None:
        raise ValueError(f"Two tasks are called {double!r}; name one of them: name=file.")
    return parsed


def subset(items: Sequence[Item], count: int) -> list[Item]:
    """Choose items by a hash of their text: always the same, in a fixed order, whatever the others are."""

    def key(item: Item) -> bytes:
        return hashlib.sha256("\0".join((item.context, *item.endings)).encode()).digest()

    return sorted(items, key=key)[:count]


def shape_of(row: Row) -> str:
    """Tell the shape of a row by its columns."""
    found = [shape for shape, evaluator in EVALUATORS.items() if set(evaluator.columns) <= set(row)]
    if not found:
        shapes = "; ".join(f"{shape}: {', '.join(each.columns)}" for shape, each in EVALUATORS.items())
        raise ValueError(f"its columns are {', '.join(row)}, and the shapes are {shapes}")
    return found[0]


# Reading ----------------------------------------------------------------------------------------------------------


def hub_filesystem() -> fsspec.AbstractFileSystem:
    """The hub's datasets as a file system: `owner/name/file`."""
    from fsspec.implementations.dirfs import DirFileSystem
    from huggingface_hub import HfFileSystem

    return DirFileSystem("datasets", cast(fsspec.AbstractFileSystem, HfFileSystem()))


def find_files(where: str, known: Known | None) -> tuple[fsspec.AbstractFileSystem, list[str]]:
    """Find the files at a path, under a folder, or in a dataset of the hub; raises `ValueError` if there are none."""
    filesystem, path = filesystem_of(resolve_storage(where))
    if filesystem.isfile(path):
        return filesystem, [path]
    on_hub = not filesystem.exists(path) and re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w.-]+)?", where) is not None
    if on_hub:
        filesystem, path = hub_filesystem(), where
    try:
        found = sorted(file for file in filesystem.find(path) if file.endswith(ENDINGS))
    except Exception as error:
        if not on_hub:
            raise
        raise ValueError(
            f"{where} is no file here, and the hub has no answer for it ({type(error).__name__});"
            f" give the data as name=path, or check the network."
        ) from None
    if on_hub and known is not None:
        found = [file for file in found if re.search(known.files, file)] or found
    if not found:
        raise ValueError(f"{where} holds no file that ends in {', '.join(ENDINGS)}.")
    return filesystem, found


def read_rows(filesystem: fsspec.AbstractFileSystem, path: str) -> Iterator[Row]:
    """Read the rows of one file; raises `ValueError` naming it, and its line, if it is damaged."""
    content = filesystem.cat_file(path)
    try:
        if path.endswith(".parquet"):
            yield from pq.read_table(pa.BufferReader(content)).to_pylist()
            return
        if path.endswith(".gz"):
            content = gzip.decompress(content)
        elif path.endswith(".zst"):
            content = b"".join(_decompress_frames(content))
        lines = content.decode("utf-8").splitlines() if b"\r" in content else content.decode("utf-8").split("\n")
    except (OSError, EOFError, UnicodeDecodeError, zstandard.ZstdError, pa.ArrowInvalid) as error:
        raise ValueError(f"{path} is damaged: {error}.") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"Line {number} of {path} is not JSON ({error}).") from None
        if not isinstance(row, dict):
            raise ValueError(f"Line {number} of {path} is not a JSON object.")
        yield row


def _decompress_frames(content: bytes) -> Iterable[bytes]:
    """Decompress Zstandard frames; raises `EOFError` where the last one is cut, which a stream reader keeps quiet."""
    while content:
        frame = zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()
        yield frame.decompress(content)
        if not frame.eof:
            raise EOFError("it ends in the middle")
        content = frame.unused_data


def _stem(path: str) -> str:
    name = PurePosixPath(path.partition("@")[0]).name
    return next((name.removesuffix(ending) for ending in ENDINGS if name.endswith(ending)), name)


# The tasks known by name: prompts as lm-eval writes them -----------------------------------------------------------


def _blimp(row: Row) -> Row:
    if "sentence_good" in row:  # the hub's
        return {"good": row["sentence_good"], "bad": row["sentence_bad"], "group": row.get("UID", "")}
    return {"good": row["good"], "bad": row["bad"], "group": row.get("uid", row.get("group", ""))}


def _lambada(row: Row) -> Row:
    if "text" in row:  # the hub's: the last word is the target
        context, _, word = row["text"].rpartition(" ")
        return {"context": context, "target": f" {word}"}
    return row if "target" in row else {"context": row["context"], "target": f" {row['continuation']}"}


def _arc(row: Row) -> Row:
    if "question" in row:  # the hub's
        choices = row["choices"]
        gold = choices["label"].index(row["answerKey"])
        return {"context": f"Question: {row['question']}\nAnswer:", "choices": choices["text"], "gold": gold}
    return row if "context" in row else {**row, "context": f"{row['query']}\nAnswer:"}


def _hellaswag(row: Row) -> Row:
    if "endings" in row:  # the hub's
        begun = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
        choices = [_without_brackets(ending) for ending in row["endings"]]
        return {"context": _without_brackets(begun), "choices": choices, "gold": int(row["label"])}
    return row if "context" in row else {**row, "context": row["query"]}


def _without_brackets(text: str) -> str:
    """Drop the marks that WikiHow's texts have in HellaSwag."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _piqa(row: Row) -> Row:
    if "goal" in row:  # the hub's
        context = f"Question: {row['goal']}\nAnswer:"
        return {"context": context, "choices": [row["sol1"], row["sol2"]], "gold": row["label"]}
    return row if "context" in row else {**row, "context": row["query"]}


def _wikitext(row: Row) -> Row:
    page = row["page"] if "page" in row else row["text"]
    return {"text": undo_wikitext(page), "counted": page}


# WikiText stands tokenized, with spaces around its marks: lm-eval scores the text without, and counts words with them.
WIKITEXT_MARKS = (
    ("s '", "s'"),
    (re.compile(r"/' [0-9]/"), r"/'[0-9]/"),
    (" @-@ ", "-"),
    (" @,@ ", ","),
    (" @.@ ", "."),
    (" : ", ": "),
    (" ; ", "; "),
    (" . ", ". "),
    (" ! ", "! "),
    (" ? ", "? "),
    (" , ", ", "),
    (re.compile(r"\(\s*([^\)]*?)\s*\)"), r"(\1)"),
    (re.compile(r"\[\s*([^\]]*?)\s*\]"), r"[\1]"),
    (re.compile(r"{\s*([^}]*?)\s*}"), r"{\1}"),
    (re.compile(r"\"\s*([^\"]*?)\s*\""), r'"\1"'),
    (re.compile(r"'\s*([^']*?)\s*'"), r"'\1'"),
    ("= = = =", "===="),
    ("= = =", "==="),
    ("= =", "=="),
    (" ° ", "°"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
)


def undo_wikitext(page: str) -> str:
    """Put a tokenized page together again, in lm-eval's order of steps."""
    for mark, replacement in WIKITEXT_MARKS:
        page = page.replace(mark, replacement) if isinstance(mark, str) else mark.sub(replacement, page)
    return page


TASKS = {
    "blimp": Known("pair", _blimp, "nyu-mll/blimp", r"train.*\.parquet$|\.jsonl$"),
    "lambada_openai": Known(
        "continuation", _lambada, "EleutherAI/lambada_openai", r"(lambada_test|default/test[^/]*)\.(jsonl|parquet)$"
    ),
    "arc_easy": Known("choices", _arc, "allenai/ai2_arc", r"ARC-Easy/test[^/]*$"),
    "hellaswag": Known("choices", _hellaswag, "Rowan/hellaswag", r"(^|/)[^/]*val[^/]*$"),
    "piqa": Known("choices", _piqa, "baber/piqa", r"(^|/)[^/]*val[^/]*$"),
    "wikitext2": Known("document", _wikitext, "EleutherAI/wikitext_document_level", r"wikitext-2-raw-v1[^/]*/.*test"),
}
