"""The HTTP API, over a real engine and a tiny model: what it answers, and how it refuses."""

import asyncio
import json
import math
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from pipeline import registry
from pipeline.config import ServeConfig
from pipeline.serving.live_engine import engine_starter
from pipeline.serving.probe import measure_served_probe
from pipeline.serving.protocol import CompletionRequest
from tests.pipeline.serving.local_server import LocalServer
from tests.pipeline.tiny_registry import TinyRegistry, tiny_tokenizer

CONTEXT = 128


@pytest.fixture(scope="module")
def server(tiny_registry: TinyRegistry) -> Iterator[LocalServer]:
    settings = ServeConfig(watch_seconds=0, threads=1, max_batch_size=8, weights="float32", versions=["champion", "1"])
    local = LocalServer(tiny_registry, settings)
    yield local
    local.close()


def test_openai_client_completes(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt="Return a new", max_tokens=10, seed=3)
    assert answer.model == "tiny"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 10
    assert answer.usage.prompt_tokens == len(tiny_tokenizer().encode("Return a new"))
    assert answer.choices[0].finish_reason == "length"
    again = client.completions.create(model="tiny@1", prompt="Return a new", max_tokens=10, seed=3)
    assert again.choices[0].text == answer.choices[0].text


def test_stream_is_the_same_text_in_pieces(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": "Grüße, 你", "max_tokens": 60, "seed": 5}
    whole = client.completions.create(**asked)
    chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == whole.choices[0].text
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    assert [choice.finish_reason for chunk in chunks[:-1] for choice in chunk.choices][-1] == "length"


def test_every_answer_names_what_answered(http: httpx.Client, tiny_registry: TinyRegistry) -> None:
    answer = http.post("/v1/completions", json={"prompt": "x"})
    record = registry.resolve("tiny", "1")
    assert answer.headers["x-model-version"] == "1"
    assert answer.headers["x-mlflow-run-id"] == record.run_id
    assert answer.headers["x-data-digest"] == "0123456789abcdef"
    listed = http.get("/v1/models").json()["data"]
    assert [model["id"] for model in listed] == ["tiny", "tiny@champion", "tiny@1"]
    assert {model["mlflow_run_id"] for model in listed} == {record.run_id}


def test_several_prompts_and_choices(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt=["Return", "a new list"], n=2, max_tokens=3, seed=1)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 12
    alone = client.completions.create(model="tiny", prompt="a new list", n=2, max_tokens=3, seed=1)
    assert [c.text for c in answer.choices[2:]] == [c.text for c in alone.choices]


def test_echo_scores_the_prompt_exactly(http: httpx.Client, tiny_registry: TinyRegistry) -> None:
    tokenizer = tiny_tokenizer()
    tokens = tokenizer.encode("Return a new list of naïve 🌍").tolist()
    body = {"prompt": tokens, "echo": True, "logprobs": 1, "max_tokens": 0}
    answer = http.post("/v1/completions", json=body).json()
    _, model = registry.load(registry.resolve("tiny", "1"), torch.device("cpu"))
    with torch.inference_mode():
        expected = model(torch.tensor([tokens])).float().log_softmax(-1)[0, :-1]
    expected = expected.gather(-1, torch.tensor(tokens[1:])[:, None]).squeeze(-1).tolist()
    found = answer["choices"][0]["logprobs"]
    assert found["token_logprobs"][0] is None
    assert found["token_logprobs"][1:] == pytest.approx(expected, abs=1e-4)
    assert answer["choices"][0]["text"] == tokenizer.decode(tokens)
    assert len(found["tokens"]) == len(found["text_offset"]) == len(found["top_logprobs"]) == len(tokens)
    assert answer["usage"]["completion_tokens"] == 0
    assert answer["choices"][0]["finish_reason"] == "length"


def test_what_lm_eval_asks_for(http: httpx.Client) -> None:
    """local-completions sends batches of token ids and reads log-probabilities of all but the generated token."""
    batch = [tiny_tokenizer().encode(text).tolist() for text in ("Return a new list", "of the sorted")]
    body = {"model": "tiny", "prompt": batch, "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1, "echo": True}
    answer = http.post("/v1/completions", json=body).json()
    for choice, tokens in zip(sorted(answer["choices"], key=lambda each: each["index"]), batch, strict=True):
        found = choice["logprobs"]
        assert len(found["token_logprobs"]) == len(tokens) + 1
        for logprob, top in zip(found["token_logprobs"][1:-1], found["top_logprobs"][1:-1], strict=True):
            assert logprob <= max(top.values()) + 1e-6


def test_a_scored_prompt_never_ends_without_its_extra_token() -> None:
    """lm-eval drops the last entry as the generated token; without one it would drop a scored one."""
    asked = {"prompt": "x", "max_tokens": 1, "logprobs": 1}
    assert CompletionRequest(**asked, echo=True).sampling(1, 400, frozenset({399})).logit_bias == {399: -100}
    assert CompletionRequest(**asked).sampling(1, 400, frozenset({399})).logit_bias == {}


def test_text_offsets_count_from_the_start_of_the_prompt(client: openai.OpenAI) -> None:
    prompt = "Grüße, 你 a new"
    asked: dict[str, Any] = {
        "model": "tiny",
        "prompt": [prompt, "x"],
        "max_tokens": 5,
        "logprobs": 0,
        "seed": 1,
        "n": 2,
    }
    alone = client.completions.create(**asked)
    echoed = client.completions.create(**asked, echo=True)
    for choice, whole in zip(alone.choices, echoed.choices, strict=True):
        assert choice.logprobs is not None
        assert whole.logprobs is not None
        start = len(prompt if choice.index < 2 else "x")
        assert (choice.logprobs.text_offset or [])[0] == start
        assert choice.logprobs.text_offset == (whole.logprobs.text_offset or [])[-5:]
        assert whole.text[start:] == choice.text
    [streamed] = [
        choice.logprobs.text_offset
        for chunk in client.completions.create(**asked | {"prompt": prompt, "n": 1, "max_tokens": 1}, stream=True)
        for choice in chunk.choices
        if choice.logprobs is not None
    ]
    assert streamed == [len(prompt)]


def test_suffix_may_be_empty_and_nothing_else(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": "x", "max_tokens": 1}
    assert client.completions.create(**asked, suffix="").choices
    assert client.completions.create(**asked, suffix=None).choices
    with pytest.raises(openai.BadRequestError, match="suffix is not supported"):
        client.completions.create(**asked, suffix="y")


@pytest.mark.parametrize("path", ["/", "/healthz", "/readyz", "/metrics", "/v1/models", "/docs", "/openapi.json"])
def test_head_is_get_without_the_body(http: httpx.Client, path: str) -> None:
    head, get = http.head(path), http.get(path)
    assert head.status_code == get.status_code == 200
    assert head.content == b""
    assert head.headers["content-type"] == get.headers["content-type"]
    assert http.head("/v1/models/none").status_code == 404
    assert http.head("/healthz").status_code == 200, "the connection is still in order"


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e-37, 1e-20, 1e-10])
def test_a_tiny_temperature_is_greedy(client: openai.OpenAI, temperature: float) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": "Return", "max_tokens": 8}
    extremes: dict[str, Any] = {"logit_bias": {"7": 100}, "extra_body": {"repetition_penalty": 1e-40}}
    greedy = client.completions.create(**asked, temperature=0).choices[0].text
    assert client.completions.create(**asked, temperature=temperature).choices[0].text == greedy
    client.completions.create(**asked, temperature=temperature, **extremes)
    assert client.completions.create(**asked, temperature=0).choices[0].text == greedy, "the engine is still there"


def test_stop_strings_are_left_out(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": "Return", "temperature": 0, "max_tokens": 30}
    text = client.completions.create(**asked).choices[0].text
    stop = text[4:6]
    cut = client.completions.create(**asked, stop=stop).choices[0]
    assert cut.text == text[: text.index(stop)]
    assert cut.finish_reason == "stop"


def test_beams_best_of_and_our_own_settings(client: openai.OpenAI) -> None:
    never_ends = {"399": -100}
    asked: dict[str, Any] = {"model": "tiny", "prompt": "Return", "max_tokens": 5, "logit_bias": never_ends}

    def mean(choice: Any) -> float:
        return sum(choice.logprobs.token_logprobs) / len(choice.logprobs.token_logprobs)

    three = client.completions.create(**asked, n=3, seed=1, logprobs=0).choices
    [best] = client.completions.create(**asked, best_of=3, seed=1, logprobs=0).choices
    assert best.text == max(three, key=mean).text
    first, second = client.completions.create(**asked, extra_body={"num_beams": 3}, n=2).choices
    assert first.text != second.text
    extra = {"top_k": 5, "min_p": 0.01, "typical_p": 0.9, "repetition_penalty": 1.2, "prompt_lookup_tokens": 3}
    answer = client.completions.create(**asked, extra_body=extra)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 5


def test_tokenize_round_trip(http: httpx.Client) -> None:
    text = "Grüße, 你好 🌍\0 naïve"
    tokens = http.post("/v1/tokenize", json={"text": text}).json()
    assert tokens["tokens"] == tiny_tokenizer().encode(text).tolist()
    assert tokens["count"] == len(tokens["tokens"])
    assert http.post("/v1/detokenize", json={"tokens": tokens["tokens"]}).json()["text"] == text


def test_live_ready_and_metrics(http: httpx.Client) -> None:
    assert http.get("/healthz").text == "ok"
    assert http.get("/readyz").text == "ready"
    before = read_metrics(http)
    # The text may not end before: without a seed, one answer in some sixty would.
    http.post("/v1/completions", json={"prompt": [1, 2, 3], "max_tokens": 7, "logit_bias": {"399": -100}})
    after = read_metrics(http)
    assert after["gpt_prompt_tokens_total"] - before.get("gpt_prompt_tokens_total", 0) == 3
    assert after["gpt_generated_tokens_total"] - before.get("gpt_generated_tokens_total", 0) == 7
    for name in ("gpt_time_to_first_token_seconds_count", "gpt_running_sequences", "gpt_cache_use_ratio"):
        assert name in after


def read_metrics(http: httpx.Client) -> dict[str, float]:
    families = text_string_to_metric_families(http.get("/metrics").text)
    return {sample.name: sample.value for family in families for sample in family.samples}


def test_documented(http: httpx.Client) -> None:
    assert http.get("/docs").status_code == 200
    paths = http.get("/openapi.json").json()["paths"]
    assert {"/v1/completions", "/v1/models", "/v1/tokenize", "/v1/detokenize", "/readyz"} <= paths.keys()


def test_prompt_may_be_cut_to_fit(http: httpx.Client) -> None:
    tokens = [5] * 300
    cut = {"prompt": tokens, "truncate_prompt_tokens": -1, "max_tokens": 8, "temperature": 0}
    answer = http.post("/v1/completions", json=cut)
    usage = answer.json()["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (CONTEXT - 8, 8, CONTEXT)
    long = "word " * 200_000
    answer = http.post("/v1/completions", json={"prompt": long, "truncate_prompt_tokens": 20})
    assert answer.json()["usage"]["prompt_tokens"] == 20


def test_prompt_may_fill_all_but_one_token_of_the_context(http: httpx.Client) -> None:
    body = {"prompt": [5] * (CONTEXT - 1), "echo": True, "logprobs": 0, "max_tokens": 0}
    answer = http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    assert len(answer.json()["choices"][0]["logprobs"]["token_logprobs"]) == CONTEXT - 1


BAD_BODIES: list[tuple[Any, str]] = [
    (b"", "no body"),
    (b"{", "not valid JSON"),
    (b"[1]", "JSON object"),
    (b'"text"', "JSON object"),
    (b"\xff\xfe", "JSON"),
    (b"[" * 10_000, "JSON"),
    (b"[" * 100_000, "more values"),
    (b'{"prompt": "\\ud800"}', "surrogate"),
    (b'{"prompt": "x", "temperature": NaN}', "temperature"),
    (b'{"prompt": "x", "temperature": 1e999}', "temperature"),
    (b'{"prompt": "x", "max_tokens": ' + b"9" * 5000 + b"}", "JSON"),
    ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
    ({"prompt": "x", "max_tokens": -1}, "max_tokens"),
    ({"prompt": "x", "max_tokens": 1_000_000}, "1000000"),
    ({"prompt": "x", "max_tokens": "5"}, "max_tokens"),
    ({"prompt": "x", "max_tokens": 5.5}, "max_tokens"),
    ({"prompt": "x", "max_tokens": True}, "max_tokens"),
    ({"prompt": "x", "temperature": -0.1}, "temperature"),
    ({"prompt": "x", "temperature": "hot"}, "temperature"),
    ({"prompt": "x", "top_p": 0}, "top_p"),
    ({"prompt": "x", "top_p": 1.1}, "top_p"),
    ({"prompt": "x", "top_k": -1}, "top_k"),
    ({"prompt": "x", "n": 0}, "n:"),
    ({"prompt": "x", "n": 17}, "n:"),
    ({"prompt": "x", "n": 3, "best_of": 2}, "best_of"),
    ({"prompt": "x", "best_of": 2, "stream": True}, "best_of"),
    ({"prompt": "x", "num_beams": 2, "best_of": 2}, "num_beams"),
    ({"prompt": "x", "logprobs": 21}, "logprobs"),
    ({"prompt": "x", "seed": 2**80}, "seed"),
    ({"prompt": "x", "stop": ["a"] * 17}, "stop"),
    ({"prompt": "x", "stop": ""}, "stop"),
    ({"prompt": "x", "stop": 5}, "stop"),
    ({"prompt": "x", "stream": "yes"}, "stream"),
    ({"prompt": "x", "stream_options": {"include_usage": True}}, "stream_options"),
    ({"prompt": "x", "stream": True, "stream_options": {"usage": True}}, "usage"),
    ({"prompt": "x", "suffix": "y"}, "suffix"),
    ({"prompt": "x", "logit_bias": {"a": 1}}, "logit_bias"),
    ({"prompt": "x", "logit_bias": {"99999": 1}}, "logit_bias"),
    ({"prompt": "x", "logit_bias": {"1": 101}}, "logit_bias"),
    ({"prompt": "x", "frequency_penalty": 3}, "frequency_penalty"),
    ({"prompt": "x", "temprature": 1}, "temprature"),
    ({"prompt": "x", "model": 5}, "model"),
    ({"prompt": {}}, "prompt must be"),
    ({"prompt": None}, "prompt must be"),
    ({"prompt": []}, "empty"),
    ({"prompt": [[]]}, ""),
    ({"prompt": [1, "x"]}, "prompt must be"),
    ({"prompt": [1.5]}, "prompt must be"),
    ({"prompt": [-1]}, "token id"),
    ({"prompt": [400]}, "400"),
    ({"prompt": [2**40]}, "token id"),
    ({"prompt": [[1], [400]]}, "400"),
    ({"prompt": ["x"] * 129}, "128"),
    ({"prompt": "word " * 500}, "context"),
    ({"prompt": "word " * 500_000}, "context"),
    ({"prompt": [5] * CONTEXT}, "context"),
    ({"prompt": "x", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    ({"prompt": "x", "truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
]


@pytest.mark.parametrize(("body", "says"), BAD_BODIES, ids=lambda value: str(value)[:40])
def test_bad_input_is_refused_in_one_sentence(http: httpx.Client, body: Any, says: str) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body)
    answer = http.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
    if body == {"prompt": [[]]}:  # no tokens: the start of a document, as an empty text is
        assert answer.status_code == 200
        return
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert says in error["message"], error["message"]
    assert error["message"].endswith(".")
    assert "\n" not in error["message"]


def test_bad_input_costs_nobody_the_connection(http: httpx.Client) -> None:
    # An error that escapes the application is answered too, but the server hangs up after it.
    connection = HTTPConnection(str(http.base_url.host), http.base_url.port, timeout=60)
    connection.connect()
    first = connection.sock
    for body, _ in [*BAD_BODIES, ({"prompt": "x", "max_tokens": 1}, "")]:
        content = body if isinstance(body, bytes) else json.dumps(body)
        connection.request("POST", "/v1/completions", body=content, headers={"Content-Type": "application/json"})
        answer = connection.getresponse()
        answer.read()
    assert answer.status == 200
    assert connection.sock is first


def test_other_refusals(http: httpx.Client, client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="There is no model 'gpt-4' here; there is tiny, "):
        client.completions.create(model="gpt-4", prompt="x")
    with pytest.raises(openai.BadRequestError, match="room for"):
        client.completions.create(model="tiny", prompt="x", max_tokens=1000)
    big = http.post("/v1/completions", content=b'{"prompt": "' + b"x" * 10_000_000 + b'"}')
    assert big.status_code == 413
    assert "limit" in big.json()["error"]["message"]
    chunked = http.post("/v1/completions", content=iter([b" " * 1_000_000] * 10))
    assert chunked.status_code == 413
    form = http.post("/v1/completions", data={"prompt": "x"})
    assert form.status_code == 415
    assert http.get("/v1/completions").status_code == 405
    assert "error" in http.get("/v1/completions").json()
    assert http.get("/v2").json()["error"]["type"] == "not_found_error"
    assert http.get("/v1/models/none").status_code == 404
    assert http.post("/v1/detokenize", json={"tokens": [400]}).status_code == 400
    assert http.post("/v1/tokenize", content=b'{"text": "\\udfff"}').status_code in (400, 415)


def test_nul_and_empty_prompts_are_text(http: httpx.Client) -> None:
    for prompt in ("\0", "", " "):
        answer = http.post("/v1/completions", json={"prompt": prompt, "max_tokens": 1})
        assert answer.status_code == 200, answer.text
    assert http.post("/v1/completions", json={}).json()["usage"]["prompt_tokens"] == 1


def test_elsewhere_needs_a_key_or_open_access(http: httpx.Client) -> None:
    """A page on another host that resolves to this machine (DNS rebinding) is refused."""
    answer = http.get("/v1/models", headers={"Host": "evil.example"})
    assert answer.status_code == 403
    assert "no API keys" in answer.json()["error"]["message"]


def test_the_probe_text_measures_the_model(tiny_registry: TinyRegistry) -> None:
    loaded, model = registry.load(registry.resolve("tiny", "1"), torch.device("cpu"))
    measured = registry.measure_probe(model, loaded.tokenizer)
    assert math.isfinite(measured)
    registry.check_probe(loaded.record, measured, 0.02)
    with pytest.raises(ValueError, match="the registry says"):
        registry.check_probe(loaded.record, measured * 1.1, 0.02)
    with pytest.raises(ValueError, match="nan"):
        registry.check_probe(loaded.record, math.nan, 0.02)


@pytest.mark.parametrize(("weights", "largest_change"), [("float32", 1e-4), ("bfloat16", 0.05), ("int8", 0.1)])
def test_the_engine_measures_the_same_less_what_its_weights_cost(
    tiny_registry: TinyRegistry, weights: str, largest_change: float
) -> None:
    loaded, model = registry.load(registry.resolve("tiny", "1"), torch.device("cpu"))
    probe = registry.measure_probe(model, loaded.tokenizer)

    async def measure() -> float:
        start = engine_starter(ServeConfig(max_batch_size=2, weights=weights))
        backend = await start(Path(), model, loaded.tokenizer)
        try:
            return await measure_served_probe(backend, loaded.tokenizer, loaded.context_length)
        finally:
            await backend.close(0)

    change = asyncio.run(measure()) - probe
    assert abs(change) < largest_change
    if weights != "float32":
        assert abs(change) > 1e-6, "weights that lose precision show it"


def test_models_says_what_the_weights_cost(http: httpx.Client) -> None:
    entry = http.get("/v1/models").json()["data"][0]
    assert entry["weights"] == "float32"
    assert abs(entry["probe_bits_per_byte_change"]) < 1e-4
    assert entry["probe_bits_per_byte"] > 1
