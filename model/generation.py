"""Text from a prompt, in one call: for samples while training, for the terminal, for MLflow's pyfunc.

for text in stream_text(model, tokenizer, "Once upon", SamplingSettings(max_tokens=50, temperature=0.8)):
    print(text, end="", flush=True)
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from model.chat import ChatTemplate, Message, encode, render, turn_ends
from model.engine import Engine, EngineSettings
from model.gpt import GPT
from model.sampling import SamplingSettings
from model.sequence import GenerationRequest
from model.tokenizer import Tokenizer


def complete(model: GPT, tokenizer: Tokenizer, prompt: str, settings: SamplingSettings) -> str:
    """Return the text that the model continues a prompt with; the first of them where settings ask for several."""
    return "".join(stream_text(model, tokenizer, prompt, settings))


def stream_text(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str,
    settings: SamplingSettings,
    engine_settings: EngineSettings | None = None,
) -> Iterator[str]:
    """Yield the text piece by piece, whole characters only; the model's weights are used where and as they are.

    An empty prompt starts a new document. Raises `ValueError` where the prompt does not fit the context.
    """
    if engine_settings is None:
        places = max(settings.num_beams, min(settings.num_candidates, 16))
        engine_settings = EngineSettings(max_batch_size=places, weights="as_is", backend="torch")
    was_training = model.training
    try:
        engine = Engine(model, tokenizer, engine_settings)
        tokens = tokenizer.encode(prompt).tolist() or [tokenizer.begin_of_text]
        engine.add(GenerationRequest("", tokens, settings))
        while engine.has_work:
            for chunk in engine.step():
                if chunk.finish_reason == "error":
                    raise RuntimeError(chunk.error)
                if chunk.index == 0 and chunk.text:
                    yield chunk.text
    finally:
        model.train(was_training)


@dataclass(frozen=True)
class Completion:
    """What a model wrote, and whether it ended by itself."""

    text: str
    has_ended: bool


def complete_all(
    model: GPT, tokenizer: Tokenizer, prompts: Sequence[list[int]], settings: SamplingSettings, at_a_time: int = 4
) -> list[Completion]:
    """Complete every prompt, given as tokens; none goes beyond the context. Few at a time bound the cache."""
    was_training = model.training
    texts = [""] * len(prompts)
    reasons = [""] * len(prompts)
    try:
        places = EngineSettings(
            max_batch_size=at_a_time, max_queue=max(len(prompts), 1), weights="as_is", backend="torch"
        )
        engine = Engine(model, tokenizer, places)
        for number, prompt in enumerate(prompts):
            room = min(settings.max_tokens, engine.context_length - len(prompt))
            engine.add(GenerationRequest(str(number), prompt, replace(settings, max_tokens=room)))
        while engine.has_work:
            for chunk in engine.step():
                if chunk.finish_reason == "error":
                    raise RuntimeError(chunk.error)
                texts[int(chunk.request_id)] += chunk.text
                reasons[int(chunk.request_id)] = chunk.finish_reason or ""
    finally:
        model.train(was_training)
    return [Completion(text, reason == "stop") for text, reason in zip(texts, reasons, strict=True)]


class Correspondent:
    """A model that answers one conversation after another; it does not read again what it has read of them.

    `settings.max_tokens` is a bound: an answer also ends where the context does.
    """

    def __init__(self, model: GPT, tokenizer: Tokenizer, template: ChatTemplate, settings: SamplingSettings) -> None:
        # Short chunks: where torch runs the model, what was read is kept in whole ones.
        self._engine = Engine(model, tokenizer, EngineSettings(max_batch_size=1, prefill_chunk_tokens=64))
        self._template = template
        self._settings = settings

    def stream_answer(self, messages: Sequence[Message]) -> Iterator[str]:
        """Yield the assistant's next turn piece by piece; who stops listening stops the answer.

        Raises `ValueError` where the conversation fills the context.
        """
        engine, template, settings = self._engine, self._template, self._settings
        tokens = encode(engine.tokenizer, render(engine.tokenizer, template, messages, ask=True))[0].tolist()
        room = engine.context_length - len(tokens)
        if room < 1:
            raise ValueError(
                f"The conversation has {len(tokens):,} tokens, and this model's context is {engine.context_length:,}."
            )
        bounded = replace(
            settings,
            max_tokens=min(settings.max_tokens, room),
            stop=(*settings.stop, *template.stops),
            stop_tokens=(*settings.stop_tokens, *turn_ends(engine.tokenizer, template)),
        )
        engine.add(GenerationRequest("", tokens, bounded))
        try:
            while engine.has_work:
                for chunk in engine.step():
                    if chunk.finish_reason == "error":
                        raise RuntimeError(chunk.error)
                    if chunk.text:
                        yield chunk.text
        finally:
            if engine.has_work:  # nobody listens; an ended request must not leave a wish that meets the next one
                engine.cancel("")
                engine.step()
