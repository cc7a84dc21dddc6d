"""A prompt that begins as a text before is not read again from the start, and the answer has the same bits.

From any token where rows are independent (the kernel), elsewhere from the end of a whole chunk of a prompt.
"""

from typing import Any

import pytest

from model.engine import Engine, GenerationRequest, SamplingSettings
from tests.model.tiny_engine import FAMILIES, RUNNERS, Text, answer, engine, gather, needs_compiler, run, tokenizer

CHUNK = 8
TORCH = ("torch", "float32")
KERNEL = ("kernel", "float32")
BOTH = [pytest.param(TORCH, id="torch"), pytest.param(KERNEL, id="kernel", marks=needs_compiler)]
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


def reused(one: Engine, request: GenerationRequest) -> int:
    """How many tokens of a request's prompt were not read again."""
    before = one.stats()
    answer(one, request)
    after = one.stats()
    count = after["reused_tokens"] - before["reused_tokens"]
    assert after["prompt_tokens"] - before["prompt_tokens"] == len(request.prompt_tokens) - count
    return count


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("runner", RUNNERS)
def test_turns_of_a_conversation_have_the_same_bits_with_and_without_what_was_read(
    family: str, runner: tuple[str, str]
) -> None:
    warm = engine(family, runner, prefill_chunk_tokens=CHUNK, max_batch_size=2)
    prompt, held, length = WORDS[:11], 0, 0
    for turn in range(4):
        asked = ask(str(turn), prompt)
        before = warm.stats()
        found = answer(warm, asked)
        cold = engine(family, runner, prefill_chunk_tokens=CHUNK, max_batch_size=2)
        assert said(found) == said(answer(cold, asked))
        count = warm.stats()["reused_tokens"] - before["reused_tokens"]
        assert count == (held if runner[0] == "kernel" else length // CHUNK * CHUNK)
        assert warm.stats()["prompt_tokens"] - before["prompt_tokens"] == len(prompt) - count
        # The last token that was generated has not run.
        length, held = len(prompt), len(prompt) + min(len(found.tokens), 5)
        # What was said becomes part of the next prompt, and something is asked besides.
        prompt = [*prompt, *(found.tokens + WORDS)[:6], *WORDS[20 + turn : 26 + turn]]


@needs_compiler
@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8"])
def test_the_kernel_goes_on_from_any_token_with_the_same_bits(weights: str) -> None:
    prompt = WORDS[:40]
    expected = said(answer(engine(runner=("kernel", weights)), ask("cold", prompt)))
    for length in range(1, 40):
        warm = engine(runner=("kernel", weights), prefill_chunk_tokens=16)
        other = [*prompt[:length], *reversed(WORDS[: 44 - length])]
        answer(warm, ask("a", other))
        before = warm.stats()["reused_tokens"]
        assert said(answer(warm, ask("b", prompt))) == expected
        assert length <= warm.stats()["reused_tokens"] - before < 40


@pytest.mark.parametrize("runner", BOTH)
def test_a_prompt_asked_twice_still_runs_its_last_token(runner: tuple[str, str]) -> None:
    warm = engine(runner=runner, prefill_chunk_tokens=CHUNK)
    first, again = (answer(warm, ask(name, WORDS[: 2 * CHUNK])) for name in "ab")
    assert said(first) == said(again)
    assert warm.stats()["reused_tokens"] == (CHUNK if runner == TORCH else 2 * CHUNK - 1)


@pytest.mark.parametrize("runner", BOTH)
def test_the_longest_beginning_is_taken_and_others_stay(runner: tuple[str, str]) -> None:
    warm = engine(runner=runner, prefill_chunk_tokens=CHUNK, max_batch_size=3)
    short, long = WORDS[: CHUNK + 1], WORDS[: 3 * CHUNK + 1]
    run(warm, [ask("a", short), ask("b", long)])
    for name, prompt, chunks in (
        ("c", long, 3),
        ("d", short, 1),
        ("e", WORDS[5:30], 0),
        ("f", long, 3),
        ("g", short, 1),
    ):
        assert reused(warm, ask(name, prompt)) == chunks * CHUNK, name


@pytest.mark.parametrize("runner", BOTH)
def test_two_texts_that_begin_alike_are_kept_both(runner: tuple[str, str]) -> None:
    """A new conversation under the same system prompt does not cost the old one its place."""
    warm = engine(runner=runner, prefill_chunk_tokens=CHUNK, max_batch_size=3)
    first, second = WORDS[: 5 * CHUNK], [*WORDS[:CHUNK], *WORDS[2 : 4 * CHUNK]]
    assert reused(warm, ask("a", first)) == 0
    assert reused(warm, ask("b", second)) == CHUNK
    cold = engine(runner=runner, prefill_chunk_tokens=CHUNK)
    for name, prompt in (("c", [*first, *WORDS[:4]]), ("d", [*second, *WORDS[:4]])):
        asked = ask(name, prompt)
        before = warm.stats()["reused_tokens"]
        assert said(answer(warm, asked)) == said(answer(cold, asked))
        assert warm.stats()["reused_tokens"] - before >= (len(prompt) - 4) // CHUNK * CHUNK


@pytest.mark.parametrize("runner", BOTH)
def test_what_another_text_is_still_using_is_copied(runner: tuple[str, str]) -> None:
    warm, cold = (engine(runner=runner, prefill_chunk_tokens=CHUNK, max_batch_size=4) for _ in range(2))
    warm.add(ask("busy", WORDS[: 3 * CHUNK], max_tokens=20))
    for _ in range(5):
        warm.step()
    asked = [ask(name, [*WORDS[: 2 * CHUNK], *WORDS[place : place + 9]]) for name, place in (("a", 3), ("b", 6))]
    for one in asked:
        warm.add(one)
    texts = gather(chunk for _ in range(40) for chunk in warm.step())
    assert not warm.has_work
    for one in asked:
        assert said(texts[one.request_id, 0]) == said(answer(cold, one))
    assert said(texts["busy", 0])[-1] in ("length", "stop")
    assert warm.stats()["reused_tokens"] >= 2 * 2 * CHUNK


def test_nobody_learns_what_another_owner_has_asked() -> None:
    warm = engine(prefill_chunk_tokens=CHUNK)
    assert reused(warm, ask("a", WORDS[:20], owner="ada")) == 0
    assert reused(warm, ask("b", WORDS[:20], owner="bob")) == 0
    assert reused(warm, ask("c", WORDS[:20], owner="ada")) >= 2 * CHUNK
    # Nor while the other is still at it.
    warm.add(ask("d", WORDS[:30], owner="ada", max_tokens=20))
    for _ in range(6):
        warm.step()
    assert reused(warm, ask("e", WORDS[:30], owner="cleo")) == 0


def test_several_answers_share_what_was_read_and_a_scored_prompt_is_read_anew() -> None:
    warm, cold = (engine(runner=TORCH, prefill_chunk_tokens=CHUNK, max_batch_size=4) for _ in range(2))
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
