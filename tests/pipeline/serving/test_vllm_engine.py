"""vLLM behind the seam: what is ours stays ours, what it has not is refused, and its end is noticed."""

import asyncio
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest

from model.gpt import GPT
from model.sampling import SamplingSettings
from model.sequence import Chunk, GenerationRequest
from model.tokenizer import Tokenizer
from pipeline.config import ServeConfig
from pipeline.serve import backend_starter
from pipeline.serving import vllm_engine
from pipeline.serving.backend import Backend
from pipeline.serving.errors import ApiError, EngineDied, Overloaded
from pipeline.serving.live_engine import max_active, places
from pipeline.serving.vllm_engine import NOT_INSTALLED, VllmEngine
from tests.pipeline.serving.local_server import LocalServer
from tests.pipeline.tiny_registry import TinyRegistry, tiny_tokenizer

ROOT = Path(__file__).parents[3]


@dataclass
class FakeVllm:
    """Says the same words to everybody, a token at a time, as `AsyncLLM` does: the stop token is the last one."""

    tokenizer: Tokenizer
    words: str = "sorted items. Return a new list"
    seconds: float = 0.0  # between tokens
    errored: bool = False
    fails: Exception | None = None
    ended: list[str] = field(default_factory=list)  # the requests whose generators were closed
    parameters: dict[str, dict[str, Any]] = field(default_factory=dict)

    async def generate(self, prompt: Any, sampling_params: Any, request_id: str) -> AsyncGenerator[Any, None]:
        self.parameters[request_id] = sampling_params
        candidate = int(request_id.rpartition("-")[2])
        said = [*self.tokenizer.encode(self.words).tolist()[candidate:], self.tokenizer.end_of_text]
        said = said[: sampling_params["max_tokens"]]
        rows = [None, *({token: self.logprob(-3.0, 1)} for token in prompt["prompt_token_ids"][1:])]
        try:
            for place, token in enumerate(said):
                await asyncio.sleep(self.seconds)
                if self.fails is not None:
                    raise self.fails
                is_stop = token in sampling_params["stop_token_ids"]
                reason = "stop" if is_stop else ("length" if place + 1 == len(said) else None)
                # The later candidates are the likelier ones; token 1 is said to be likelier than any.
                row = {token: self.logprob(-2.0 / (1 + candidate), 2), 1: self.logprob(-0.5, 1)}
                logprobs = None if sampling_params["logprobs"] is None else [row]
                output = SimpleNamespace(token_ids=[token], logprobs=logprobs, finish_reason=reason)
                yield SimpleNamespace(
                    outputs=[output], num_cached_tokens=3, prompt_logprobs=rows if not place else None
                )
        finally:
            self.ended.append(request_id)

    def logprob(self, value: float, rank: int) -> Any:
        return SimpleNamespace(logprob=value, rank=rank)

    def shutdown(self) -> None:
        self.errored = True


def engine_of(client: FakeVllm, places: int = 4, max_queue: int = 4) -> VllmEngine:
    return VllmEngine(
        client,
        dict,
        client.tokenizer,
        weights="float32",
        places=places,
        max_queue=max_queue,
        cache_tokens=1000,
    )


async def answer(backend: Backend, deadline: float | None = None, **asked: Any) -> list[Chunk]:
    settings = SamplingSettings(**{"max_tokens": 50, "temperature": 0.0} | asked)
    ticket = backend.submit([GenerationRequest("a", tiny_tokenizer().encode("Return").tolist(), settings, deadline)])
    chunks = []
    try:
        while more := await ticket.read():
            chunks += more
    finally:
        backend.leave(ticket)
    return chunks


@pytest.fixture
def client() -> FakeVllm:
    return FakeVllm(tiny_tokenizer())


def text_of(chunks: list[Chunk], index: int = 0) -> str:
    return "".join(chunk.text for chunk in chunks if chunk.index == index)


def test_tokens_become_text_until_the_end_of_text(client: FakeVllm) -> None:
    chunks = asyncio.run(answer(engine_of(client)))
    assert text_of(chunks) == client.words
    assert chunks[-1].finish_reason == "stop"
    assert client.tokenizer.end_of_text not in [token for chunk in chunks for token in chunk.tokens]
    assert chunks[0].reused_tokens == 3
    assert asyncio.run(answer(engine_of(client), max_tokens=2))[-1].finish_reason == "length"


def test_a_stop_string_is_ours_and_ends_vllms_work(client: FakeVllm) -> None:
    client.seconds = 0.001
    chunks = asyncio.run(answer(engine_of(client), stop=("Ret",)))
    assert text_of(chunks) == "sorted items. "
    assert chunks[-1].finish_reason == "stop"
    assert client.ended == ["a-0"]
    assert "stop" not in client.parameters["a-0"]


