"""Text to token ids and back: byte-level BPE (trained here, or one tiktoken knows by name) and characters.

    tokenizer = train_bpe(texts, vocabulary_size=8192)
    tokenizer.save(folder)                  # tokenizer.json, which `transformers` loads with the same ids
    tokenizer = load_tokenizer(folder)      # also anybody's byte-level BPE (model/foreign_tokenizer.py)

tiktoken sees each of ours as a pattern that splits text into pieces, and tokens in order of merging. Every single byte
is a token, so every valid string can be encoded and comes back as it was.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken

from model.foreign_tokenizer import ForeignTokenizer, why_unreadable
from model.pattern import (
    CHARACTER_PATTERN,
    KNOWN_PATTERNS,
    PART_CHARACTERS,
    PATTERNS,
    check_pattern,
    simplify_pattern,
    split_by_tokenizers,
    split_long_text,
)
from model.vocabulary import END_OF_TEXT, FILES, STOP_FILES, TOKENIZER_FILE, SpecialToken, Tokenizer, written_bytes

# tiktoken's name -> tokens, the end of text included.
NAMED_TOKENIZERS = {"gpt2": 50_257, "r50k_base": 50_257, "cl100k_base": 100_258, "o200k_base": 200_000}

SPACE_BYTES = bytes(  # of all characters that \s matches
    {byte for code in range(0x10000) if chr(code).isspace() for byte in chr(code).encode()}
)
TEXTS_TO_JUDGE_BY = 8  # of those encoded together: whether most of them are indented
CONTINUATION_BYTES = bytes(range(0x80, 0xC0))


class OwnTokenizer(Tokenizer):
    """A vocabulary whose pieces merge in the order of its ids, with its pattern; the end of text is its last id."""

    def __init__(self, name: str, pattern: str, token_bytes: list[bytes]) -> None:
        """`token_bytes` holds each id's bytes, in order of merging; the last, and any id that is not used, is empty."""
        assert not token_bytes[-1], "the last id is the end of text"
        self.name = name
        self.pattern = pattern
        self.token_bytes = token_bytes
        self.end_of_text = self.begin_of_text = len(token_bytes) - 1
        self.stop_tokens = frozenset((self.end_of_text,))
        self.special_tokens = {END_OF_TEXT: SpecialToken(self.end_of_text)}
        digest = hashlib.sha256()
        for content in (*token_bytes, pattern.encode()):
            digest.update(len(content).to_bytes(4, "little") + content)
        self.digest = digest.hexdigest()
        self._may_match_nothing = pattern not in KNOWN_PATTERNS  # a user's own: every text is searched for such a match
        ranks = {token: rank for rank, token in enumerate(token_bytes) if token}
        missing = sum(bytes([byte]) not in ranks for byte in range(256))
        if missing:
            raise ValueError(f"The tokenizer {name!r} lacks {missing} of the 256 byte tokens; train it again.")
        self._character_ids = _character_table(ranks) if pattern == CHARACTER_PATTERN else None
        simpler = simplify_pattern(pattern)
        self._fast = None if simpler is None else self._build_encoding(simpler)
        self._spaces = np.array([_count_spaces(token) for token in token_bytes], dtype=np.int8)

    def __reduce__(self) -> tuple[Any, ...]:
        return OwnTokenizer, (self.name, self.pattern, self.token_bytes)

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encode several texts, which for short ones is faster than each alone."""
        try:
            if self._character_ids is not None:
                return [self._encode_characters(text) for text in texts]
            short = iter(self._encode_parts([text for text in texts if len(text) <= PART_CHARACTERS]))
            encoded = [
                (next(short) if len(text) <= PART_CHARACTERS else self._encode_long(text)).astype(
                    self.dtype, copy=False
                )
                for text in texts
            ]
            self._check_bytes(texts, encoded)
        except UnicodeEncodeError as error:
            raise ValueError(
                f"The text is not valid Unicode: character {error.start} is the lone surrogate"
                f" U+{ord(error.object[error.start]):04X}."
            ) from None
        return encoded

    def _check_bytes(self, texts: Sequence[str], encoded: Sequence[np.ndarray]) -> None:
        """Raise `ValueError` where a text's tokens do not spell all of it."""
        # A token is made of the text's own bytes, so if there are as many of them, they are the same.
        given = [len(text) if text.isascii() else len(text.encode()) for text in texts]
        kept = self._count_bytes(encoded)
        for text, ids, bytes_given, bytes_kept in zip(texts, encoded, given, kept, strict=True):
            if bytes_given == bytes_kept and not self._may_match_nothing:
                continue
            if (ids == self.end_of_text).any():
                raise ValueError(f"tokenizer.pattern matches nothing at a place of a text that begins {text[:40]!r}.")
            if bytes_given != bytes_kept:
                raise ValueError(
                    f"tokenizer.pattern leaves out {bytes_given - bytes_kept} of the {bytes_given} bytes of a text that"
                    f" begins {text[:40]!r}; end the pattern with |[\\s\\S], which matches all that is left."
                )

    def _count_bytes(self, encoded: Sequence[np.ndarray]) -> np.ndarray:
        """Count the bytes that each text's tokens spell, for all texts at once: they may be short and many."""
        lengths = np.array([len(ids) for ids in encoded])
        counts = np.zeros(len(encoded), np.int64)
        if lengths.any():
            filled = lengths > 0
            starts = (np.cumsum(lengths) - lengths)[filled]
            counts[filled] = np.add.reduceat(self.byte_lengths[np.concatenate(encoded)], starts, dtype=np.int64)
        return counts

    def _encode_long(self, text: str) -> np.ndarray:
        encoded = []
        parts = split_long_text(text, self.pattern)
        while some := list(islice(parts, 64)):  # not all at once: a text may be as large as the memory
            encoded.append(np.concatenate(self._encode_parts(some)).astype(self.dtype))
        return np.concatenate(encoded)

    def _encode_parts(self, parts: list[str]) -> list[np.ndarray]:
        if self._fast is None or not parts:
            return [self._encode_exactly(part) for part in parts]
        first, others = parts[:TEXTS_TO_JUDGE_BY], parts[TEXTS_TO_JUDGE_BY:]
        encoded, num_again = self._encode_fast(first)
        if num_again > len(first) / 2:  # indented text, as code is: most would be encoded twice
            return encoded + [self._encode_exactly(part) for part in others]
        return encoded + self._encode_fast(others)[0]

    def _encode_fast(self, parts: list[str]) -> tuple[list[np.ndarray], int]:
        """Encode with the simpler pattern, and again those for which it will not do; returns how many these were."""
        assert self._fast is not None
        if not parts:
            return [], 0
        encoded = [self._fast.encode_to_numpy(part, disallowed_special=()) for part in parts]
        starts = np.cumsum([0, *map(len, encoded[:-1])])
        again = _with_long_spaces(self._spaces[np.concatenate(encoded)], starts)
        for number in again:
            encoded[number] = self._encode_exactly(parts[number])
        return encoded, len(again)

    def _encode_exactly(self, text: str) -> np.ndarray:
        try:
            return self._exact.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:
            raise
        except ValueError:
            # tiktoken's regex engine gave up: a million spaces before a word are more than it can go back over. The
            # engine of `tokenizers` splits the text into the same pieces (`check_pattern`).
            pieces = split_by_tokenizers(self.pattern, text)
            return np.array([token for piece in pieces for token in self._exact._encode_single_piece(piece)])

    def _encode_characters(self, text: str) -> np.ndarray:
        assert self._character_ids is not None
        ids = self._character_ids[np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)]
        if (ids < 0).any():
            ids = self._exact.encode_to_numpy(text, disallowed_special=())
        return ids.astype(self.dtype)

    @cached_property
    def _exact(self) -> tiktoken.Encoding:
        return self._build_encoding(self.pattern)

    def _build_encoding(self, pattern: str) -> tiktoken.Encoding:
        ranks = {token: rank for rank, token in enumerate(self.token_bytes) if token}
        if self._may_match_nothing:
            # A match of nothing then gives a token of no bytes, where tiktoken would panic.
            ranks[b""] = self.vocab_size - 1
        special = {END_OF_TEXT: self.end_of_text}
        return tiktoken.Encoding(self.name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)

    def files(self, max_length: int | None = None) -> dict[str, str]:
        written = written_bytes()
        spelled = ["".join(written[byte] for byte in token) for token in self.token_bytes]
        vocabulary = {spelled[i]: i for i in range(self.vocab_size) if self.token_bytes[i]}
        special = {"content": END_OF_TEXT, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        split = {"type": "Split", "pattern": {"Regex": self.pattern}, "behavior": "Isolated", "invert": False}
        tokenizer = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [{"id": self.end_of_text, "special": True, **special}],
            "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
            "post_processor": None,
            "decoder": byte_level,
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": True,  # as tiktoken: a piece that is a token needs no merging
                "vocab": {**vocabulary, END_OF_TEXT: self.end_of_text},
                "merges": [] if self._character_ids is not None else _merges(spelled),
            },
        }
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "name_or_path": self.name,
            "eos_token": END_OF_TEXT,
            "bos_token": END_OF_TEXT,
            "clean_up_tokenization_spaces": False,
            "model_max_length": max_length or 10**30,  # which `transformers` writes where there is no limit
        }
        return {
            "tokenizer.json": json.dumps(tokenizer, ensure_ascii=False, indent=1) + "\n",
            "tokenizer_config.json": json.dumps(config, indent=1) + "\n",
        }


