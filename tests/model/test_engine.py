"""The engine: many texts at once, each as if it were alone; every way of generating; no way to harm the others.

Long because every way of generating is tried with the same few helpers.
"""

import math
import random
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.beams import Beams
from model.cores import count_cores
from model.engine import Engine, EngineSettings, GenerationRequest, QueueFull, SamplingSettings, count_slots, sizes_of
from model.gpt import GPT
from model.sampling import MAX_LOOKUP_TOKENS
from model.sequence import Sequence, Work
from tests.model.tiny_engine import (
    CONTEXT,
    FAMILIES,
    RUNNERS,
    Text,
    answer,
    engine,
    gather,
    model,
    needs_compiler,
    request,
    run,
    tokenizer,
)


def mixed_requests() -> list[GenerationRequest]:
    prompts = ["the quick", "lazy dog; naïve cafés, 你好 and the quick brown fox jumps", "fox " * 9, "a"]
    ways: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"seed": 1},
        {"seed": 2, "top_k": 20, "logprobs": 2},
        {"seed": 3, "top_p": 0.7, "n": 2},
        {"seed": 4, "min_p": 0.02, "repetition_penalty": 1.3},
        {"seed": 5, "typical_p": 0.8, "presence_penalty": 0.5, "frequency_penalty": 0.2},
        {"seed": 6, "temperature": 1.5, "best_of": 3, "logprobs": 0},
        {"num_beams": 3, "n": 2},
        {"temperature": 0.3, "seed": 7, "prompt_lookup_tokens": 4},
        {"seed": 8, "echo": True, "logprobs": 1, "stop": ("o",)},
    ]
    return [
        request(str(number), prompts[number % len(prompts)], max_tokens=6 + number, **way)
        for number, way in enumerate(ways)
    ]


# -- One text among many ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_is_the_same_to_the_last_bit_whatever_else_is_in_the_batch(
    family: str, runner: tuple[str, str]
) -> None:
    settings = {"max_batch_size": 6, "prefill_chunk_tokens": 16}
    alone: dict[tuple[str, int], Text] = {}
    for one in mixed_requests():
        alone |= run(engine(family, runner, **settings), [one])
    for seed in range(3):
        order = mixed_requests()
        chance = random.Random(seed)
        chance.shuffle(order)
        busy = engine(family, runner, **settings)
        texts: dict[tuple[str, int], Text] = {}
        while order or busy.has_work:
            while order and chance.random() < 0.4:
                busy.add(order.pop())
            gather(busy.step(), texts)
        assert texts == alone  # tokens, text, and the logprobs' very bits


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_the_whole_model_run_again_for_each(family: str, runner: tuple[str, str]) -> None:
    tokens = tokenizer().encode("the quick brown").tolist()
    ours = answer(engine(family, runner, prefill_chunk_tokens=5), request("a", max_tokens=24, temperature=0))
    agreeing = 0
    for token in ours.tokens:
        with torch.no_grad():
            logits = model(family)(torch.tensor([tokens]))[0, -1]
        # Weights of lower precision may prefer another of two tokens that are nearly as likely.
        slack = {"float32": 1e-4, "bfloat16": 0.1, "int8": 0.5}[runner[1]]
        assert logits[token] >= logits.max() - slack
        agreeing += int(logits.argmax()) == token
        tokens.append(token)
    assert agreeing == 24 or runner[1] != "float32"


def test_a_long_prompt_does_not_stall_the_others() -> None:
    busy = engine(prefill_chunk_tokens=4)
    busy.add(request("talker", max_tokens=20, seed=1))
    gather(busy.step())
    assert tokenizer().encode("fox " * 14).size > 16
    busy.add(request("reader", "fox " * 14, max_tokens=4))
    for _ in range(4):
        [chunk] = busy.step()
        assert chunk.request_id == "talker"
        assert busy.stats()["running"] == 2


