"""Leaks are planted in documents, whole and altered; all are found, and nothing else is."""

import random

import numpy as np
import pytest

from pipeline.corpus.contamination import RUN_WORDS, Runs, hash_runs

VOCABULARY = [f"{first}{second}" for first in ("ba", "de", "ki", "lo", "mu", "na") for second in ("r", "st", "nt", "l")]
Texts = list[str]


def write_text(words: int, random_words: random.Random) -> str:
    return " ".join(random_words.choices(VOCABULARY, k=words))


@pytest.fixture
def items() -> Texts:
    """A hundred questions of 13 to 40 words."""
    random_words = random.Random(1)
    return [write_text(random_words.randint(RUN_WORDS, 40), random_words) for _ in range(100)]


@pytest.fixture
def documents() -> Texts:
    random_words = random.Random(2)
    return [write_text(random_words.randint(5, 300), random_words) for _ in range(300)]


@pytest.fixture
def runs(items: Texts) -> Runs:
    return Runs.of({"asked": [(item,) for item in items]})


def disguise(text: str, how: int) -> str:
    """Write the same words otherwise."""
    return (text, text.upper(), text.replace(" ", ",\n"), f"“{text.title()}”", text.replace(" ", "  - "))[how % 5]


def test_every_planted_leak_is_found(runs: Runs, items: Texts, documents: Texts) -> None:
    random_words = random.Random(3)
    for number, item in enumerate(items):
        words = item.split()
        start = random_words.randint(0, len(words) - RUN_WORDS)
        leak = " ".join(words[start : start + RUN_WORDS])  # the shortest part that counts
        host = documents[number]
        cut = host.find(" ", len(host) // 2)
        for planted in (
            disguise(leak, number),
            f"{host[:cut]} {disguise(item, number)} {host[cut:]}",
            f"{host} {leak}",
        ):
            assert runs.find(planted) == "asked", planted


def test_nothing_else_is_found(runs: Runs, items: Texts, documents: Texts) -> None:
    assert not any(runs.find(text) for text in documents)
    for number, item in enumerate(items):
        words = item.split()
        nearly = " ".join(words[: RUN_WORDS - 1])  # one word too few
        assert not runs.find(f"{documents[number]}. {nearly} otherwise {documents[-number - 1]}")
        swapped = [*words[:6], "unheard", *words[7:13]]
        assert not runs.find(" ".join(swapped))
        assert not runs.find(" ".join(reversed(words[:13]))) or words[:13] == words[12::-1]
    for text in ("", "   ", "one word"):
        assert not runs.find(text)


def test_a_document_counts_under_the_first_task_that_it_shares_words_with(items: Texts) -> None:
    both = Runs.of({"first": [(items[0],)], "second": [(items[0],), (items[1],)], "none": []})
    assert both.find(f"{items[1]} {items[0]}") == "first"
    assert both.find(items[1]) == "second"


def test_items_too_short_to_be_recognised_are_counted() -> None:
    runs = Runs.of({"short": [("two words",), ("two words", " ".join(VOCABULARY)), ("",)]})
    [task] = runs.tasks
    assert (task.items, task.short) == (3, 2)
    assert not Runs.of({"short": [("two words",)]}).find("two words")


def test_in_a_script_without_spaces_a_word_is_a_character() -> None:
    question = "水在海平面上加热到多少度时会沸腾"
    runs = Runs.of({"chinese": [(question,)]})
    assert runs.find(f"他问：{question}？没有人知道。") == "chinese"
    assert not runs.find(question[: RUN_WORDS - 1])


def test_runs_come_back_from_bytes_and_the_same_items_give_the_same(runs: Runs, items: Texts) -> None:
    content = runs.to_bytes()
    assert content == Runs.of({"asked": [(item,) for item in items]}).to_bytes()
    again = Runs.from_bytes(content)
    assert again.tasks[0].name == "asked"
    assert (again.tasks[0].items, again.tasks[0].short) == (100, 0)
    assert np.array_equal(again.tasks[0].hashes, runs.tasks[0].hashes)
    assert again.find(items[7]) == "asked"


def test_there_is_one_run_for_each_place_where_thirteen_words_begin() -> None:
    assert len(hash_runs(" ".join(VOCABULARY))) == len(VOCABULARY) - RUN_WORDS + 1
    assert len(set(hash_runs("a " * 30).tolist())) == 1
