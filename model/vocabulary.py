"""What a tokenizer is to all who use one: ids, what each spells in bytes, and special tokens, which have names."""

import re
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np

END_OF_TEXT = "<|endoftext|>"
TOKENIZER_FILE = "tokenizer.json"
# All that a Hugging Face folder may say of its tokenizer, and where it says which tokens end an answer.
FILES = (
    *(TOKENIZER_FILE, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja"),
)
STOP_FILES = ("config.json", "generation_config.json")


@dataclass(frozen=True)
class SpecialToken:
    """A token that has a name instead of bytes, and what of the text around a written name belongs to it."""

    token: int
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False

    def pattern(self, name: str) -> str:
        before, after = (r"\s*" if strips else "" for strips in (self.lstrip, self.rstrip))
        word_begins, word_ends = (r"(?<!\w)", r"(?!\w)") if self.single_word else ("", "")
        return f"{before}{word_begins}{re.escape(name)}{word_ends}{after}"


class Tokenizer(ABC):
    """An immutable vocabulary; special tokens never come out of `encode`, whatever a text holds."""

    name: str
    token_bytes: list[bytes]  # what each id spells; of special ones, and of ids that are not used, nothing
    end_of_text: int  # stands after each document
    begin_of_text: int  # stands before a text that nothing else precedes
    stop_tokens: frozenset[int]  # any of them ends an answer
    special_tokens: Mapping[str, SpecialToken]
    digest: str

    @cached_property
    def vocab_size(self) -> int:
        return len(self.token_bytes)

    @cached_property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(np.uint16 if self.vocab_size <= 65_536 else np.uint32)

    @cached_property
    def byte_lengths(self) -> np.ndarray:
        return np.array([len(token) for token in self.token_bytes], dtype=np.int32)

    @cached_property
    def special_names(self) -> dict[int, str]:
        return {special.token: name for name, special in self.special_tokens.items()}

    @property
    def template_names(self) -> dict[str, str]:
        """Special tokens by what chat templates call them."""
        begin, end = self.special_names.get(self.begin_of_text), self.special_names.get(self.end_of_text)
        return {name: text for name, text in (("bos_token", begin), ("eos_token", end)) if text is not None}

    @property
    def ends(self) -> int | list[int]:
        """The tokens that end an answer, as Hugging Face's folders write them."""
        others = sorted(self.stop_tokens - {self.end_of_text})
        return [self.end_of_text, *others] if others else self.end_of_text

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of a text; `<|endoftext|>` in it is text. Raises `ValueError` on lone surrogates."""
        return self.encode_all([text])[0]

    @abstractmethod
    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encode several texts; `spell` tells of what their tokens are. Raises `ValueError` on lone surrogates."""

    def spell(self, text: str) -> bytes:
        """Return what the tokens of a text spell, which for most tokenizers is that text."""
        return text.encode()

    def count_lost(self, text: str) -> int:
        """Count the bytes of a text for which there are no tokens."""
        return 0

    def split_special(self, text: str, breaks: Sequence[int] = ()) -> Iterator[tuple[int, int, int | None]]:
        """Yield the parts of a text in order: where it starts and stops, and the special token written there, or None.

        What has one of `breaks` inside, ascending positions between two characters, is no special token's name.
        """
        reached = start = 0
        while match := self._special_pattern.search(text, start):
            inside = bisect_right(breaks, match.start())
            if inside < len(breaks) and breaks[inside] < match.end():
                start = match.start() + 1
                continue
            if reached < match.start():
                yield reached, match.start(), None
            yield match.start(), match.end(), self._longest_first[(match.lastindex or 1) - 1][1].token
            reached = start = match.end()
        if reached < len(text):
            yield reached, len(text), None

    @cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        return re.compile("|".join(f"({special.pattern(name)})" for name, special in self._longest_first))

    @cached_property
    def _longest_first(self) -> list[tuple[str, SpecialToken]]:
        return sorted(self.special_tokens.items(), key=lambda item: -len(item[0]))

    def decode_bytes(self, ids: Iterable[int] | np.ndarray) -> bytes:
        """Return the exact bytes of some ids; special tokens have none."""
        listed = ids.tolist() if isinstance(ids, np.ndarray) else ids
        return b"".join(map(self.token_bytes.__getitem__, listed))

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """Return the text of some ids; bytes that are no character become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    @abstractmethod
    def files(self, max_length: int | None = None) -> dict[str, str]:
        """Return what `save` writes: file name -> content."""

    def save(self, folder: Path, max_length: int | None = None) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, as `transformers` knows them.

        `max_length` is the context of the model beside it, over which `transformers` warns.
        """
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self.files(max_length).items():
            (folder / name).write_bytes(content.encode())


@cache
def written_bytes() -> tuple[str, ...]:
    """How GPT-2's vocabulary files write each byte: itself if printable, else a character from U+0100 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return tuple(chr(byte) if byte in printable else chr(next(others)) for byte in range(256))