def test_the_best_candidates_are_ranked_here(client: FakeVllm) -> None:
    chunks = asyncio.run(answer(engine_of(client), n=2, best_of=4, temperature=1.0, seed=5))
    tokens = client.tokenizer.encode(client.words).tolist()
    for index, candidate in enumerate((3, 2)):
        assert text_of(chunks, index) == client.tokenizer.decode(tokens[candidate:])
    assert len({each["seed"] for each in client.parameters.values()}) == 4, "each draws numbers of its own"


def test_log_probabilities_are_told_as_ours_are(client: FakeVllm) -> None:
    chunks = asyncio.run(answer(engine_of(client), echo=True, logprobs=1, max_tokens=2))
    prompt, *generated = chunks
    assert [each.logprob for each in prompt.logprobs or ()] == [None] + [-3.0] * (len(prompt.tokens) - 1)
    told = [each for chunk in generated for each in chunk.logprobs or ()]
    assert [(each.logprob, each.top) for each in told] == [(-2.0, [(1, -0.5)])] * 2
    assert asyncio.run(engine_of(client).score([4, 5, 6])) == [-3.0, -3.0]


def test_settings_have_vllms_names(client: FakeVllm) -> None:
    asked = {"top_k": 7, "top_p": 0.5, "min_p": 0.1, "repetition_penalty": 1.2, "logit_bias": {3: 1.5}}
    asyncio.run(answer(engine_of(client), temperature=0.7, seed=2**64 - 1, stop_tokens=(9,), **asked))
    given = client.parameters["a-0"]
    assert {name: given[name] for name in asked} == asked
    assert given["temperature"] == 0.7
    assert 0 <= given["seed"] < 2**63
    assert given["stop_token_ids"] == [9, client.tokenizer.end_of_text]
    assert given["allowed_token_ids"] is None
    spare = VllmEngine(client, dict, client.tokenizer, weights="", places=1, max_queue=1, cache_tokens=1, spare_rows=5)
    asyncio.run(answer(spare))
    assert client.parameters["a-0"]["allowed_token_ids"] == list(range(client.tokenizer.vocab_size))


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        ({"num_beams": 2}, "num_beams"),
        ({"typical_p": 0.5}, "typical_p"),
        ({"prompt_lookup_tokens": 4}, "prompt_lookup"),
    ],
)
def test_what_vllm_has_not_is_refused_in_a_sentence(client: FakeVllm, asked: dict[str, Any], field: str) -> None:
    with pytest.raises(ApiError, match=f"{field}.* is not supported by this server, which runs vLLM") as caught:
        asyncio.run(answer(engine_of(client), **asked))
    assert caught.value.status == 400
    assert not client.parameters, "nothing was begun"


def test_a_deadline_ends_the_request_and_vllms_work(client: FakeVllm) -> None:
    client.seconds = 0.05
    chunks = asyncio.run(answer(engine_of(client), deadline=time.monotonic() + 0.12))
    assert chunks[-1].finish_reason == "deadline"
    assert client.ended == ["a-0"]


def test_who_leaves_ends_vllms_work(client: FakeVllm) -> None:
    client.seconds = 0.01

    async def leave() -> int:
        backend = engine_of(client)
        ticket = backend.submit([GenerationRequest("b", [1, 2], SamplingSettings(max_tokens=50, n=2))])
        await ticket.read()
        assert backend.stats().running == 2
        backend.leave(ticket)
        await asyncio.sleep(0.05)
        return backend.stats().running

    assert asyncio.run(leave()) == 0
    assert sorted(client.ended) == ["b-0", "b-1"]


def test_a_full_queue_refuses_and_so_does_what_never_fits(client: FakeVllm) -> None:
    client.seconds = 0.05

    async def fill() -> None:
        backend = engine_of(client, places=1, max_queue=1)
        two = [GenerationRequest(name, [1, 2], SamplingSettings()) for name in "cd"]
        backend.submit(two)
        assert (backend.stats().running, backend.stats().waiting) == (1, 1)
        with pytest.raises(Overloaded):
            await answer(backend)
        with pytest.raises(ValueError, match="at most 2 fit"):
            await answer(backend, n=3)
        await backend.close(0)

    asyncio.run(fill())


