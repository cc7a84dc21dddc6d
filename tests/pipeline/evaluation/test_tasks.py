import gzip
import json
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from fsspec.implementations.dirfs import DirFileSystem

from pipeline.evaluation import tasks
from pipeline.evaluation.evaluators import Item
from pipeline.evaluation.tasks import TASKS, load_task, parse_entry, subset, undo_wikitext

PAIRS = [{"good": f"The cats number {n}.", "bad": f"The cats numbers {n}."} for n in range(5)]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if path.suffix == ".zst":
        content = zstandard.compress(content)
    elif path.suffix == ".gz":
        content = gzip.compress(content)
    path.write_bytes(content)
    return str(path)


# What the hub has, what a copy may have, and the first item that both become.
ROWS = {
    "blimp": (
        {"sentence_good": "Cats sleep.", "sentence_bad": "Cats sleeps.", "UID": "agreement", "pairID": "0"},
        {"uid": "agreement", "pair": 0, "good": "Cats sleep.", "bad": "Cats sleeps."},
        Item((" Cats sleep.", " Cats sleeps."), counted=("Cats sleep.", "Cats sleeps."), group="agreement"),
    ),
    "lambada_openai": (
        {"text": "He put the key into the lock"},
        {"context": "He put the key into the", "continuation": "lock"},
        Item((" lock",), "He put the key into the"),
    ),
    "arc_easy": (
        {
            "question": "What falls?",
            "choices": {"text": ["rain", "light"], "label": ["A", "B"]},
            "answerKey": "A",
        },
        {"query": "Question: What falls?", "choices": ["rain", "light"], "gold": 0},
        Item((" rain", " light"), "Question: What falls?\nAnswer:", 0, ("rain", "light")),
    ),
    "hellaswag": (
        {
            "activity_label": "Baking",
            "ctx_a": "A man stands [title] there.",
            "ctx_b": "he",
            "endings": ["bakes [step] it.", "flies."],
            "label": "0",
        },
        {"query": "Baking: A man stands. there. He", "choices": ["bakes it.", "flies."], "gold": 0},
        Item((" bakes it.", " flies."), "Baking: A man stands. there. He", 0, ("bakes it.", "flies.")),
    ),
    "piqa": (
        {"goal": "Open a jar", "sol1": "Turn it.", "sol2": "Eat it.", "label": 0},
        {"query": "Question: Open a jar\nAnswer:", "choices": ["Turn it.", "Eat it."], "gold": 0},
        Item((" Turn it.", " Eat it."), "Question: Open a jar\nAnswer:", 0, ("Turn it.", "Eat it.")),
    ),
    "wikitext2": (
        {"page": " = A = \n It was , they said , 1 @,@ 000 .\n"},
        {"text": " = A = \n It was , they said , 1 @,@ 000 .\n"},
        Item((" = A =\nIt was, they said, 1,000 .\n",), counted=(" = A = \n It was , they said , 1 @,@ 000 .\n",)),
    ),
}


@pytest.mark.parametrize("name", TASKS)
def test_a_task_reads_what_the_hub_has_and_what_a_copy_has(name, tmp_path):
    hubs, copy, item = ROWS[name]
    for place, row in (("hub", hubs), ("copy", copy)):
        task = load_task(f"{name}={write_lines(tmp_path / place / 'rows.jsonl', [row])}")
        assert (task.name, task.shape, task.items) == (name, TASKS[name].shape, (item,))


@pytest.mark.parametrize("ending", tasks.ENDINGS)
def test_ones_own_task_is_named_by_its_file_and_known_by_its_columns(ending, tmp_path):
    path = tmp_path / f"mine{ending}"
    if ending == ".parquet":
        pq.write_table(pa.Table.from_pylist(PAIRS), path)
    else:
        write_lines(path, PAIRS)
    task = load_task(str(path))
    assert (task.name, task.shape, len(task.items)) == ("mine", "pair", 5)
    assert task.digest == load_task(f"named={path}").digest


@pytest.mark.parametrize(
    ("row", "shape"),
    [
        ({"good": "a", "bad": "b"}, "pair"),
        ({"context": "a", "choices": ["b", "c"], "gold": 1}, "choices"),
        ({"context": "a", "target": " b"}, "continuation"),
        ({"text": "a"}, "document"),
    ],
)
def test_the_columns_say_the_shape(row, shape, tmp_path):
    assert load_task(write_lines(tmp_path / "mine.jsonl", [row])).shape == shape


