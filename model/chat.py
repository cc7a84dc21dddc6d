"""Conversations as tokens: which text a template makes of them, and what of it the assistant speaks.

    template = open_template(CHAT_TEMPLATE)             # ours, or what a folder's chat_template.jinja holds
    ids, spoken = encode(tokenizer, render(tokenizer, template, messages))              # to learn from
    ids, _ = encode(tokenizer, render(tokenizer, template, messages, ask=True))         # to be answered

    <|chat|>user
    What is a cape?
    <|chat|>assistant
    A sleeveless cloak.<|endoftext|>

Our template writes roles as text, so it adds no token to any vocabulary. A marker ends in a word and a line break,
after which every known pattern begins a new piece: an answer has the same tokens whether it is read or written.
"""

import json
import re
import secrets
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np

from model.foreign_template import TemplateProcess
from model.tokenizer import END_OF_TEXT, Tokenizer

ROLES = ("system", "user", "assistant")
TEMPLATE_FILE = "chat_template.jinja"
MARKER = "<|chat|>"

# What `transformers` and vLLM render. `Template` below is the same in Python, and a test holds one against the other.
CHAT_TEMPLATE = r"""
{%- macro written(content) -%}
{{ content | trim | replace('<|chat|>', '<\\|chat|>') | replace(eos_token, '<\\' ~ eos_token[1:]) }}
{%- endmacro -%}
{%- for message in messages -%}
{{ '<|chat|>' ~ message['role'] ~ '\n' }}
{%- if message['role'] == 'assistant' -%}
{% generation %}{{ written(message['content']) ~ eos_token }}{% endgeneration %}
{%- elif message['role'] == 'user' or (message['role'] == 'system' and loop.first) -%}
{{ written(message['content']) ~ '\n' }}
{%- else -%}
{{ raise_exception('Roles are user and assistant, and system for the first message.') }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|chat|>assistant\n' }}{%- endif -%}
""".removeprefix("\n").removesuffix("\n")

Message = Mapping[str, str]  # its "role" and its "content"


@dataclass(frozen=True)
class Rendered:
    """A conversation's text, and the ranges of its characters that the assistant speaks."""

    text: str
    spoken: tuple[tuple[int, int], ...] = ()
    breaks: tuple[int, ...] = ()  # positions inside of what reads like a special token's name and is text


class ChatTemplate(Protocol):
    """Makes text of conversations."""

    @property
    def text(self) -> str:
        """The template in Jinja, as checkpoints hold it."""

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that no answer holds, for they begin another turn."""

    def __hash__(self) -> int: ...

    @property
    def escaped(self) -> tuple[str, ...]:
        """Names of special tokens that the template itself makes plain text in what people write."""

    def render(self, messages: Sequence[Message], ask: bool = False) -> Rendered:
        """Render a conversation; `ask` adds what stands before the assistant's next answer.

        Raises `ValueError` with one sentence where it cannot be rendered.
        """


def open_template(text: str, special_tokens: Mapping[str, str] | None = None) -> ChatTemplate:
    """Return what renders a Jinja template: our own in this process, any other in a process that is watched.

    `special_tokens` are those that templates name, such as `eos_token`.
    """
    names = special_tokens or {"eos_token": END_OF_TEXT, "bos_token": END_OF_TEXT}
    return OwnTemplate(names["eos_token"]) if text == CHAT_TEMPLATE else ForeignTemplate(text, names)


class OwnTemplate:
    """`CHAT_TEMPLATE`, in Python."""

    text = CHAT_TEMPLATE
    stops = (MARKER,)

    def __init__(self, end_of_turn: str = END_OF_TEXT) -> None:
        self._end = end_of_turn
        self.escaped = (end_of_turn,)

    def render(self, messages: Sequence[Message], ask: bool = False) -> Rendered:
        check_messages(messages)
        parts: list[str] = []
        spoken = []
        length = 0

        def write(part: str) -> None:
            nonlocal length
            parts.append(part)
            length += len(part)

        for message in messages:
            write(f"{MARKER}{message['role']}\n")
            began = length
            write(self._written(message["content"]))
            if message["role"] == "assistant":
                write(self._end)
                spoken.append((began, length))
            else:
                write("\n")
        if ask:
            write(f"{MARKER}assistant\n")
        return Rendered("".join(parts), tuple(spoken))

    def _written(self, content: str) -> str:
        """A message's text without the white space around it, and with nothing in it that could pass for a marker."""
        return content.strip().replace(MARKER, f"<\\{MARKER[1:]}").replace(self._end, f"<\\{self._end[1:]}")


class ForeignTemplate:
    """A template that somebody else wrote; what the assistant speaks is what it marks, or what an answer adds."""

    stops: tuple[str, ...] = ()
    escaped: tuple[str, ...] = ()

    def __init__(self, text: str, special_tokens: Mapping[str, str]) -> None:
        self.text = text
        self._process = TemplateProcess(text, special_tokens)
        self._marks_spoken = re.search(r"\{%-?\s*generation\s*-?%\}", text) is not None

    def render(self, messages: Sequence[Message], ask: bool = False) -> Rendered:
        check_messages(messages)
        text, spoken = self._process.render(messages, ask)
        return Rendered(text, tuple(spoken) if self._marks_spoken or ask else self._find_spoken(messages, text))

    def _find_spoken(self, messages: Sequence[Message], text: str) -> tuple[tuple[int, int], ...]:
        """An answer is what the text has gained with it since the assistant was asked."""
        spoken = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, _ = self._process.render(messages[:number], True)
            after, _ = self._process.render(messages[: number + 1], False)
            if not (after.startswith(before) and text.startswith(after)):
                raise ValueError(
                    "The chat template changes earlier turns when one is added, so what the assistant speaks cannot be"
                    " told; put {% generation %} around it in the template."
                )
            spoken.append((len(before), len(after)))
        return tuple(spoken)