@pytest.mark.parametrize(("error", "dies"), [(RuntimeError("a kernel"), True), (RuntimeError("one row"), False)])
def test_its_end_fails_all_and_a_failure_of_one_request_that_one(
    client: FakeVllm, error: Exception, dies: bool
) -> None:
    async def fail() -> None:
        backend = engine_of(client)
        client.fails, client.errored = error, False
        if dies:
            backend.check()
            ticket = backend.submit([GenerationRequest("e", [1], SamplingSettings())])
            client.errored = True
            with pytest.raises(EngineDied, match="a kernel"):
                await ticket.read()
            with pytest.raises(EngineDied):
                backend.check()
        else:
            assert (await answer(backend))[-1].finish_reason == "error"
            backend.check()

    asyncio.run(fail())


def test_what_vllm_finds_wrong_with_a_request_is_its_askers_fault(client: FakeVllm) -> None:
    client.fails = ValueError("too long for me")
    with pytest.raises(ValueError, match="too long for me"):
        asyncio.run(answer(engine_of(client)))


def test_closing_fails_what_is_left(client: FakeVllm) -> None:
    client.seconds = 0.2

    async def close() -> None:
        backend = engine_of(client)
        ticket = backend.submit([GenerationRequest("f", [1], SamplingSettings())])
        await backend.close(0.01)
        with pytest.raises(EngineDied, match="unloaded"):
            await ticket.read()
        with pytest.raises(EngineDied):
            backend.check()

    asyncio.run(close())
    assert client.errored, "its process has ended"


@pytest.fixture
def server(tiny_registry: TinyRegistry) -> Iterator[LocalServer]:
    async def start(checkpoint: Path, model: GPT, tokenizer: Tokenizer) -> Backend:
        return engine_of(FakeVllm(tokenizer))

    local = LocalServer(tiny_registry, ServeConfig(watch_seconds=0, backend="vllm"), start_backend=start)
    yield local
    local.close()


def test_the_api_stays_ours(server: LocalServer) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        found = client.completions.create(model="tiny", prompt="a", max_tokens=50, stop=[" new"])
        assert found.choices[0].text == "sorted items. Return a"
        stream = client.completions.create(model="tiny", prompt="a", max_tokens=50, stream=True)
        assert "".join(piece.choices[0].text for piece in stream) == "sorted items. Return a new list"
    refused = httpx.post(f"{server.url}/v1/completions", json={"prompt": "a", "num_beams": 4})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "num_beams"
    assert not server.models.versions[0].backend.tickets


def test_a_setting_chooses_it_and_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_engine.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'gpt-53m\[vllm\]'"):
        backend_starter(ServeConfig(backend="vllm"))
    assert backend_starter(ServeConfig()) is not None
    with pytest.raises(ValueError, match="engine or vllm"):
        ServeConfig(backend="tgi")
    with pytest.raises(ValueError, match="int8 is our engine's"):
        ServeConfig(backend="vllm", weights="int8")
    assert "vllm" in NOT_INSTALLED


def test_a_replica_takes_on_what_suits_its_device() -> None:
    assert places(ServeConfig()) == 16
    assert places(ServeConfig(gpus_per_replica=0.5)) == 128
    assert places(ServeConfig(gpus_per_replica=1, max_batch_size=3)) == 3
    assert max_active(ServeConfig(gpus_per_replica=1, max_queue=7)) == 135


def python_with_vllm() -> str | None:
    """A Python that has vLLM: this one, or the one that VLLM_PYTHON names."""
    return sys.executable if importlib.util.find_spec("vllm") else os.environ.get("VLLM_PYTHON")


@pytest.mark.slow
@pytest.mark.skipif(python_with_vllm() is None, reason="needs vLLM, here or in the Python that VLLM_PYTHON names")
@pytest.mark.timeout(900)
@pytest.mark.parametrize("family", ["gpt2", "qwen3", "llama"])
def test_vllm_itself_answers_greedily_as_our_engine_does(family: str) -> None:
    done = subprocess.run(
        [str(python_with_vllm()), "-m", "tests.pipeline.serving.vllm_greedy", family],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    near: Callable[[Any], Any] = lambda values: pytest.approx(values, abs=2e-3)  # noqa: E731
    for ours, theirs in zip(found["ours"]["answers"], found["vllm"]["answers"], strict=True):
        assert {name: ours[name] for name in ("text", "tokens", "reason", "top")} == {
            name: theirs[name] for name in ("text", "tokens", "reason", "top")
        }
        assert theirs["logprobs"] == near(ours["logprobs"])
    assert found["vllm"]["scores"] == near(found["ours"]["scores"])
    first, second = found["vllm"]["sampled"]
    assert first == second, "a seed gives the same answer"
    assert found["vllm"]["left"] == 0
    assert found["vllm"]["died"] == ["EngineDied", "EngineDied"], "killed in the middle of an answer"