def test_requests_wait_for_a_place_in_the_order_they_came() -> None:
    busy = engine(max_batch_size=2)
    for number in range(5):
        busy.add(request(str(number), max_tokens=3, seed=number))
    assert busy.stats()["queue"] == 5
    busy.step()
    assert (busy.stats()["queue"], busy.stats()["running"]) == (3, 2)
    ended = [chunk.request_id for _ in range(20) for chunk in busy.step() if chunk.finish_reason]
    assert ended == ["0", "1", "2", "3", "4"]


def test_the_cache_never_exceeds_its_bound() -> None:
    config = FAMILIES["modern"]
    token = 2 * config.num_layers * config.kv_heads * config.channels_per_head * 4
    small = engine(cache_bytes=3 * CONTEXT * token + 100)
    assert small.stats()["slots"] == 3
    assert small.stats()["cache_bytes"] <= 3 * CONTEXT * token
    with pytest.raises(ValueError, match="cache_bytes allow 10"):
        engine(cache_bytes=10)


@pytest.mark.parametrize(
    ("device", "asked", "free_slots", "slots"),
    [
        ("cpu", {}, 0, 16),
        ("cuda", {}, 1000, 128),
        ("cuda", {}, 100, 50),  # half of what is free: the next version is swapped in beside this one
        ("cuda", {"max_batch_size": 300}, 1000, 300),
        ("cuda", {"cache_bytes": 7 * 2**20 + 5}, 1000, 7),
        ("cpu", {"max_batch_size": 4, "cache_bytes": 2**30}, 0, 4),
        ("xpu", {}, 0, 16),
    ],
)
def test_the_slots_that_suit_a_device(device: str, asked: dict[str, int], free_slots: int, slots: int) -> None:
    slot_bytes = 2**20
    assert count_slots(EngineSettings(**asked), device, slot_bytes, free_slots * slot_bytes) == slots


def test_a_full_gpu_is_said_and_a_gpu_reads_longer_chunks() -> None:
    with pytest.raises(ValueError, match="there is room for 500"):
        count_slots(EngineSettings(), "cuda", 1024, 1000)
    assert (sizes_of("cpu").prefill_chunk_tokens, sizes_of("cuda").prefill_chunk_tokens) == (256, 2048)
    assert engine().scheduler.prefill_chunk_tokens == 256
    assert engine(prefill_chunk_tokens=5).scheduler.prefill_chunk_tokens == 5
    for name, value in {"max_batch_size": -1, "cache_bytes": -1, "prefill_chunk_tokens": -1, "max_queue": 0}.items():
        with pytest.raises(ValueError, match=name):
            EngineSettings(**{name: value})


