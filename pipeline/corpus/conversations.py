"""Rows of a data set as conversations: found by looking; what is none is told.

    document, note = read_row({"messages": [{"role": "user", "content": "Hi"}, …]})
    ids, learn = encode_conversation(document, tokenizer, template, most_tokens=1025)

A row has `messages` (turns with `role` and `content`) or `prompt` and `completion` (texts, or lists of such turns).
Between reading and tokenizing a conversation is a document like any other, a text: its turns as JSON. So it is cleaned,
compared and held out as text is, and the same whatever template comes after.
"""

import json
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from model.chat import ROLES, ChatTemplate, Message, OwnTemplate, encode, render
from model.tokenizer import END_OF_TEXT, Tokenizer
from pipeline.config import FORMAT_OF_ENDING

COLUMNS = ("messages", "prompt", "completion")
FORMATS = ("jsonl", "parquet", "tar")  # in which rows come
READABLE = ", ".join(ending for ending, kind in FORMAT_OF_ENDING.items() if kind in FORMATS)

# Why a row is no conversation to learn from.
NO_CONVERSATION = "no conversation"
NOTHING_TO_LEARN = "nothing to learn"
UNKNOWN_ROLE = "unknown role"
TWO_SYSTEM_TURNS = "two system turns"
LATE_SYSTEM_TURN = "system turn after the first"
NOT_A_TEXT = "content that is not text"
REFUSED = "refused by the chat template"
TOO_LONG = "no whole turn in the context"


def check_columns(where: str, columns: Collection[str]) -> None:
    """Raise `ValueError` if rows with these columns cannot hold conversations."""
    if "messages" not in columns and not {"prompt", "completion"} <= set(columns):
        found = ", ".join(sorted(columns))
        raise ValueError(
            f"{where} holds no conversations: it has {found}, and needs messages, or prompt and completion."
        )


def read_row(row: Any) -> tuple[str | None, str]:
    """Return a row's conversation as a document, or None and the reason why it is none."""
    turns = _turns_of(row)
    if not turns:
        return None, NO_CONVERSATION
    messages: list[tuple[str, str]] = []
    for turn in turns:
        if not isinstance(turn, dict) or "content" not in turn:
            return None, NO_CONVERSATION
        if turn.get("role") not in ROLES:
            return None, UNKNOWN_ROLE
        content = _text_of(turn["content"])
        if content is None or turn.get("tool_calls"):
            return None, NOT_A_TEXT
        messages.append((turn["role"], content))
    systems = [number for number, (role, _) in enumerate(messages) if role == "system"]
    if len(systems) > 1:
        return None, TWO_SYSTEM_TURNS
    if systems and systems[0]:
        return None, LATE_SYSTEM_TURN
    if not any(role == "assistant" and content.strip() for role, content in messages):
        return None, NOTHING_TO_LEARN
    return json.dumps(messages, ensure_ascii=False, separators=(",", ":")), ""


def _turns_of(row: Any) -> list[Any]:
    if not isinstance(row, dict):
        return []
    if isinstance(row.get("messages"), list):
        return list(row["messages"])
    turns = []
    for column, role in (("prompt", "user"), ("completion", "assistant")):
        part = row.get(column)
        if isinstance(part, str):
            turns.append({"role": role, "content": part})
        elif isinstance(part, list):
            turns += part
        else:
            return []
    return turns


def _text_of(content: Any) -> str | None:
    """A message's text: as it stands, or joined of its parts of text; None where there is anything else."""
    if isinstance(content, str):
        # JSON can spell half of a character (\\ud800), which is no text.
        return content if content.isascii() else content.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
    if not isinstance(content, list):
        return None
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content]
    parts = [_text_of(text) if isinstance(text, str) else None for text in texts]
    return None if None in parts else "".join(map(str, parts))


def parse_document(document: str) -> list[Message]:
    """Return the messages of a document that `read_row` made."""
    return [{"role": role, "content": content} for role, content in json.loads(document)]


def plain_text(document: str) -> str:
    """What is said in a conversation, turn by turn."""
    return "\n".join(content for _, content in json.loads(document))


def text_to_learn_from(document: str) -> str:
    """The text that a tokenizer is learned from: with our markers in it, so that they take few tokens."""
    return OwnTemplate().render(parse_document(document)).text.replace(END_OF_TEXT, "\n")


def encode_conversation(
    document: str, tokenizer: Tokenizer, template: ChatTemplate, most_tokens: int
) -> tuple[np.ndarray, np.ndarray, bool] | str:
    """Return a conversation's ids, what of them is learnt, and whether turns were cut off; or why it is left out.

    It ends with the last turn of the assistant that ends within `most_tokens`.
    """
    messages = parse_document(document)
    try:
        ids, learn = encode(tokenizer, render(tokenizer, template, messages))
    except ValueError:
        return REFUSED
    length, is_cut = cut_length(learn, most_tokens)
    if not learn[1:length].any():
        return TOO_LONG if learn.any() else NOTHING_TO_LEARN
    return ids[:length], learn[:length], is_cut


def cut_length(learn: np.ndarray, most_tokens: int) -> tuple[int, bool]:
    """Return how many tokens reach to the end of the last answer within `most_tokens`, and whether others follow."""
    ends = np.flatnonzero(learn & ~np.append(learn[1:], False)) + 1
    fitting: Sequence[int] = ends[ends <= most_tokens].tolist()
    return (fitting[-1] if fitting else 0), len(fitting) < len(ends)
