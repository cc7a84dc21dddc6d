"""Tokenizers give every text back, write what `transformers` reads, and stay fast on hostile texts."""

import json
import pickle
import random
import time
import unicodedata
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import tiktoken_ext.openai_public
from hypothesis import given, settings
from hypothesis import strategies as st

from model.pattern import (
    KNOWN_PATTERNS,
    O200K_PATTERN,
    PART_CHARACTERS,
    PATTERNS,
    check_pattern,
    compare_engines,
    probes,
    simplify_pattern,
    split_long_text,
)
from model.tokenizer import (
    END_OF_TEXT,
    NAMED_TOKENIZERS,
    OwnTokenizer,
    Tokenizer,
    build_char,
    load_tokenizer,
    named_tokenizer,
    train_bpe,
)

CORPUS = [
    "The map applies a function to every item of an iterable, yielding the results; don't stop.",
    "Résumé naïve café — “quoted”, 12345 numbers, 3.14159 and\r\nline breaks.\n\n\tIndented.",
    "日本語のテキストと漢字。Смешанный текст. مرحبا",
    "def main(argv):\n    return [item for item in argv if item]\n",
] * 3
# Its vocabulary has runs of white space, and white space with what follows.
SPACED_CORPUS = [*CORPUS, "\n\n\n    x\r\n\r\n  y\t\t\tz   .\u3000\u3000a\xa0b\n" * 20]
ODD_TEXTS = [
    "",
    " ",
    "\0",
    "a\0b",
    "line\r\nline\r\n",
    "  leading and trailing  ",
    f"before {END_OF_TEXT} after",
    END_OF_TEXT,
    "\ufeffmark",
    "👩‍👩‍👧 e\u0301 \U0010ffff \ud7ff",
    "x = 1;\n\n\n\ny = 2\n",
]
EVERY_CHARACTER = "".join(chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000)


ALL_PATTERNS = {**PATTERNS, "o200k": O200K_PATTERN}


