"""Rows become conversations by looking at them, what is none is told, and long ones end with a whole turn."""

from typing import Any

import numpy as np
import pytest

from model.chat import OwnTemplate, encode
from model.tokenizer import Tokenizer, build_char
from pipeline.corpus.conversations import (
    LATE_SYSTEM_TURN,
    NO_CONVERSATION,
    NOT_A_TEXT,
    NOTHING_TO_LEARN,
    REFUSED,
    TOO_LONG,
    TWO_SYSTEM_TURNS,
    UNKNOWN_ROLE,
    encode_conversation,
    parse_document,
    plain_text,
    read_row,
)

USER, ASSISTANT = {"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}
SYSTEM = {"role": "system", "content": "Be kind."}
PAIR = [USER, ASSISTANT]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return build_char([], 257)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": PAIR},
        {"messages": PAIR, "prompt": "something else", "id": 7},
        {"prompt": "Hi?", "completion": "Hello."},
        {"prompt": [USER], "completion": [ASSISTANT]},
        {"messages": [USER | {"name": "Ada"}, ASSISTANT | {"content": [{"type": "text", "text": "Hello."}]}]},
    ],
)
def test_a_conversation_is_found_in_whatever_column_it_is(row: dict[str, Any]) -> None:
    document, note = read_row(row)
    assert note == ""
    assert document is not None
    assert parse_document(document) == PAIR
    assert plain_text(document) == "Hi?\nHello."


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [USER]}, NOTHING_TO_LEARN),
        ({"messages": [USER, ASSISTANT | {"content": " \n"}]}, NOTHING_TO_LEARN),
        ({"prompt": "Hi?", "completion": ""}, NOTHING_TO_LEARN),
        ({"messages": [{"role": "tool", "content": "7"}, ASSISTANT]}, UNKNOWN_ROLE),
        ({"messages": [{"content": "7"}, ASSISTANT]}, UNKNOWN_ROLE),
        ({"messages": [SYSTEM, SYSTEM, *PAIR]}, TWO_SYSTEM_TURNS),
        ({"messages": [USER, SYSTEM, ASSISTANT]}, LATE_SYSTEM_TURN),
        ({"messages": [USER, ASSISTANT | {"content": None}]}, NOT_A_TEXT),
        ({"messages": [USER, ASSISTANT | {"tool_calls": [{}]}]}, NOT_A_TEXT),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ASSISTANT]}, NOT_A_TEXT),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 7}]}, ASSISTANT]}, NOT_A_TEXT),
        ({"messages": []}, NO_CONVERSATION),
        ({"messages": ["Hi?"]}, NO_CONVERSATION),
        ({"messages": None}, NO_CONVERSATION),
        ({"prompt": "Hi?"}, NO_CONVERSATION),
        ({"prompt": "Hi?", "completion": None}, NO_CONVERSATION),
        (["Hi?"], NO_CONVERSATION),
        (None, NO_CONVERSATION),
    ],
)
def test_a_row_that_is_none_says_why(row: Any, reason: str) -> None:
    assert read_row(row) == (None, reason)


def test_half_a_character_is_replaced() -> None:
    document, _ = read_row({"messages": [USER, ASSISTANT | {"content": "a\ud800"}]})
    assert document is not None
    assert (
        parse_document(document)[1]["content"]
        == "a\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}"
    )


def document_of(*turns: dict[str, str]) -> str:
    document, note = read_row({"messages": list(turns)})
    assert document is not None, note
    return document


def test_a_conversation_ends_with_its_last_answer(tokenizer: Tokenizer) -> None:
    whole, learn = encode(tokenizer, OwnTemplate().render(PAIR))
    found = encode_conversation(document_of(*PAIR, USER), tokenizer, OwnTemplate(), 1000)
    assert not isinstance(found, str)
    ids, learnt, is_cut = found
    assert ids.tolist() == whole.tolist()
    assert learnt.tolist() == learn.tolist()
    assert not is_cut


def test_one_that_is_too_long_is_cut_after_a_whole_turn(tokenizer: Tokenizer) -> None:
    document = document_of(SYSTEM, *PAIR, *PAIR, *PAIR)
    lengths = [len(encode(tokenizer, OwnTemplate().render([SYSTEM, *PAIR * count]))[0]) for count in (1, 2, 3)]
    for most in range(lengths[0], lengths[2] + 5):
        found = encode_conversation(document, tokenizer, OwnTemplate(), most)
        assert not isinstance(found, str)
        ids, learn, is_cut = found
        assert len(ids) == len(learn) == max(length for length in lengths if length <= most)
        assert ids[-1] == tokenizer.end_of_text
        assert learn[-1]
        assert is_cut == (most < lengths[2])
    assert encode_conversation(document, tokenizer, OwnTemplate(), lengths[0] - 1) == TOO_LONG


def test_what_a_template_refuses_is_left_out(tokenizer: Tokenizer) -> None:
    class Refusing(OwnTemplate):
        def render(self, messages: Any, ask: bool = False) -> Any:
            raise ValueError("Not like this.")

    assert encode_conversation(document_of(*PAIR), tokenizer, Refusing(), 1000) == REFUSED
    assert np.all(encode_conversation(document_of(*PAIR), tokenizer, OwnTemplate(), 1000)[1].sum() == 7)  # type: ignore[union-attr]
