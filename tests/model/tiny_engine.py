"""A small model, its engine, and what comes out of it: for the engine's tests."""

import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import model as model_room
from model.engine import Chunk, Engine, EngineSettings, GenerationRequest, SamplingSettings, TokenLogprob
from model.gpt import GPT, ModelConfig
from model.tokenizer import Tokenizer, train_bpe

CONTEXT = 64
FAMILIES = {
    "modern": ModelConfig(num_layers=2, width=48, num_heads=4, num_kv_heads=2, head_dim=20, context_length=CONTEXT),
    "classic": ModelConfig(family="classic", num_layers=2, width=48, num_heads=4, context_length=CONTEXT),
}
HAS_KERNEL_SOURCE = (Path(model_room.__file__).parent / "cpu/kernel.cpp").exists()
needs_compiler = pytest.mark.skipif(
    not HAS_KERNEL_SOURCE or not any(map(shutil.which, ("c++", "g++", "clang++"))),
    reason="the kernel needs the folder model/cpu and a C++ compiler",
)
RUNNERS = [
    pytest.param(("torch", "float32"), id="torch"),
    *(
        pytest.param(("kernel", weights), id=f"kernel-{weights}", marks=needs_compiler)
        for weights in ("float32", "bfloat16", "int8")
    ),
]


@cache
def tokenizer() -> Tokenizer:
    return train_bpe(["the quick brown fox jumps over the lazy dog; naïve cafés, 你好 and more. " * 20], 300)


@cache
def model(family: str = "modern") -> GPT:
    torch.manual_seed(11)
    made = GPT(FAMILIES[family], tokenizer().vocab_size)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.25 if parameter.ndim > 1 else 0.1))
    made.clear_padding()
    return made.eval()


def engine(family: str = "modern", runner: tuple[str, str] = ("auto", "float32"), **settings: Any) -> Engine:
    backend, weights = runner
    return Engine(model(family), tokenizer(), EngineSettings(backend=backend, weights=weights, **settings))


def request(
    name: str, prompt: str = "the quick brown", deadline: float | None = None, **settings: Any
) -> GenerationRequest:
    return GenerationRequest(name, tokenizer().encode(prompt).tolist(), SamplingSettings(**settings), deadline)


@dataclass
class Text:
    """The chunks of one answer, put together."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    prompt: Chunk | None = None
    error: str = ""


def gather(chunks: Iterable[Chunk], texts: dict[tuple[str, int], Text] | None = None) -> dict[tuple[str, int], Text]:
    texts = {} if texts is None else texts
    for chunk in chunks:
        text = texts.setdefault((chunk.request_id, chunk.index), Text())
        assert text.finish_reason is None, "nothing follows the end"
        if chunk.is_prompt:
            assert not text.tokens
            text.prompt = chunk
            continue
        text.text += chunk.text
        text.tokens += chunk.tokens
        text.logprobs += chunk.logprobs or []
        text.finish_reason = chunk.finish_reason
        text.error = chunk.error
    return texts


def run(engine: Engine, requests: Iterable[GenerationRequest]) -> dict[tuple[str, int], Text]:
    for one in requests:
        engine.add(one)
    texts: dict[tuple[str, int], Text] = {}
    while engine.has_work:
        gather(engine.step(), texts)
    assert engine.scheduler.num_free == engine.runner.num_slots, "every place is free again"
    return texts


def answer(engine: Engine, one: GenerationRequest) -> Text:
    return run(engine, [one])[one.request_id, 0]
