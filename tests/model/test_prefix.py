"""A prompt that begins as one before is not read again from the start, and the answer has the same bits."""

from typing import Any

import pytest

from model.engine import GenerationRequest, SamplingSettings
from tests.model.tiny_engine import FAMILIES, RUNNERS, Text, answer, engine, run, tokenizer

CHUNK = 8
WORDS = tokenizer().encode("the quick brown fox jumps over the lazy dog; naïve cafés, 你好 and more. " * 3).tolist()


def ask(name: str, prompt: list[int], owner: str = "", **settings: Any) -> GenerationRequest:
    return GenerationRequest(
        name, prompt, SamplingSettings(**({"max_tokens": 6, "seed": 3, "logprobs": 3} | settings)), owner=owner
    )


def said(text: Text) -> tuple[Any, ...]:
    return (
        text.tokens,
        [each.logprob for each in text.logprobs],
        [each.top for each in text.logprobs],
        text.finish_reason,
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("runner", RUNNERS)
def test_turns_of_a_conversation_have_the_same_bits_with_and_without_what_was_read(
    family: str, runner: tuple[str, str]
) -> None:
    warm = engine(family, runner, prefill_chunk_tokens=CHUNK, max_batch_size=2)
    prompt = WORDS[:11]
    for turn in range(4):
        asked = ask(str(turn), prompt)
        before = warm.stats()
        found = answer(warm, asked)
        cold = engine(family, runner, prefill_chunk_tokens=CHUNK, max_batch_size=2)
        assert said(found) == said(answer(cold, asked))
        reused = warm.stats()["reused_tokens"] - before["reused_tokens"]
        assert reused == (len(WORDS[:11]) + 12 * (turn - 1)) // CHUNK * CHUNK * (turn > 0)
        assert warm.stats()["prompt_tokens"] - before["prompt_tokens"] == len(prompt) - reused
        # What was said becomes part of the next prompt, and something is asked besides.
        prompt = [*prompt, *(found.tokens + WORDS)[:6], *WORDS[20 + turn : 26 + turn]]


def test_a_prompt_asked_twice_still_runs_its_last_token() -> None:
    warm = engine(prefill_chunk_tokens=CHUNK)
    first, again = (answer(warm, ask(name, WORDS[: 2 * CHUNK])) for name in "ab")
    assert said(first) == said(again)
    assert warm.stats()["reused_tokens"] == CHUNK


def test_the_longest_beginning_is_taken_and_others_stay() -> None:
    warm = engine(prefill_chunk_tokens=CHUNK, max_batch_size=3)
    short, long = WORDS[: CHUNK + 1], WORDS[: 3 * CHUNK + 1]
    run(warm, [ask("a", short), ask("b", long)])
    for name, prompt, expected in (
        ("c", long, 3),
        ("d", short, 1),
        ("e", WORDS[5:30], 0),
        ("f", long, 3),
        ("g", short, 1),
    ):
        before = warm.stats()["reused_tokens"]
        answer(warm, ask(name, prompt))
        assert warm.stats()["reused_tokens"] - before == expected * CHUNK, name


def test_nobody_learns_what_another_owner_has_asked() -> None:
    warm = engine(prefill_chunk_tokens=CHUNK)
    answer(warm, ask("a", WORDS[:20], owner="ada"))
    answer(warm, ask("b", WORDS[:20], owner="bob"))
    assert warm.stats()["reused_tokens"] == 0
    answer(warm, ask("c", WORDS[:20], owner="ada"))
    assert warm.stats()["reused_tokens"] == 2 * CHUNK


def test_several_answers_share_what_was_read_and_a_scored_prompt_is_read_anew() -> None:
    warm, cold = (engine(prefill_chunk_tokens=CHUNK, max_batch_size=4) for _ in range(2))
    answer(warm, ask("a", WORDS[:20]))
    several = ask("b", WORDS[:25], n=3)
    assert {key: said(text) for key, text in run(warm, [several]).items()} == {
        key: said(text) for key, text in run(cold, [several]).items()
    }
    assert warm.stats()["reused_tokens"] == 2 * CHUNK
    scored = answer(warm, ask("c", WORDS[:20], echo=True))
    assert scored.prompt is not None
    assert len(scored.prompt.logprobs or []) == 20
    answer(warm, ask("d", WORDS[:20], num_beams=2, logprobs=None, seed=None))
    assert warm.stats()["reused_tokens"] == 2 * CHUNK


def test_what_a_failure_left_behind_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    warm = engine(prefill_chunk_tokens=CHUNK, max_batch_size=1)
    working = warm.runner.run
    calls = iter(range(100))

    def break_down(work: Any) -> Any:
        if next(calls) >= 2:
            raise RuntimeError("broken")
        return working(work)

    monkeypatch.setattr(warm.runner, "run", break_down)
    assert answer(warm, ask("a", WORDS[:20])).finish_reason == "error"
    monkeypatch.setattr(warm.runner, "run", working)
    answer(warm, ask("b", WORDS[:20]))
    assert warm.stats()["reused_tokens"] == 0
