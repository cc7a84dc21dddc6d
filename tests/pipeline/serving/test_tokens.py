"""Tokenizing in vLLM's form, by which lm-eval and other tools learn of the tokenizer; and lm-eval itself."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from model.chat import CHAT_TEMPLATE, OwnTemplate, encode
from model.checkpoint import load_model
from model.tokenizer import load_tokenizer
from pipeline.config import ServeConfig
from pipeline.evaluation.answers import answer
from pipeline.evaluation.evaluators import summarise
from pipeline.evaluation.tasks import load_task
from pipeline.registry import download, resolve
from pipeline.serving.access import ApiKey
from tests.pipeline.evaluation.lm_eval_reference import ITEMS, ask_lm_evals_client
from tests.pipeline.serving.asking import CLIENT, Start
from tests.pipeline.serving.local_server import LocalServer
from tests.pipeline.tiny_registry import TinyRegistry, make_registry, tiny_tokenizer

CONTEXT = 256
TURNS = [{"role": "user", "content": "Return a new list."}]


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> TinyRegistry:
    found = make_registry(tmp_path_factory.mktemp("tokens"))
    found.add_version(seed=1, alias="champion", context_length=CONTEXT, chat_template=CHAT_TEMPLATE)
    found.add_version(seed=1, alias="base", context_length=CONTEXT)
    return found


@pytest.fixture(scope="module")
def server(registry: TinyRegistry) -> Iterator[LocalServer]:
    versions = ["champion", "base"]
    settings = ServeConfig(watch_seconds=0, threads=1, weights="float32", max_batch_size=4, versions=versions)
    local = LocalServer(registry, settings)
    yield local
    local.close()


def post(server: LocalServer, path: str, body: dict[str, Any]) -> httpx.Response:
    return CLIENT.post(f"{server.url}{path}", json=body)


def test_text_goes_there_and_back_in_vllms_form(server: LocalServer) -> None:
    text = "Grüße, 你好 🌍\0 naïve"
    found = post(server, "/tokenize", {"prompt": text, "add_special_tokens": False}).json()
    tokens = tiny_tokenizer().encode(text).tolist()
    assert found == {"count": len(tokens), "max_model_len": CONTEXT, "tokens": tokens}
    assert post(server, "/detokenize", {"tokens": tokens}).json() == {"prompt": text}
    assert post(server, "/tokenize", {"prompt": ""}).json()["tokens"] == []


def test_the_names_of_special_tokens_are_those_tokens(server: LocalServer) -> None:
    info = CLIENT.get(f"{server.url}/tokenizer_info").json()
    assert info["chat_template"] == CHAT_TEMPLATE
    assert info["model_max_length"] == CONTEXT
    end = tiny_tokenizer().end_of_text
    for name in ("eos_token", "bos_token"):
        assert post(server, "/tokenize", {"prompt": info[name]}).json()["tokens"] == [end]
    assert end not in post(server, "/v1/tokenize", {"text": info["eos_token"]}).json()["tokens"]
    assert CLIENT.get(f"{server.url}/tokenizer_info?model=tiny@base").json()["chat_template"] is None


def test_a_conversation_is_tokenized_as_it_would_be_asked(server: LocalServer) -> None:
    for ask in (True, False):
        found = post(server, "/tokenize", {"messages": TURNS, "add_generation_prompt": ask}).json()
        assert found["tokens"] == encode(tiny_tokenizer(), OwnTemplate().render(TURNS, ask=ask))[0].tolist()


@pytest.mark.parametrize(
    ("path", "body", "says"),
    [
        ("/tokenize", {}, "Send either prompt or messages."),
        ("/tokenize", {"prompt": "a", "messages": TURNS}, "Send either prompt or messages."),
        ("/tokenize", {"messages": TURNS, "model": "tiny@base"}, "no chat template"),
        ("/tokenize", {"prompt": "a", "model": "other"}, "There is no model"),
        ("/tokenize", {"prompt": "a", "return_token_strs": True}, "return_token_strs"),
        ("/tokenize", {"text": "a"}, "no field 'text'"),
        ("/detokenize", {"tokens": [400]}, "token ids go from 0 to"),
    ],
)
def test_what_cannot_be_tokenized_has_a_sentence(
    server: LocalServer, path: str, body: dict[str, Any], says: str
) -> None:
    refused = post(server, path, body)
    assert 400 <= refused.status_code < 500
    assert says in refused.json()["error"]["message"]


def test_a_long_text_is_tokenized_beside_the_loop_and_half_a_character_refused(server: LocalServer) -> None:
    text = "Return a new list. " * 2_000
    assert post(server, "/tokenize", {"prompt": text}).json()["tokens"] == tiny_tokenizer().encode(text).tolist()
    refused = CLIENT.post(
        f"{server.url}/tokenize", content=b'{"prompt": "\\ud800"}', headers={"Content-Type": "application/json"}
    )
    assert refused.status_code == 400


def test_strangers_may_not_tokenize(start: Start) -> None:
    server = start(keys=(ApiKey("a", hashlib.sha256(b"first").hexdigest()),))
    for method, path in (("POST", "/tokenize"), ("POST", "/detokenize"), ("GET", "/tokenizer_info")):
        assert CLIENT.request(method, f"{server.url}{path}", json={"prompt": "a"}).status_code == 401
    header = {"Authorization": "Bearer first"}
    assert CLIENT.get(f"{server.url}/tokenizer_info", headers=header).status_code == 200


@pytest.mark.slow
def test_lm_evals_client_finds_the_figures_that_we_find(
    server: LocalServer, registry: TinyRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval", reason="the peer lm-eval is not installed: pip install -e '.[peers-evaluate]'")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    told = ask_lm_evals_client(server.url, ITEMS, CONTEXT)
    record = resolve(registry.current().name, "champion")
    checkpoint = download(record, tmp_path)
    for name, path in ITEMS.items():
        task = load_task(f"{name}={path}")
        answers = answer(load_model(checkpoint), load_tokenizer(checkpoint), task.items)
        for ours, theirs in zip(answers, told[name]["answers"], strict=True):
            assert ours.nats == pytest.approx([nats for nats, _ in theirs], rel=1e-5, abs=1e-4)
            assert all(greedy in (None, ours.greedy[number]) for number, (_, greedy) in enumerate(theirs))
        figures = summarise(task.shape, task.items, answers)
        for metric, (value, _) in told[name]["figures"].items():
            assert figures[metric].value == pytest.approx(value, rel=1e-4), (name, metric)