def load_tokenizer(folder: Path) -> Tokenizer:
    """Read a Hugging Face folder's tokenizer, and from the settings beside it which tokens end an answer."""
    files = {name: (folder / name).read_bytes() for name in (*FILES, *STOP_FILES) if (folder / name).is_file()}
    if TOKENIZER_FILE not in files:
        raise ValueError(why_unreadable(folder))
    return parse_tokenizer(files, where=str(folder))


def parse_tokenizer(files: Mapping[str, bytes], where: str) -> Tokenizer:
    """Build a tokenizer from the content of its files, of which `tokenizer.json` is enough for one of ours.

    `where` is for errors: raises `ValueError` with one sentence for what is no byte-level BPE.
    """
    try:
        facts = json.loads(files[TOKENIZER_FILE])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"The tokenizer.json of {where} is not JSON ({error}).") from None
    return _parse_own(facts) or ForeignTokenizer(files, where)


def _parse_own(facts: Any) -> OwnTokenizer | None:
    """Build one of our tokenizers, or None for what tiktoken would not encode as `tokenizers` does."""
    byte_of = {character: byte for byte, character in enumerate(written_bytes())}
    try:
        split, byte_level = facts["pre_tokenizer"]["pretokenizers"]
        pattern = split["pattern"]["Regex"]
        vocabulary: dict[str, int] = facts["model"]["vocab"]
        (special,) = facts["added_tokens"]
        token_bytes = [b""] * (max(vocabulary.values()) + 1)
        for spelled, token in vocabulary.items():
            if token != special["id"]:
                token_bytes[token] = bytes(byte_of[character] for character in spelled)
        is_ours = (
            (special["content"], special["id"]) == (END_OF_TEXT, len(token_bytes) - 1)
            and facts["normalizer"] is facts["post_processor"] is None
            and (split["type"], split["behavior"], split["invert"]) == ("Split", "Isolated", False)
            and (byte_level["type"], byte_level["use_regex"]) == ("ByteLevel", False)
            and not byte_level["add_prefix_space"]
            and (facts["model"]["type"], facts["model"]["ignore_merges"]) == ("BPE", True)
        )
    except (KeyError, TypeError, IndexError, ValueError, AttributeError):
        return None
    if not is_ours:
        return None
    is_char = pattern == CHARACTER_PATTERN
    written = written_bytes()
    merges = [] if is_char else _merges(["".join(written[byte] for byte in token) for token in token_bytes])
    given = [merge if isinstance(merge, str) else " ".join(merge) for merge in facts["model"]["merges"]]
    return OwnTokenizer("char" if is_char else "bpe", pattern, token_bytes) if merges == given else None


