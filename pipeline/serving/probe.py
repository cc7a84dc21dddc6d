"""What a backend that nobody uses yet must do before it serves: score the probe text, and complete a few words."""

import asyncio
import uuid

from model.sampling import SamplingSettings
from model.scoring import bits_per_byte
from model.sequence import GenerationRequest
from model.tokenizer import Tokenizer
from pipeline.registry import PROBE_TEXT, VersionRefused, probe_windows
from pipeline.serving.backend import Backend

ANSWER_SECONDS = 120.0  # for four tokens that nothing else competes with


async def measure_served_probe(backend: Backend, tokenizer: Tokenizer, context_length: int) -> float:
    """Bits per byte of the probe text: against the registered weights' it shows what the storage of weights costs.

    Raises `ValueError` if the backend does not answer.
    """
    nats = 0.0
    for window in probe_windows(tokenizer, context_length):
        nats -= sum(await backend.score(window))
    return bits_per_byte(nats, len(PROBE_TEXT.encode()))


async def check_answers(backend: Backend, tokenizer: Tokenizer) -> None:
    """Have a few words completed; raises `VersionRefused` if nothing comes of it."""
    settings = SamplingSettings(max_tokens=4, temperature=0.0)
    request = GenerationRequest(f"probe-{uuid.uuid4().hex}", tokenizer.encode("The ").tolist(), settings)
    ticket = backend.submit([request])
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            while chunks := await ticket.read():
                for chunk in chunks:
                    if chunk.finish_reason not in (None, "stop", "length"):
                        raise VersionRefused(f"it does not answer ({chunk.finish_reason}: {chunk.error})")
    except TimeoutError:
        raise VersionRefused(f"it does not answer within {ANSWER_SECONDS:.0f} s") from None
    finally:
        backend.leave(ticket)