def test_a_folder_is_all_of_its_files(tmp_path):
    write_lines(tmp_path / "both" / "a.jsonl", PAIRS[:2])
    write_lines(tmp_path / "both" / "b.jsonl.zst", PAIRS[2:])
    (tmp_path / "both" / "README.md").write_text("not an item")
    assert len(load_task(f"mine={tmp_path}/both").items) == 5


def test_a_name_is_found_on_the_hub(tmp_path, monkeypatch):
    write_lines(tmp_path / "nyu-mll/blimp/adjunct_island/train.jsonl", PAIRS[:3])
    write_lines(tmp_path / "me/mine/data.jsonl", PAIRS)
    hub = DirFileSystem(str(tmp_path), fsspec.filesystem("file"))
    monkeypatch.setattr(tasks, "hub_filesystem", lambda: hub)
    assert len(load_task("blimp").items) == 3
    assert load_task("me/mine").name == "mine"
    assert len(load_task("other=me/mine").items) == 5


def test_a_hub_that_does_not_answer_is_said_to(monkeypatch):
    class Away:
        def find(self, path: str) -> list[str]:
            raise ConnectionError(path)

    monkeypatch.setattr(tasks, "hub_filesystem", Away)
    with pytest.raises(ValueError, match=r"^nyu-mll/blimp is no file here, and the hub has no answer for it \(Conn"):
        load_task("blimp")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("blimpy", "There is no task 'blimpy'; there are blimp, lambada_openai"),
        ("blimp=", "'blimp=' names no task"),
        ("=x.jsonl", "'=x.jsonl' names no task"),
        ("a b=x.jsonl", "'a b=x.jsonl' names no task"),
    ],
)
def test_an_entry_that_names_no_task_is_refused(entry, message):
    with pytest.raises(ValueError, match=message):
        parse_entry(entry)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"good": "a"}\n', "Row 1 of .*mine.jsonl is no item of the task mine: its columns are good, and the shapes"),
        (b'{"context": "a", "choices": ["b", "c"], "gold": 2}\n', "Row 1 of .* gold is 2, with 2 choices"),
        (b'{"good": "a", "bad": "b"}\n{"good": "a"}', "Row 2 of .*: it lacks 'bad'"),
        (b'{"good": "a", "bad": "b"}\n{"good"', "Line 2 of .*mine.jsonl is not JSON"),
        (b"[1]\n", "Line 1 of .* is not a JSON object"),
        (b"\xff\xfe\n", "mine.jsonl is damaged"),
        (b"", "The task mine has no items in .*mine.jsonl"),
    ],
)
def test_rows_that_are_no_items_are_named(content, message, tmp_path):
    (tmp_path / "mine.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_task(str(tmp_path / "mine.jsonl"))


@pytest.mark.parametrize("ending", [".jsonl.zst", ".jsonl.gz", ".parquet"])
def test_a_cut_file_is_damaged_wherever_it_is_cut(ending, tmp_path):
    path = tmp_path / f"mine{ending}"
    if ending == ".parquet":
        pq.write_table(pa.Table.from_pylist(PAIRS), path)
    else:
        write_lines(path, PAIRS)
    content = path.read_bytes()
    for length in range(1, len(content), 7):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=rf"mine{ending} is damaged"):
            load_task(str(path))


def test_a_file_of_several_frames_is_read_to_its_end(tmp_path):
    path = tmp_path / "mine.jsonl.zst"
    path.write_bytes(b"".join(zstandard.compress((json.dumps(row) + "\n").encode()) for row in PAIRS))
    assert len(load_task(str(path)).items) == 5


def test_a_subset_is_the_same_whatever_else_there_is():
    items = [Item((f"ending {n}",), "context") for n in range(100)]
    chosen = subset(items, 10)
    assert chosen == subset(items[::-1], 10)
    kept = [item for item in chosen if item in items[:50]]
    assert kept == subset(items[:50], len(kept))
    assert len(subset(items, 1000)) == 100


def test_wikitext_is_put_together_again():
    assert undo_wikitext(' He said : " no " ( or so ) @-@ like ; the dogs \' tails .') == (
        ' He said: "no" (or so)-like; the dogs\' tails .'
    )