def named_tokenizer(name: str) -> Tokenizer:
    """Return one of tiktoken's own; it is downloaded at first use, or read from `TIKTOKEN_CACHE_DIR`."""
    if name not in NAMED_TOKENIZERS:
        raise ValueError(f"There is no tokenizer {name!r}; by name there are {', '.join(NAMED_TOKENIZERS)}.")
    try:
        encoding = tiktoken.get_encoding(name)
    except OSError as error:
        raise ValueError(
            f"The tokenizer {name!r} could not be downloaded ({type(error).__name__});"
            f" set TIKTOKEN_CACHE_DIR to a folder that holds it."
        ) from None
    # The tokens after the end of text (fill in the middle, end of prompt) are never used here, and are left out.
    end_of_text = encoding._special_tokens[END_OF_TEXT]
    token_bytes = [b""] * (end_of_text + 1)
    for token, rank in encoding._mergeable_ranks.items():
        token_bytes[rank] = token
    # To the regex engine of `tokenizers`, {1,3}+ means repetition, not possession; without the + both agree.
    return OwnTokenizer(name, encoding._pat_str.replace("{1,3}+", "{1,3}"), token_bytes)


def train_bpe(texts: Iterable[str], vocabulary_size: int, pattern: str = PATTERNS["gpt4"]) -> Tokenizer:
    """Learn a byte-level BPE; small corpora may yield fewer tokens than asked for.

    Memory grows with the number of different pieces (words), not with the text.
    """
    from tokenizers import Regex, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as BPETrainer

    if vocabulary_size < 257:
        raise ValueError(f"A BPE vocabulary holds at least 257 tokens; {vocabulary_size} is too few.")
    check_pattern(pattern)
    learner = BPETrainer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size - 1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[],
        show_progress=False,
        max_token_length=64,  # a ruler of a thousand dashes is not a word
    )
    parts = (part for text in texts for part in split_long_text(text, pattern))
    learner.train_from_iterator(parts, trainer=trainer)
    byte_of = {character: byte for byte, character in enumerate(written_bytes())}
    learned = sorted(learner.get_vocab().items(), key=lambda item: item[1])
    merged = [bytes(byte_of[character] for character in spelled) for spelled, _ in learned if len(spelled) > 1]
    return OwnTokenizer("bpe", pattern, [*(bytes([byte]) for byte in range(256)), *merged, b""])


