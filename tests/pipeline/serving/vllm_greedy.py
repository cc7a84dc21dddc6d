"""Run in a Python that has vLLM: greedy answers of vLLM behind our seam, beside our engine's, on one model folder.

python -m tests.pipeline.serving.vllm_greedy FAMILY       # prints one JSON object

Everything here is `pipeline.serving.vllm_engine` against a real vLLM; nothing stands in for it.
"""

import asyncio
import json
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch

from model.checkpoint import load_model, save_model
from model.engine import Engine, EngineSettings
from model.gpt import GPT, ModelConfig
from model.sampling import SamplingSettings
from model.sequence import Chunk, GenerationRequest
from model.tokenizer import Tokenizer, train_bpe
from pipeline.config import ServeConfig
from pipeline.serving.backend import Backend
from pipeline.serving.vllm_engine import vllm_starter

TEXT = ["Return a new list of the sorted items. " * 20, "Grüße, 你好 🌍 naïve café. " * 10]
# Heads of 32 channels: vLLM's attention for CPUs begins there.
SMALL: dict[str, Any] = {"num_layers": 2, "width": 64, "num_heads": 2, "context_length": 128}
FAMILIES = {
    "gpt2": ModelConfig("classic", tie_embeddings=True, **SMALL),
    "qwen3": ModelConfig("modern", num_kv_heads=1, **SMALL),
    "llama": ModelConfig("modern", qk_norm=False, **SMALL),
}
PROMPTS = ["Return a new list", "Grüße, 你", "the items sorted. " * 4]


def build(folder: Path, family: str) -> tuple[GPT, Tokenizer]:
    """Write a folder of random weights whose logits lie well apart."""
    tokenizer = train_bpe(TEXT, 300)
    torch.manual_seed(3)
    model = GPT(FAMILIES[family], tokenizer.vocab_size)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.2 * torch.randn_like(weight)
    model.clear_padding()
    save_model(folder, model, tokenizer)
    return load_model(folder).eval(), tokenizer


def requests(tokenizer: Tokenizer) -> list[GenerationRequest]:
    """Greedy ones with log-probabilities; the last has a stop string, a bias and penalties too."""
    asked: dict[str, Any] = {"max_tokens": 24, "temperature": 0.0, "logprobs": 2}
    more = {"stop": (" l",), "logit_bias": {5: -3.0}, "repetition_penalty": 1.3, "frequency_penalty": 0.5}
    settings = [SamplingSettings(**asked)] * len(PROMPTS) + [SamplingSettings(**asked | more)]
    texts = [*PROMPTS, PROMPTS[0]]
    return [
        GenerationRequest(str(number), tokenizer.encode(text).tolist(), each)
        for number, (text, each) in enumerate(zip(texts, settings, strict=True))
    ]


def gather(chunks: list[Chunk]) -> dict[str, Any]:
    return {
        "text": "".join(chunk.text for chunk in chunks),
        "tokens": [token for chunk in chunks for token in chunk.tokens],
        "reason": chunks[-1].finish_reason,
        "logprobs": [each.logprob for chunk in chunks for each in chunk.logprobs or ()],
        "top": [[token for token, _ in each.top] for chunk in chunks for each in chunk.logprobs or ()],
    }


def ask_ours(model: GPT, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    engine = Engine(model, tokenizer, EngineSettings(weights="float32", threads=1))
    found: dict[str, list[Chunk]] = {}
    for request in requests(tokenizer):
        engine.add(request)
    while engine.has_work:
        for chunk in engine.step():
            found.setdefault(chunk.request_id, []).append(chunk)
    return [gather(found[name]) for name in sorted(found)]


async def ask_vllm(folder: Path, model: GPT, tokenizer: Tokenizer) -> dict[str, Any]:
    settings = ServeConfig(backend="vllm", weights="float32", max_batch_size=4, cache_bytes=2**28)
    backend = await vllm_starter(settings)(folder, model, tokenizer)
    try:

        async def answer(request: GenerationRequest) -> dict[str, Any]:
            ticket, chunks = backend.submit([request]), []
            try:
                while more := await ticket.read():
                    chunks += more
            finally:
                backend.leave(ticket)
            return gather(chunks)

        answers = await asyncio.gather(*map(answer, requests(tokenizer)))
        scores = await backend.score(tokenizer.encode(TEXT[0]).tolist()[:60])
        sampled = [await answer(sampling(tokenizer)) for _ in range(2)]
        left = await leave_early(backend, tokenizer)
        backend.check()
        died = await kill(backend, tokenizer)
        return {"answers": answers, "scores": scores, "sampled": sampled, "left": left, "died": died}
    finally:
        await backend.close(5)


def sampling(tokenizer: Tokenizer) -> GenerationRequest:
    """With a seed, the best two of four."""
    settings = SamplingSettings(max_tokens=8, seed=11, top_p=0.9, min_p=0.01, n=2, best_of=4)
    return GenerationRequest("sampled", tokenizer.encode(PROMPTS[0]).tolist(), settings)


async def leave_early(backend: Backend, tokenizer: Tokenizer) -> int:
    """A client that goes away after the first chunk: nobody's text is in the making after a moment."""
    long = SamplingSettings(max_tokens=100, temperature=0.0, logit_bias={tokenizer.end_of_text: -100.0})
    ticket = backend.submit([GenerationRequest("left", tokenizer.encode(PROMPTS[0]).tolist(), long)])
    await ticket.read()
    backend.leave(ticket)
    await asyncio.sleep(0.2)
    return backend.stats().running


async def kill(backend: Backend, tokenizer: Tokenizer) -> list[str]:
    """Kill vLLM's processes in the middle of an answer; returns what its reader and the health check are told."""
    long = SamplingSettings(max_tokens=100, temperature=0.0, logit_bias={tokenizer.end_of_text: -100.0})
    ticket = backend.submit([GenerationRequest("killed", tokenizer.encode(PROMPTS[0]).tolist(), long)])
    await ticket.read()
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            process.kill()
    told = []
    try:
        async with asyncio.timeout(60):
            while await ticket.read():
                pass
    except Exception as error:
        told.append(type(error).__name__)
    try:
        backend.check()
    except Exception as error:
        told.append(type(error).__name__)
    backend.leave(ticket)
    return told


def main(family: str) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        model, tokenizer = build(Path(temporary), family)
        ours = ask_ours(model, tokenizer)
        ids = torch.tensor([tokenizer.encode(TEXT[0]).tolist()[:60]])
        with torch.no_grad():
            scores = model(ids).log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0].tolist()
        theirs = asyncio.run(ask_vllm(Path(temporary), model, tokenizer))
    print(json.dumps({"ours": {"answers": ours, "scores": scores}, "vllm": theirs}))


if __name__ == "__main__":
    main(sys.argv[1])