@needs_compiler
def test_an_engine_built_while_another_answers_gets_as_many_threads() -> None:
    busy = engine(threads=2)
    busy.add(request("a", max_tokens=40, seed=1))
    before = torch.get_num_threads()
    torch.set_num_threads(2)

    def step_and_build() -> tuple[int, int]:
        busy.enter_thread()
        busy.step()
        with ThreadPoolExecutor(1) as others:  # as a new version is loaded: in a thread that begins now
            return others.submit(lambda: (engine().runner.threads, torch.get_num_threads())).result()

    try:
        with ThreadPoolExecutor(1) as stepping:
            assert stepping.submit(step_and_build).result() == (count_cores(), 2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


# -- Leaving ----------------------------------------------------------------------------------------------------------


def test_a_cancelled_request_frees_its_places_within_one_step() -> None:
    busy = engine(max_batch_size=2)
    busy.add(request("a", max_tokens=40, seed=1, n=2))
    busy.add(request("b", max_tokens=40, seed=2))
    busy.step()
    assert busy.stats()["queue"] == 1
    busy.cancel("a")
    busy.cancel("unknown")
    texts = gather(busy.step())
    assert texts["a", 0].finish_reason == texts["a", 1].finish_reason == "cancelled"
    assert ("b", 0) in texts, "who waited runs in the same step"
    assert busy.stats()["running"] == 1
    busy.cancel("b")
    assert gather(busy.step())["b", 0].finish_reason == "cancelled"
    assert not busy.has_work


def test_a_waiting_request_can_be_cancelled_too() -> None:
    busy = engine(max_batch_size=1)
    busy.add(request("a", max_tokens=4, seed=1))
    busy.add(request("b", max_tokens=4, seed=1))
    busy.cancel("b")
    texts = gather(busy.step())
    assert texts["b", 0].finish_reason == "cancelled"
    assert busy.stats()["queue"] == 0


def test_a_deadline_ends_a_text_where_it_is() -> None:
    busy = engine()
    busy.add(request("late", deadline=time.monotonic() - 1))
    busy.add(request("soon", max_tokens=60 - 8, seed=2, deadline=time.monotonic() + 0.05))
    texts = gather(busy.step())
    assert texts["late", 0].finish_reason == "deadline"
    time.sleep(0.06)
    gather(busy.step(), texts)
    assert texts["soon", 0].finish_reason == "deadline"
    assert len(texts["soon", 0].tokens) == 1


def test_a_full_queue_refuses_at_once() -> None:
    busy = engine(max_batch_size=1, max_queue=2)
    for name in "abc":  # a place for one, and two that wait, whether or not a step has come between
        busy.add(request(name))
    with pytest.raises(QueueFull):
        busy.add(request("d"))
    busy.step()
    with pytest.raises(QueueFull):
        busy.add(request("d"))
    run(busy, [])
    busy.add(request("d"))


BAD_REQUESTS = {
    "no tokens": (GenerationRequest("x", [], SamplingSettings()), "no tokens"),
    "ids": (GenerationRequest("x", [1, 300], SamplingSettings()), "outside 0 to 299"),
    "negative ids": (GenerationRequest("x", [-1], SamplingSettings()), "outside 0 to 299"),
    "length": (GenerationRequest("x", [1] * 60, SamplingSettings(max_tokens=5)), "context of 64"),
    "million": (GenerationRequest("x", [1], SamplingSettings(max_tokens=1_000_000)), "context of 64"),
    "bias": (GenerationRequest("x", [1], SamplingSettings(logit_bias={300: 1})), "logit_bias"),
    "stop": (GenerationRequest("x", [1], SamplingSettings(stop_tokens=(300,))), "stop_tokens"),
    "beams": (GenerationRequest("x", [1], SamplingSettings(num_beams=17)), "17"),
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_a_request_that_cannot_be_served_is_refused_in_one_sentence(name: str) -> None:
    one, expected = BAD_REQUESTS[name]
    idle = engine()
    with pytest.raises(ValueError, match=expected) as caught:
        idle.add(one)
    assert str(caught.value).endswith(".")
    assert not idle.has_work


@pytest.mark.parametrize("runner", RUNNERS[:2])
def test_a_text_that_breaks_the_numbers_fails_alone_and_leaves_nothing_behind(runner: tuple[str, str]) -> None:
    poison = tokenizer().encode("Z").item()
    broken = GPT(FAMILIES["modern"], tokenizer().vocab_size).eval()
    broken.load_state_dict(model().state_dict())
    with torch.no_grad():
        broken.embedding.weight[poison] = math.nan
    busy = Engine(broken, tokenizer(), EngineSettings(backend=runner[0], weights=runner[1], max_batch_size=3))
    good = request("good", max_tokens=12, seed=1, logit_bias={poison: -100})
    bad = GenerationRequest("bad", [5, poison], SamplingSettings(max_tokens=4))
    texts = run(busy, [good, bad])
    assert texts["bad", 0].finish_reason == "error"
    assert "not a number" in texts["bad", 0].error
    assert texts["good", 0] == answer(engine(runner=runner), good)
    for number in range(6):  # whatever place they get, the NaNs are gone
        again = request(str(number), max_tokens=12, seed=1, logit_bias={poison: -100})
        assert answer(busy, again).tokens == texts["good", 0].tokens


def test_a_failing_step_fails_only_the_request_concerned(caplog: pytest.LogCaptureFixture) -> None:
    class Breaking:
        """The engine's runner, breaking on one token as a device may."""

        def __init__(self, runner: Any) -> None:
            self.runner = runner

        def __getattr__(self, name: str) -> Any:
            return getattr(self.runner, name)

        def run(self, work: list[Work]) -> Tensor:
            if any(7 in item.tokens for item in work):
                raise RuntimeError("device fault")
            return self.runner.run(work)

    busy = engine()
    busy.runner = Breaking(busy.runner)
    good = request("good", max_tokens=9, seed=1, logit_bias={7: -100})
    texts = run(busy, [good, GenerationRequest("bad", [3, 7], SamplingSettings(n=2))])
    assert texts["bad", 0].finish_reason == texts["bad", 1].finish_reason == "error"
    assert texts["bad", 0].error == "The model failed with RuntimeError."
    assert texts["good", 0] == answer(engine(), good)
    assert "device fault" in caplog.text


@pytest.mark.parametrize(
    "way", [{"seed": 1}, {"num_beams": 2}, {"n": 2, "seed": 1}, {"best_of": 2, "seed": 1}], ids=str
)
@pytest.mark.parametrize("place", ["draws", "advance"])
def test_an_exception_while_a_token_is_chosen_ends_the_request_it_belongs_to(
    place: str, way: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for kind in (Sequence, Beams):
        whole = getattr(kind, place)

        def failing(self: Any, *arguments: Any, whole: Any = whole) -> Any:
            if self.request.request_id == "bad":
                raise IndexError("list index out of range")
            return whole(self, *arguments)

        monkeypatch.setattr(kind, place, failing)
    busy = engine()
    good = [request("good", max_tokens=9, seed=1), request("beams", max_tokens=5, num_beams=2)]
    texts = run(busy, [good[0], request("bad", max_tokens=9, **way), good[1]])
    assert {text.finish_reason for (name, _), text in texts.items() if name == "bad"} == {"error"}
    assert texts["bad", 0].error.endswith("failed with IndexError.")
    assert "list index out of range" in caplog.text
    for one in good:
        assert texts[one.request_id, 0] == answer(engine(), one)


# Settings at both ends of what is allowed, and what once turned logits infinite.
EXTREMES = {
    "temperature": [0.0, 1e-300, 1e-40, 1e-37, 1e-20, 1e-6, 1e-5, 1.0, 100.0],
    "repetition_penalty": [1e-300, 1e-40, 1e-37, 1e-20, 1.0, 100.0],
    "presence_penalty": [-2.0, 0.0, 2.0],
    "frequency_penalty": [-2.0, 0.0, 2.0],
    "top_k": [0, 1, 10**9],
    "top_p": [1e-300, 0.5, 1.0],
    "min_p": [0.0, 1e-300, 1.0],
    "typical_p": [1e-300, 0.5, 1.0],
    "logit_bias": [{}, {0: 100.0, 299: -100.0}, dict.fromkeys(range(300), -100.0), dict.fromkeys(range(300), 100.0)],
    "seed": [0, -(2**63), 2**64 - 1],
    "logprobs": [None, 0, 20],
    "echo": [False, True],
    "stop": [(), ("e", "th")],
    "stop_tokens": [(), tuple(range(0, 300, 3))],
}
WAYS = [{}, {"n": 2}, {"best_of": 3}, {"num_beams": 3, "n": 2}, {"prompt_lookup_tokens": 32}]


@settings(max_examples=60, deadline=None)
@given(
    st.fixed_dictionaries({name: st.sampled_from(values) for name, values in EXTREMES.items()}), st.sampled_from(WAYS)
)
def test_no_settings_can_end_the_engine_or_change_a_neighbours_answer(
    extreme: dict[str, Any], way: dict[str, Any]
) -> None:
    neighbour = request("neighbour", max_tokens=6, seed=3, top_p=0.9, logprobs=1)
    one = request("one", "the the the", max_tokens=5, **extreme, **way)
    busy = long_lived_engine()
    together = run(busy, [neighbour, one])
    assert together["neighbour", 0] == answer(busy, neighbour)
    assert {key: text for key, text in together.items() if key[0] == "one"} == run(busy, [one])
    for text in together.values():
        assert text.finish_reason in ("stop", "length")
        assert all(0 <= token < tokenizer().vocab_size for token in text.tokens)


@cache
def long_lived_engine() -> Engine:
    return engine()


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e-6])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    greedy = answer(engine(), request("a", max_tokens=8, temperature=0))
    assert answer(engine(), request("a", max_tokens=8, temperature=temperature)) == greedy


# -- Ways of generating -----------------------------------------------------------------------------------------------


def test_the_end_of_text_and_stop_tokens_end_a_text_before_themselves() -> None:
    greedy = answer(engine(), request("a", max_tokens=10, temperature=0))
    cut = answer(engine(), request("a", max_tokens=10, temperature=0, stop_tokens=(greedy.tokens[4],)))
    assert cut.tokens == greedy.tokens[: greedy.tokens.index(greedy.tokens[4])]
    assert cut.finish_reason == "stop"
    ended = answer(engine(), request("a", max_tokens=10, logit_bias={tokenizer().end_of_text: 100.0}))
    assert (ended.text, ended.tokens, ended.finish_reason) == ("", [], "stop")


def test_a_stop_string_ends_the_text_even_across_tokens() -> None:
    whole = answer(engine(), request("a", max_tokens=30, seed=5)).text
    stop = whole[10:13]
    cut = answer(engine(), request("a", max_tokens=30, seed=5, stop=(stop, "never there")))
    assert cut.text == whole[: whole.index(stop)]
    assert cut.finish_reason == "stop"


def test_usage_counts_every_token_once() -> None:
    text = answer(engine(), request("a", max_tokens=17, seed=3, logit_bias={tokenizer().end_of_text: -100}))
    assert len(text.tokens) == 17
    assert text.finish_reason == "length"
    assert text.text == tokenizer().decode(text.tokens)


def test_candidates_differ_and_each_is_what_it_would_be_with_fewer_beside_it() -> None:
    four = run(engine(), [request("a", max_tokens=8, seed=9, n=4)])
    assert len({text.text for text in four.values()}) == 4
    one = run(engine(), [request("a", max_tokens=8, seed=9)])
    assert one["a", 0] == four["a", 0]
    assert run(engine(max_batch_size=1), [request("a", max_tokens=8, seed=9, n=4)]) == four


def test_without_a_seed_two_answers_differ() -> None:
    texts = run(engine(), [request("a", max_tokens=12), request("b", max_tokens=12)])
    assert texts["a", 0].tokens != texts["b", 0].tokens


def test_best_of_answers_with_the_likeliest_per_token() -> None:
    def mean(text: Text) -> float:
        return sum(entry.logprob or 0 for entry in text.logprobs) / len(text.logprobs)

    bias = {tokenizer().end_of_text: -100.0}  # so that every token of a candidate is among its logprobs
    settings: dict[str, Any] = {"max_tokens": 8, "seed": 9, "logprobs": 0, "logit_bias": bias}
    every = run(engine(), [request("a", n=5, **settings)])
    best = run(engine(), [request("a", n=2, best_of=5, **settings)])
    ranked = sorted(every.values(), key=mean, reverse=True)
    assert [best["a", 0], best["a", 1]] == ranked[:2]


@pytest.mark.parametrize("chunk", [3, 64])
@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_echo_gives_the_prompt_with_the_models_logprobs_whatever_the_penalty(chunk: int, penalty: float) -> None:
    wanted = request("a", max_tokens=3, temperature=0, echo=True, logprobs=2, repetition_penalty=penalty)
    text = answer(engine(prefill_chunk_tokens=chunk), wanted)
    assert text.prompt is not None
    assert text.prompt.text == "the quick brown"
    tokens = text.prompt.tokens + text.tokens
    entries = (text.prompt.logprobs or []) + text.logprobs
    assert [entry.token for entry in entries] == tokens
    with torch.no_grad():
        expected = model()(torch.tensor([tokens]))[0].log_softmax(-1)
    assert entries[0].logprob is None
    for place, entry in enumerate(entries[1:]):
        assert entry.logprob == pytest.approx(expected[place, tokens[place + 1]].item(), abs=1e-4)
        values, ids = expected[place].topk(2)
        assert [token for token, _ in entry.top] == ids.tolist()
        assert [value for _, value in entry.top] == pytest.approx(values.tolist(), abs=1e-4)


@needs_compiler
@pytest.mark.parametrize("temperature", [0.0, 0.4])
@pytest.mark.parametrize("penalty", [1.0, 1.05])
def test_prompt_lookup_changes_the_speed_and_not_the_answer(temperature: float, penalty: float) -> None:
    settings: dict[str, Any] = {
        "max_tokens": 40,
        "seed": 3,
        "temperature": temperature,
        "repetition_penalty": penalty,
        "logprobs": 1,
        # A text that repeats itself, so that guesses come true.
        "logit_bias": dict.fromkeys(tokenizer().encode(" the the").tolist(), 12.0),
    }
    plain = answer(engine(), request("a", **settings))
    guessing = engine()
    assert answer(guessing, request("a", prompt_lookup_tokens=6, **settings)) == plain
    assert guessing.stats()["accepted_tokens"] > 10
    assert guessing.stats()["steps"] < 30


@needs_compiler
def test_as_many_tokens_are_guessed_as_a_request_may_ask_for() -> None:
    follows = list(range(100, 100 + MAX_LOOKUP_TOKENS))  # what once followed a token that comes again
    most = SamplingSettings(max_tokens=32, prompt_lookup_tokens=MAX_LOOKUP_TOKENS, logit_bias={99: 100.0})
    busy = engine()
    busy.add(GenerationRequest("a", [99, *follows[: CONTEXT - 34]], most))
    busy.step()  # reads the prompt and chooses 99
    busy.step()
    assert busy.stats()["drafted_tokens"] == CONTEXT - 34


@pytest.mark.parametrize("beams", [2, 4])
@pytest.mark.parametrize(("end_bias", "stop"), [(0.0, ()), (4.0, ()), (0.0, ("e", "oz")), (4.0, ("e",))])
def test_beam_search_finds_what_transformers_finds(
    beams: int, end_bias: float, stop: tuple[str, ...], tmp_path: Any
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from model.checkpoint import save_model

    # A head that likes to end, so that finished and running beams compete.
    ending = GPT(FAMILIES["modern"], tokenizer().vocab_size).eval()
    ending.load_state_dict(model().state_dict())
    end = tokenizer().end_of_text
    with torch.no_grad():
        ending.head.weight[end] *= 1 + end_bias
    save_model(tmp_path, ending, tokenizer())
    prompt = tokenizer().encode("the quick brown").tolist()
    peer: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    theirs = peer.generate(
        torch.tensor([prompt]),
        max_new_tokens=12,
        num_beams=beams,
        num_return_sequences=2,
        do_sample=False,
        eos_token_id=end,
        pad_token_id=end,
        **({"stop_strings": list(stop), "tokenizer": AutoTokenizer.from_pretrained(tmp_path)} if stop else {}),
    )
    searching = Engine(ending, tokenizer(), EngineSettings(weights="float32", prefill_chunk_tokens=4))
    ours = run(searching, [request("a", max_tokens=12, num_beams=beams, n=2, logprobs=0, stop=stop)])
    for index in range(2):
        expected = theirs[index, len(prompt) :].tolist()
        if end in expected:
            expected = expected[: expected.index(end)]
        assert ours["a", index].tokens == expected
        text = tokenizer().decode(expected)
        assert ours["a", index].text == text[: min((text.index(part) for part in stop if part in text), default=None)]


def test_greedy_generation_is_that_of_transformers(tmp_path: Any) -> None:
    from transformers import AutoModelForCausalLM

    from model.checkpoint import save_model

    for family in FAMILIES:
        save_model(tmp_path / family, model(family), tokenizer())
        prompt = tokenizer().encode("lazy dog; ").tolist()
        peer: Any = AutoModelForCausalLM.from_pretrained(tmp_path / family)
        theirs = peer.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False, repetition_penalty=1.2)
        one = request("a", "lazy dog; ", max_tokens=20, temperature=0, repetition_penalty=1.2)
        assert answer(engine(family), one).tokens == theirs[0, len(prompt) :].tolist()