def build_char(texts: Iterable[str], vocabulary_size: int) -> Tokenizer:
    """One token per character: the most frequent ones; all others fall back to their UTF-8 bytes."""
    if vocabulary_size < 257:
        raise ValueError(f"A character vocabulary holds at least 257 tokens; {vocabulary_size} is too few.")
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    beyond_ascii = sorted((-count, character) for character, count in counts.items() if ord(character) >= 128)
    characters = [character.encode() for _, character in beyond_ascii[: vocabulary_size - 257]]
    return OwnTokenizer("char", CHARACTER_PATTERN, [*(bytes([byte]) for byte in range(256)), *characters, b""])


def _count_spaces(token: bytes) -> int:
    """Count the white space characters that end in a token of nothing else; -1 if it holds anything else.

    A token may be a part of a character: one that only begins a character counts none, and so many bytes as go on
    with one count as many.
    """
    if not token or token.translate(None, SPACE_BYTES):
        return -1
    whole = token.lstrip(CONTINUATION_BYTES)
    return min(len(token) - len(whole) + len(whole.decode(errors="ignore")), 100)


def _with_long_spaces(spaces: np.ndarray, starts: np.ndarray) -> list[int]:
    """Find the texts in which neighbouring tokens of white space may hold three characters of it, or more.

    `spaces` holds the tokens of all texts as `_count_spaces` counts them, and text i begins at `starts[i]`.
    """
    places = (spaces >= 0).nonzero()[0]
    if len(places) == 0:
        return []
    owners = starts.searchsorted(places, side="right") - 1
    is_first = (np.diff(places) != 1) | (np.diff(owners) != 0)
    firsts = np.concatenate(([0], is_first.nonzero()[0] + 1))
    lengths = np.add.reduceat(spaces[places], firsts, dtype=np.int64)
    return np.unique(owners[firsts[lengths >= 3]]).tolist()


def _merges(spelled: list[str]) -> list[str]:
    """List every pair that makes a token, in the order of the tokens: what tiktoken merges without a list."""
    known = set(spelled)
    return [
        f"{token[:cut]} {token[cut:]}"
        for token in spelled
        for cut in range(1, len(token))
        if token[:cut] in known and token[cut:] in known
    ]


def _character_table(ranks: dict[bytes, int]) -> np.ndarray:
    """Map each code point to its id, or -1 where it is spelled in bytes."""
    table = np.full(0x110000, -1, dtype=np.int32)
    for token, rank in ranks.items():
        if len(token) > 1 or token[0] < 128:
            table[ord(token.decode())] = rank
    return table
