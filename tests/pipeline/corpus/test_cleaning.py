"""Planted duplicates are found, different texts stay, and the quality rule knows prose."""

import io
import random
import re
from pathlib import Path

import pytest

from pipeline.config import PrepareConfig
from pipeline.corpus import cleaning

VOCABULARY = [f"word{n}" for n in range(3000)]


def make_text(generator: random.Random, words: int = 200) -> list[str]:
    return generator.choices(VOCABULARY, k=words)


def change(words: list[str], share: float, generator: random.Random) -> list[str]:
    """Replace one run of words: the shingles outside of it stay the same."""
    size = round(len(words) * share)
    start = generator.randrange(len(words) - size)
    return [*words[:start], *make_text(generator, size), *words[start + size :]]


def similarity(left: list[str], right: list[str]) -> float:
    runs = [{tuple(words[i : i + cleaning.SHINGLE_WORDS]) for i in range(len(words) - 4)} for words in (left, right)]
    return len(runs[0] & runs[1]) / len(runs[0] | runs[1])


def find(units: list[list[str]], partitions: int = 3, **settings: object) -> dict[tuple[int, int], set[str]]:
    """Sign and compare as the stage does; return (unit, position) -> the kinds of duplicate it is."""
    chosen = PrepareConfig(**settings)  # type: ignore[arg-type]
    files: dict[str, list[bytes]] = {}
    for texts in units:
        for kind, content in cleaning.sign_documents(enumerate(texts), chosen, partitions):
            files.setdefault(kind, []).append(content)
    found: dict[tuple[int, int], set[str]] = {}
    for kind, contents in files.items():
        for partition in range(partitions):
            handles = [io.BytesIO(content) for content in contents]
            dropped = cleaning.find_duplicates(kind, partition, handles, chosen.near_duplicate_similarity)
            for unit, positions in dropped.items():
                for position in positions:
                    found.setdefault((unit, position), set()).add(kind)
    return found


def test_of_equal_texts_the_first_stays() -> None:
    units = [["a", "b", "a"], ["c", "b"], ["a", "d"], []]
    assert set(find(units, drop_exact_duplicates=True)) == {(0, 2), (1, 1), (2, 0)}


@pytest.mark.parametrize("partitions", [1, 7])
def test_planted_near_duplicates_are_found_and_little_else(partitions: int) -> None:
    generator = random.Random(5)
    originals = [make_text(generator) for _ in range(400)]
    near = [change(words, 0.04, generator) for words in originals[:150]]
    far = [change(words, 0.35, generator) for words in originals[150:300]]
    assert min(similarity(*pair) for pair in zip(originals, near, strict=False)) > 0.84
    assert max(similarity(*pair) for pair in zip(originals[150:], far, strict=False)) < 0.55
    units = [[" ".join(words) for words in group] for group in (originals[:200], originals[200:], near, far)]
    found = set(find(units, partitions, drop_near_duplicates=True))
    planted = {(2, position) for position in range(len(near))}
    recall = len(found & planted) / len(planted)
    precision = len(found & planted) / len(found)
    assert recall >= 0.95
    assert precision >= 0.98


def test_the_number_of_partitions_changes_nothing() -> None:
    generator = random.Random(6)
    texts = [make_text(generator, 80) for _ in range(60)]
    units = [[" ".join(words) for words in texts], [" ".join(change(words, 0.05, generator)) for words in texts]]
    settings = {"drop_near_duplicates": True, "drop_exact_duplicates": True}
    assert find(units, 1, **settings) == find(units, 5, **settings)


def test_case_and_punctuation_do_not_hide_a_near_duplicate() -> None:
    text = " ".join(make_text(random.Random(7)))
    assert (1, 0) in find([[text], [text.upper().replace(" ", ", ")]], drop_near_duplicates=True)


def test_texts_without_words_are_left_alone() -> None:
    assert find([["!!!", "???"], ["...", ""]], drop_near_duplicates=True) == {}


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.9, 0.95])
def test_the_bands_find_nearly_all_pairs_at_the_threshold(threshold: float) -> None:
    bands, rows = cleaning.bands_for(threshold)
    assert bands * rows <= cleaning.NUM_HASHES
    assert 1 - (1 - threshold**rows) ** bands >= cleaning.LEAST_RECALL


def test_a_long_document_is_signed_in_bounded_memory() -> None:
    text = " ".join(make_text(random.Random(8), 300_000))
    signature = cleaning.minhash(text)
    assert signature is not None
    assert len(signature) == cleaning.NUM_HASHES


PROSE = (
    "The map applies a function to every item of an iterable, and yields the results. It is lazy, so that a long input "
    "is never held in memory; this matters for files that are larger than the machine they are read on. In the end it "
    "is you who decides when the work is done, and on which of the workers that you have with the data at hand."
)


@pytest.mark.parametrize(
    ("text", "is_prose"),
    [
        (PROSE, True),
        (PROSE[:100], False),
        ("# " * 40 + PROSE, False),
        ("\n".join(f"{n} {n * 7} {n * 13}" for n in range(100)), False),
        ("Buy cheap watches online now! " * 40, False),
        ("\n".join(["This is the line that is in it all the time."] * 30), False),
        (" ".join(VOCABULARY[:100]), False),
        ("Das ist ein deutscher Satz, den die Regel nicht behalten soll, weil sie Englisch erwartet. " * 10, False),
    ],
)
def test_the_quality_rule_keeps_prose(text: str, is_prose: bool) -> None:
    assert cleaning.reads_like_prose(text) is is_prose


def test_reasons_are_named_and_nothing_is_dropped_by_default(tmp_path: Path) -> None:
    bounded = PrepareConfig(min_characters=10, max_characters=200, quality_filter=True)
    assert cleaning.reason_to_drop("short", bounded) == cleaning.TOO_SHORT
    assert cleaning.reason_to_drop("x" * 201, bounded) == cleaning.TOO_LONG
    assert cleaning.reason_to_drop("x" * 50, bounded) == cleaning.LOW_QUALITY
    assert cleaning.reason_to_drop("", PrepareConfig()) == ""


@pytest.mark.parametrize(
    ("first", "last"),
    [("\u4e00", "\u9fa5"), ("\u3041", "\u3093"), ("\u0e01", "\u0e2e"), ("\u1780", "\u17a2"), ("\u1000", "\u1021")],
    ids=["Chinese", "Japanese", "Thai", "Khmer", "Myanmar"],
)
def test_near_duplicates_are_found_in_scripts_without_spaces(first: str, last: str) -> None:
    generator = random.Random(9)
    alphabet = [chr(code) for code in range(ord(first), ord(last) + 1)]

    def sentence() -> str:
        return "".join(generator.choices(alphabet, k=400))

    texts = [sentence() for _ in range(30)]
    near = [f"{text[:200]}{generator.choice(alphabet)}{text[201:]}" for text in texts]
    found = set(find([texts, near, [sentence() for _ in range(30)]], drop_near_duplicates=True))
    assert found == {(1, position) for position in range(30)}


def test_words_of_scripts_with_spaces_are_what_they_were() -> None:
    text = "Naïve über_all foo12 don't — Привет, мир! 한국어 문장 ελληνικά हिन्दी"
    assert cleaning._WORD.findall(text) == re.findall(r"\w+", text)