def check_messages(messages: Sequence[Message]) -> None:
    """Raise `ValueError` where there is no turn, a role is unknown, or a system turn is not the first."""
    if not messages:
        raise ValueError("A conversation needs at least one message.")
    for number, message in enumerate(messages):
        if message["role"] not in ROLES:
            raise ValueError(f"The role {message['role']!r} is unknown; roles are {', '.join(ROLES)}.")
        if message["role"] == "system" and number:
            raise ValueError("A system message can only be the first, and there can be one.")


def save_template(folder: Path, template: str) -> None:
    """Write a template into a Hugging Face folder that has a tokenizer: as a file, and in its configuration."""
    (folder / TEMPLATE_FILE).write_text(template, encoding="utf-8")
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"chat_template": template}
    path.write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def load_template(folder: Path) -> ChatTemplate | None:
    """Open the template of a Hugging Face folder, with its special tokens; None where it has none."""
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    text = config.get("chat_template")
    if (folder / TEMPLATE_FILE).is_file():
        text = (folder / TEMPLATE_FILE).read_text(encoding="utf-8")
    if not isinstance(text, str) or not text:
        return None
    special = {"eos_token": END_OF_TEXT}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        token = config.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            special[name] = token
    return open_template(text, special)


def render(tokenizer: Tokenizer, template: ChatTemplate, messages: Sequence[Message], ask: bool = False) -> Rendered:
    """Render a conversation for `encode`: a special token's name that a person wrote stays text.

    Only those of the template are tokens: nobody shall end another's turn. A template sees such a name with a mark
    behind its first character, and the mark is taken out of what it has made.
    """
    names = [name for name in tokenizer.special_tokens if len(name) > 1 and name not in template.escaped]
    written = "\n".join(message["content"] for message in messages)
    if not any(name in written for name in names):
        return template.render(messages, ask)
    mark = f"\ue000{secrets.randbelow(10**12)}\ue001"  # no template means these, and none writes them otherwise
    pattern = re.compile("|".join(f"(?={re.escape(name)})." for name in names), re.DOTALL)
    marked = [
        {**message, "content": pattern.sub(lambda first: first[0] + mark, message["content"])} for message in messages
    ]
    rendered = template.render(marked, ask)
    places = [found.start() for found in re.finditer(mark, rendered.text)]

    def shift(position: int) -> int:
        return position - len(mark) * bisect_left(places, position)

    return Rendered(
        rendered.text.replace(mark, ""),
        tuple((shift(start), shift(stop)) for start, stop in rendered.spoken),
        tuple(map(shift, places)),
    )


@lru_cache(maxsize=8)
def turn_ends(tokenizer: Tokenizer, template: ChatTemplate) -> frozenset[int]:
    """Return the special token that a template puts behind an answer, if it does, with which an answer ends."""
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        ids, spoken = encode(tokenizer, template.render(talk))
    except ValueError:  # it refuses such a conversation
        return frozenset()
    after = ids[spoken.argmax() :].tolist() if spoken.any() else []
    return frozenset([token for token in after if token in tokenizer.special_names][:1])


def encode(tokenizer: Tokenizer, rendered: Rendered) -> tuple[np.ndarray, np.ndarray]:
    """Return a rendered conversation's ids, and for each whether the assistant speaks it (bool).

    Special tokens in the text are those tokens here, as they are to `transformers`. Raises `ValueError` on lone
    surrogates.
    """
    parts = list(tokenizer.split_special(rendered.text, rendered.breaks))
    between = [rendered.text[start:stop] for start, stop, special in parts if special is None]
    encoded = iter(tokenizer.encode_all(between))
    ids, sizes, starts = [], [], []  # of each part: its tokens, their bytes, and where it starts in bytes
    length = 0
    for start, stop, special in parts:
        starts.append(length)
        if special is None:
            ids.append(next(encoded))
            sizes.append(tokenizer.byte_lengths[ids[-1]])
        else:
            ids.append(np.array([special], tokenizer.dtype))
            sizes.append(np.array([stop - start]))
        length += int(sizes[-1].sum())
    if not ids:
        return np.zeros(0, tokenizer.dtype), np.zeros(0, bool)
    joined = np.concatenate(ids)
    ends = np.cumsum(np.concatenate(sizes))  # of each token, in bytes
    firsts = [start for start, _, _ in parts]

    def find_byte(position: int) -> int:
        """Where a character is in the bytes that the tokens spell; a special token has as many as characters."""
        part = bisect_right(firsts, position) - 1
        start, _, special = parts[part]
        before = rendered.text[start:position]
        return starts[part] + (len(tokenizer.spell(before)) if special is None else len(before))

    spoken = np.zeros(len(joined), bool)
    for start, stop in rendered.spoken:
        if start < stop:
            # A token that is partly the assistant's is the assistant's.
            first, last = np.searchsorted(ends, (find_byte(start), find_byte(stop) - 1), side="right")
            spoken[first : last + 1] = True
    return joined, spoken