@pytest.fixture(scope="module", params=[*ALL_PATTERNS, "char"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    if request.param == "char":
        return build_char(CORPUS, 300)
    return train_bpe(CORPUS, 420, ALL_PATTERNS[request.param])


@pytest.mark.parametrize("text", [*ODD_TEXTS, *CORPUS[:4]])
def test_a_text_comes_back_as_it_was(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids.dtype == np.uint16
    assert tokenizer.decode(ids) == text
    assert int(tokenizer.byte_lengths[ids].sum()) == len(text.encode())


def test_every_character_of_unicode_comes_back(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode(EVERY_CHARACTER)) == EVERY_CHARACTER


@settings(max_examples=60, deadline=None)
@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_any_string_comes_back(text: str) -> None:
    tokenizer = load_small()
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("name", ALL_PATTERNS)
@settings(max_examples=400, deadline=None)
@given(
    text=st.text(
        alphabet=st.one_of(
            st.sampled_from(" \t\n\r\x0b\x1c\x85\xa0\u2003\u2028\u3000"),
            st.sampled_from("aZÉß'sSt19½.,!/日\u0301\u02b0\u01c5🌍"),
            st.characters(exclude_categories=["Cs"]),
        )
    )
)
def test_the_faster_pattern_gives_the_same_tokens(name: str, text: str) -> None:
    tokenizer = load_for(name)
    assert tokenizer._fast is not None
    expected = tokenizer._exact.encode_to_numpy(text, disallowed_special=())
    assert tokenizer.encode(text).tolist() == expected.tolist()


@pytest.mark.parametrize("name", ALL_PATTERNS)
@pytest.mark.parametrize("text", ["a b\n\nc d", 'no, no.\n\nWell 10 "men" don\'t\n', "naïve — “so”…\n\n“Yes”\n\n–"])
def test_ordinary_text_takes_the_fast_way(name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_for(name)
    monkeypatch.setitem(vars(tokenizer), "_exact", None)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@cache
def load_for(name: str) -> Tokenizer:
    return train_bpe(SPACED_CORPUS, 500, ALL_PATTERNS[name])


@pytest.mark.parametrize("name", ALL_PATTERNS)
@settings(max_examples=100, deadline=None)
@given(texts=st.lists(st.text(alphabet="ab \n\u3000“"), max_size=20))
def test_texts_encoded_together_do_not_touch(name: str, texts: list[str]) -> None:
    tokenizer = load_for(name)
    together = [ids.tolist() for ids in tokenizer.encode_all(texts)]
    assert together == [tokenizer._exact.encode_to_numpy(text, disallowed_special=()).tolist() for text in texts]


def test_of_many_indented_texts_a_few_are_encoded_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_for("gpt2")
    tried = []

    class Fast:
        def encode_to_numpy(self, text: str, **options: object) -> np.ndarray:
            tried.append(text)
            return fast.encode_to_numpy(text, **options)

    fast = tokenizer._fast
    monkeypatch.setattr(tokenizer, "_fast", Fast())
    texts = [f"def f{number}():\n    return {number}" for number in range(20)]
    together = [ids.tolist() for ids in tokenizer.encode_all(texts)]
    assert together == [tokenizer._exact.encode_to_numpy(text, disallowed_special=()).tolist() for text in texts]
    assert tried == texts[:8]


def test_other_patterns_are_left_as_they_are() -> None:
    assert simplify_pattern(r"\w+|\W") is None
    assert simplify_pattern(r"\p{L}++\p{L}|\s++$|\s+(?!\S)|\s") is None


def load_small(cache: list[Tokenizer] = []) -> Tokenizer:  # noqa: B006
    if not cache:
        cache.append(train_bpe(CORPUS, 320))
    return cache[0]


def test_the_end_of_text_is_the_last_id_and_never_comes_from_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.end_of_text == tokenizer.vocab_size - 1
    assert tokenizer.end_of_text not in tokenizer.encode(f"x{END_OF_TEXT}{END_OF_TEXT}")
    assert tokenizer.decode([*tokenizer.encode("done"), tokenizer.end_of_text]) == "done"
    assert tokenizer.byte_lengths[tokenizer.end_of_text] == 0


def test_a_lone_surrogate_is_an_error(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"lone surrogate U\+D800"):
        tokenizer.encode("a\ud800")


def test_a_saved_tokenizer_comes_back_from_one_file(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    loaded = load_tokenizer(tmp_path)
    assert loaded.digest == tokenizer.digest
    assert loaded.end_of_text == tokenizer.end_of_text
    assert pickle.loads(pickle.dumps(tokenizer)).digest == tokenizer.digest


@pytest.mark.parametrize("model_type", ["gpt2", "qwen3"])
def test_transformers_loads_it_with_the_same_ids(tokenizer: Tokenizer, tmp_path: Path, model_type: str) -> None:
    from transformers import AutoTokenizer

    tokenizer.save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert len(theirs) == tokenizer.vocab_size
    assert theirs.eos_token_id == tokenizer.end_of_text
    for text in [*ODD_TEXTS, *CORPUS[:4], *([EVERY_CHARACTER] if model_type == "gpt2" else [])]:
        ids = theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert ids == tokenizer.encode(text).tolist()
        assert theirs.decode(ids) == text


def test_training_twice_gives_the_same_tokenizer() -> None:
    assert train_bpe(CORPUS, 400).digest == train_bpe(iter(CORPUS), 400).digest != train_bpe(CORPUS, 399).digest


def test_a_trained_vocabulary_compresses() -> None:
    text = CORPUS[0]
    assert len(train_bpe(CORPUS, 420).encode(text)) < len(text) / 2


def test_characters_outside_the_vocabulary_are_spelled_in_bytes() -> None:
    tokenizer = build_char(["aé"], 300)
    assert tokenizer.vocab_size == 258
    assert tokenizer.encode("aé日").tolist() == [97, 256, *"日".encode()]


def test_the_most_frequent_characters_are_kept() -> None:
    assert build_char(["ééé日日ж"], 259).token_bytes[256:] == ["é".encode(), "日".encode(), b""]


@pytest.mark.parametrize("pattern", ALL_PATTERNS)
def test_cutting_a_long_text_leaves_its_ids_as_they_were(pattern: str) -> None:
    tokenizer = train_bpe(CORPUS, 420, ALL_PATTERNS[pattern])
    text = "\n".join([*CORPUS, "  x \n\n  y's\t.\n/ z。\nword\n  \nend "] * 20)
    parts = list(split_long_text(text, tokenizer.pattern, 400))
    assert "".join(parts) == text
    assert len(parts) > 10
    whole = tokenizer._exact.encode_to_numpy(text, disallowed_special=())
    assert [token for part in parts for token in tokenizer.encode(part)] == whole.tolist()


CUT_PLACES = st.text(
    alphabet=st.one_of(
        st.sampled_from(" \t\n\r\x0b\x1c\x85\xa0\u3000"),
        st.sampled_from("aZÉß'sS7½.,/_日ไ\u0301\u02b0ſ。、「🌍"),
        st.characters(exclude_categories=["Cs"]),
    ),
    max_size=40,
)


@pytest.mark.parametrize("name", ALL_PATTERNS)
@settings(max_examples=300, deadline=None)
@given(text=CUT_PLACES)
def test_every_place_where_a_long_text_is_cut_ends_a_piece(name: str, text: str) -> None:
    tokenizer = load_for(name)
    parts = list(split_long_text(text, tokenizer.pattern, 1))
    assert "".join(parts) == text
    whole = tokenizer._exact.encode_to_numpy(text, disallowed_special=())
    assert [token for part in parts for token in tokenizer.encode(part)] == whole.tolist()


@pytest.mark.parametrize(
    "text", ["日本語の文。短い文、「長い」文！" * 400, "SGVsbG8gd29ybGQ" * 400, "word, " * 400, "x\ny" * 400]
)
def test_texts_of_every_script_have_places_to_cut(text: str) -> None:
    assert max(map(len, split_long_text(text, PATTERNS["gpt4"], 500))) < 600


HOSTILE = {
    "letters": lambda: "".join(random.Random(1).choices("abdehilnorst", k=100_000)),
    "letters and marks": lambda: "กำ" * 40_000,
    "digits": lambda: "".join(random.Random(1).choices("0123456789", k=100_000)),
    "punctuation": lambda: "".join(random.Random(1).choices("'.,;!?", k=100_000)),
    "spaces": lambda: " " * 100_000 + "x",
    "line breaks": lambda: "".join(random.Random(1).choices("\r\n \t", k=100_000)) + "x",
}


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("name", ALL_PATTERNS)
def test_a_long_text_without_a_place_to_cut_has_the_ids_of_tiktoken(name: str, kind: str) -> None:
    tokenizer, text = load_for(name), HOSTILE[kind]()
    assert len(text) > 2 * PART_CHARACTERS
    assert tokenizer.encode(text).tolist() == tokenizer._exact.encode_ordinary(text)


@pytest.mark.parametrize("name", ALL_PATTERNS)
def test_what_tiktokens_engine_cannot_go_back_over_is_split_by_the_other(name: str) -> None:
    tokenizer = load_for(name)
    text = " " * 2_000_000 + "x y"
    with pytest.raises(ValueError, match="Regex error"):
        tokenizer._exact.encode_to_numpy(text, disallowed_special=())
    ids = tokenizer.encode(text).tolist()
    assert tokenizer.decode(ids) == text
    end = tokenizer._exact.encode_ordinary("  x y")[1:]
    assert ids[-len(end) :] == end
    assert ids[: -len(end)] == tokenizer._exact._encode_single_piece(" " * 1_999_999)


def test_a_pattern_that_is_not_known_is_never_cut_for() -> None:
    text = "to be, or not to be " * 5000
    pattern = r"[^,]+|,"  # pieces far longer than a part
    assert list(split_long_text(text, pattern)) == [text]
    tokenizer = OwnTokenizer("bpe", pattern, load_small().token_bytes)
    assert tokenizer.encode(text).tolist() == tokenizer._exact.encode_ordinary(text)


@pytest.mark.parametrize("unit", ["a", " ", "\n", "^", "日", "ab1! ", "\r\n"])
def test_a_million_characters_without_a_break_take_seconds_not_hours(unit: str) -> None:
    text = unit * (1_000_000 // len(unit))
    tokenizer = load_small()
    start = time.perf_counter()
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert time.perf_counter() - start < 20


def test_a_million_random_letters_take_seconds() -> None:
    text = "".join(random.Random(1).choices("abdehilnorst", k=1_000_000))
    tokenizer = load_small()
    start = time.process_time()
    ids = tokenizer.encode(text)
    assert time.process_time() - start < 20
    assert tokenizer.decode(ids) == text


def test_tiktokens_own_vocabularies_end_at_the_end_of_text(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"th": 256}
    specials = {END_OF_TEXT: 258, "<|fim_prefix|>": 259}  # 257 is a hole, as in cl100k_base
    encoding = tiktoken.Encoding("x", pat_str=r"\p{N}{1,3}+|[\s\S]", mergeable_ranks=ranks, special_tokens=specials)
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)
    tokenizer = named_tokenizer("cl100k_base")
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (259, 258)
    assert tokenizer.pattern == r"\p{N}{1,3}|[\s\S]"


@pytest.mark.parametrize("name", NAMED_TOKENIZERS)
def test_the_size_of_a_named_vocabulary_is_known_before_it_is_downloaded(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for download in ("load_tiktoken_bpe", "data_gym_to_mergeable_bpe_ranks"):
        monkeypatch.setattr(tiktoken_ext.openai_public, download, lambda *_, **__: {})
    facts = getattr(tiktoken_ext.openai_public, name)()
    assert NAMED_TOKENIZERS[name] == facts["special_tokens"][END_OF_TEXT] + 1


def test_unknown_names_and_broken_patterns_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="by name there are gpt2"):
        named_tokenizer("gpt5")
    with pytest.raises(ValueError, match="at least 257"):
        train_bpe(CORPUS, 256)
    with pytest.raises(ValueError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": {}}')
    with pytest.raises(ValueError, match="no tokenizer of the `tokenizers` library"):
        load_tokenizer(tmp_path)


# -- Patterns ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", KNOWN_PATTERNS)
def test_both_engines_agree_on_the_patterns_that_are_known(pattern: str) -> None:
    compare_engines(pattern)


def test_the_probes_hold_every_category_of_unicode() -> None:
    found = {unicodedata.category(character) for probe in probes() for character in probe}
    assert found == {unicodedata.category(chr(code)) for code in range(0x110000)} - {"Cs"}


@pytest.mark.parametrize(
    "pattern", [r"\p{L}+|[\s\S]", r"\S+|\s+", r"[^\n]+|\n", r" ?\p{Han}+| ?[^\p{Han}]", r"\d+|[\s\S]"]
)
def test_a_pattern_on_which_both_engines_agree_is_accepted(pattern: str) -> None:
    check_pattern(pattern)
    tokenizer = train_bpe(CORPUS, 300, pattern)
    for text in [*ODD_TEXTS, *CORPUS[:4]]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


REFUSED = {
    "(": "not a regular expression",
    r"\X": "not a regular expression",
    r"\p{L}+": "text would be lost",
    r"[\x00-\uffff]": "text would be lost",
    ".": "text would be lost",
    r"\p{L}*|[\s\S]": "can match nothing",
    r"\p{L}*": "can match nothing",
    r"(?=a)|[\s\S]": "can match nothing",
    r"(?s).": "means nothing to `tokenizers`",
    r"\p{Script=Han}|[\s\S]": "means nothing to `tokenizers`",
    r"\w+|\W+": "differently",
    r"[[:alpha:]]+|[\s\S]": "differently",
}


@pytest.mark.parametrize("pattern", REFUSED)
def test_a_pattern_that_would_change_texts_is_refused_before_any_text_is_read(pattern: str) -> None:
    with pytest.raises(ValueError, match=REFUSED[pattern]):
        check_pattern(pattern)
    with pytest.raises(ValueError, match=REFUSED[pattern]):
        train_bpe(CORPUS, 300, pattern)


@pytest.mark.parametrize("pattern", [r"[^\u5b57]", r"a*|[^a]"])
def test_a_pattern_that_loses_bytes_of_a_text_says_so_when_it_meets_that_text(pattern: str) -> None:
    tokenizer = OwnTokenizer("bpe", pattern, load_small().token_bytes)
    with pytest.raises(ValueError, match=r"tokenizer\.pattern (leaves out|matches nothing)"):
        tokenizer.encode_all(["a", "ab字"])
