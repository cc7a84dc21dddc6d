"""Text leaves the engine whole: no split characters, nothing of a stop string, nothing lost."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.sequence import TextStream, look_up

TEXTS = st.text(alphabet="ab é你🙂\n", max_size=30)


def feed(stream: TextStream, data: bytes, cuts: list[int]) -> list[str]:
    """Push bytes in pieces of the given lengths, until the stream stops or ends."""
    pieces, at = [], 0
    for length in [*cuts, len(data)]:
        pieces.append(stream.push(data[at : at + length]))
        at += length
        if stream.stopped:
            return pieces
    return [*pieces, stream.push(b"", final=True)]


@given(TEXTS, st.lists(st.integers(1, 3), max_size=40))
def test_text_comes_out_whole_however_its_bytes_are_cut(text: str, cuts: list[int]) -> None:
    pieces = feed(TextStream(), text.encode(), cuts)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


@given(TEXTS, st.lists(st.text(alphabet="ab é", min_size=1, max_size=4), max_size=3), st.lists(st.integers(1, 4)))
def test_text_ends_before_the_first_stop_string(text: str, stops: list[str], cuts: list[int]) -> None:
    stream = TextStream(tuple(stops))
    shown = "".join(feed(stream, text.encode(), cuts))
    assert not any(stop in shown for stop in stops)
    assert text.startswith(shown)
    assert stream.stopped == any(stop in text for stop in stops)
    if not stream.stopped:
        assert shown == text
    else:
        assert any(text[len(shown) :].startswith(stop) for stop in stops)


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    stream = TextStream(("END",))
    assert stream.push(b"the E") == "the "
    assert stream.push(b"N") == ""
    assert stream.push(b"O E") == "ENO "
    assert stream.push(b"ND of it") == ""
    assert stream.stopped


def test_bytes_that_are_no_character_become_the_replacement_character() -> None:
    stream = TextStream()
    assert [stream.push(b"\xe4"), stream.push(b"a"), stream.push(b"\xe4\xbd"), stream.push(b"", final=True)] == [
        "",
        "\ufffda",
        "",
        "\ufffd",
    ]


@pytest.mark.parametrize(
    ("tokens", "number", "draft"),
    [
        ([1, 2, 3, 4, 1, 2], 3, [3, 4, 1]),
        ([1, 2, 3, 4, 1, 2], 1, [3]),
        ([1, 2, 9, 5, 2, 8, 1, 2], 2, [9, 5]),  # the longer repetition wins over the later one
        ([1, 2, 3], 4, []),
        ([7, 7], 4, [7]),
        ([1, 2, 1], 0, []),
        ([1], 4, []),
    ],
)
def test_a_draft_is_what_followed_before(tokens: list[int], number: int, draft: list[int]) -> None:
    assert look_up(tokens, number) == draft
