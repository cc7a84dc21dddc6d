"""How text is split into pieces before merging: the patterns, where a long text may be cut, and which pattern will do.

Two regex engines have to agree on a pattern: tiktoken's, which encodes here, and that of `tokenizers`, which learns the
vocabulary and reads it wherever transformers does.
"""

import random
import re
import unicodedata
from collections.abc import Iterator
from functools import cache

import tiktoken

# GPT-4's, with numbers in as many digits as are put in: what tells the patterns of most models apart.
_GPT4 = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}DIGITS| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
# How text is split before merging. Each ends a piece wherever a single space stands before a word.
PATTERNS = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    # In twos: a small vocabulary has no room for a thousand of three digits.
    "gpt4": _GPT4.replace("DIGITS", "{1,2}"),
    # Under these names llama.cpp splits so, as it does under gpt-2; the one with twos it does not know (model/gguf.py).
    "llama-bpe": _GPT4.replace("DIGITS", "{1,3}"),
    "qwen2": _GPT4.replace("DIGITS", ""),
}
# tiktoken's o200k_base, as `named_tokenizer` spells it; cl100k_base has that of llama-bpe.
O200K_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHARACTER_PATTERN = r"[\s\S]"

# Every pattern here ends so: of a run of white space before a word, all but the last character are one piece.
LOOKAHEADS = (r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s", r"|\s++$|\s+(?!\S)|\s", r"|\s*[\r\n]+|\s+(?!\S)|\s+")
SIMPLER = (r"|\s+$|\s*[\r\n]|\s{3,}|\s", r"|\s+$|\s{3,}|\s", r"|\s*[\r\n]+|\s+$|\s{3,}|\s")
KNOWN_PATTERNS = (*PATTERNS.values(), O200K_PATTERN, CHARACTER_PATTERN)

# Longer texts are encoded in parts, because a text may be as large as the memory.
PART_CHARACTERS = 32_768
_PUNCTUATION = r"[.,;:!?()\[\]{}<>\"/\\|+=*&^%$#@~`_\-。、，．！？：；「」『』（）【】《》…—·]"
# Places where every pattern above ends a piece: before a single space between two words, after a single line break
# before a word, between a word and punctuation other than an apostrophe, and between a letter and a digit.
_SAFE_CUT = re.compile(
    r"(?<=[^\W_])(?= [^\W_])|(?<=\S\n)(?=[^\W_])"
    rf"|(?<=[^\W_])(?={_PUNCTUATION})|(?<=[A-Za-z])(?=[0-9])|(?<=[0-9])(?=[A-Za-z])"
)


def check_pattern(pattern: str) -> None:
    """Raise `ValueError` unless both regex engines split every probe into the same pieces, and these make it up."""
    if pattern in KNOWN_PATTERNS:  # a test has checked them
        return
    compare_engines(pattern)


def compare_engines(pattern: str) -> None:
    """Do what `check_pattern` does, for any pattern."""
    try:
        encoding = tiktoken.Encoding("probe", pat_str=pattern, mergeable_ranks=_pair_ranks(), special_tokens={})
    except Exception as error:
        raise ValueError(f"tokenizer.pattern is not a regular expression: {error}.") from None
    nothing = encoding.encode_single_token(b"")
    for probe in probes():
        try:
            ids = encoding.encode_to_numpy(probe, disallowed_special=()).tolist()
        except Exception as error:
            raise ValueError(f"tokenizer.pattern fails on the text {probe!r}: {error}.") from None
        if nothing in ids:
            raise ValueError(
                f"tokenizer.pattern can match nothing, as in {probe!r}; each match needs a character (+ instead of *)."
            )
        if encoding.decode_bytes(ids) != probe.encode():
            raise ValueError(
                f"tokenizer.pattern does not match every character of {probe!r}, so text would be lost; end it with"
                r" |[\s\S], which matches all that is left."
            )
        try:
            pieces = split_by_tokenizers(pattern, probe)
        except Exception as error:
            raise ValueError(
                f"tokenizer.pattern means nothing to `tokenizers`, with which transformers reads it: {error}."
            ) from None
        if [token for piece in pieces for token in encoding._encode_single_piece(piece)] != ids:
            raise ValueError(
                f"tokenizer.pattern splits {probe!r} differently in tiktoken and in `tokenizers`, so other programs"
                r" would read other tokens; write classes such as \p{L} for \w, and [\s\S] for a dot."
            )


@cache
def _pair_ranks() -> dict[bytes, int]:
    """Return a vocabulary by whose tokens it shows where pieces begin: all single bytes, and all pairs in any order."""
    pairs = [bytes((first, second)) for first in range(256) for second in range(256)]
    random.Random(0).shuffle(pairs)
    tokens = [*(bytes([byte]) for byte in range(256)), *pairs, b""]  # a match of nothing would make tiktoken panic
    return {token: rank for rank, token in enumerate(tokens)}


@cache
def probes() -> tuple[str, ...]:
    """Return texts of every category of Unicode, short ones first: alone, repeated, and among others."""
    # A few of each category, from all over; of what is not assigned those that never will be.
    by_category: dict[str, list[str]] = {"Cn": ["\ufdd0", "\uffff", "\U0010ffff"]}
    for code in range(0x110000):
        category = unicodedata.category(chr(code))
        if category not in ("Cs", "Cn"):
            by_category.setdefault(category, []).append(chr(code))
    few = [found[:: max(1, len(found) // 5)] for _, found in sorted(by_category.items())]
    white_space = [chr(code) for code in range(0x3001) if chr(code).isspace()]
    characters = [*map(chr, range(256)), *white_space, *(character for some in few for character in some)]
    characters += "\u200b\u200c\u200d\u2060\ufeff\u017f\u212a\u0130"  # joiners; letters whose case folds to ASCII
    chance = random.Random(0)
    mixed = [
        "".join(chance.choices(chance.choice((characters, white_space + list("aZ1.\n"), list("aZ1. '\n"))), k=length))
        for length in (2, 3, 5, 8, 20, 100)
        for _ in range(120)
    ]
    contractions = ["don't I'LL we'Ve it'ſ a's'd", "Ünïcödé wörds, 123 numbers;\n\n  \tspaces\r\n日本語 'quotes' end "]
    return (*characters, *(3 * character for character in characters), *mixed, *contractions)


def split_long_text(text: str, pattern: str, part_characters: int = PART_CHARACTERS) -> Iterator[str]:
    """Cut a long text where the pattern ends a piece anyway, so that its ids stay what they were.

    A part is longer where there is no such place, and a pattern that is not known is never cut for.
    """
    start = 0
    while pattern in KNOWN_PATTERNS and (cut := _SAFE_CUT.search(text, start + part_characters)):
        yield text[start : cut.start()]
        start = cut.start()
    if start < len(text) or not text:
        yield text[start:]


def split_by_tokenizers(pattern: str, text: str) -> list[str]:
    """Split a text into the pieces of a pattern with the regex engine of `tokenizers`."""
    from tokenizers import Regex, pre_tokenizers

    return [piece for piece, _ in pre_tokenizers.Split(Regex(pattern), "isolated").pre_tokenize_str(text)]


def simplify_pattern(pattern: str) -> str | None:
    """Return a pattern without look-ahead and possessive repetition, or None where that is not known to be safe.

    With these, tiktoken's regex engine backtracks; without, it is an automaton, and encoding 1.7 times as fast. The
    pieces are the same except where three or more white space characters stand before a word: these become one
    piece, by whose tokens it is noticed (`_with_long_spaces`). In the patterns known here no repetition could give
    back anything with which the rest of its part would match, so possession changes nothing.
    """
    if pattern not in (*PATTERNS.values(), O200K_PATTERN):
        return None
    for ending, simpler in zip(LOOKAHEADS, SIMPLER, strict=True):
        if pattern.endswith(ending):
            begin = pattern.removesuffix(ending)
            return begin.replace("++", "+").replace("?+", "?").replace("*+", "*") + simpler
    return None
