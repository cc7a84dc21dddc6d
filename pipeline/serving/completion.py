"""One completion, in the order it happens: check the request, admit it, generate, answer whole or as a stream."""

import asyncio
import codecs
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Protocol, TypeVar

from fastapi import Request
from fastapi.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from model.sampling import TokenLogprob
from model.sequence import Chunk, GenerationRequest
from model.tokenizer import Tokenizer
from pipeline.serving.access import Access, ApiKey
from pipeline.serving.backend import most_tokens
from pipeline.serving.errors import ApiError, as_api_error
from pipeline.serving.metrics import ServingMetrics
from pipeline.serving.protocol import CompletionRequest
from pipeline.serving.versions import LiveVersion, ServedModels

DEFAULT_MAX_TOKENS = 16
SHORT_TEXT_CHARACTERS = 10_000  # tokenized on the event loop in a few milliseconds
# Events of one stream are at least this far apart per stream in flight: a write costs the server about 1 ms
# whatever it carries, so beside 31 others a stream gets its tokens in lots, about 8 times a second.
WRITE_SPACING_SECONDS = 0.004


Result = TypeVar("Result")


class Service(Protocol):
    """What the API needs of the replica it runs in."""

    models: ServedModels
    access: Access
    metrics: ServingMetrics
    deadline_seconds: float
    max_body_bytes: int

    async def metrics_page(self) -> str: ...


@dataclass
class CheckedRequest:
    """A request whose every part has been checked."""

    body: CompletionRequest
    model_id: str
    version: LiveVersion
    prompts: list[list[int]]
    requests: list[GenerationRequest]
    request_id: str
    began: float

    @property
    def tokenizer(self) -> Tokenizer:
        return self.version.loaded.tokenizer

    @property
    def reserved_tokens(self) -> int:
        """What it may cost its key at most."""
        return sum(map(len, self.prompts)) + sum(map(most_tokens, self.requests))


async def complete(service: Service, body: CompletionRequest, request: Request) -> Response:
    """Check, admit, generate, answer."""
    return await respond(service, await check(service, body, time.monotonic(), request), request, Answer)


async def respond(service: Service, asked: CheckedRequest, request: Request, kind: type["Answer"]) -> Response:
    """Admit a request that has been checked, generate, and answer whole or as a stream."""
    key: ApiKey | None = request.scope["api_key"]
    service.access.start(key, asked.reserved_tokens)
    try:
        answer = kind(service, asked, key)
    except BaseException:
        service.access.settle(key, asked.reserved_tokens, 0)
        raise
    try:
        if not asked.body.stream:
            whole = await unless_left(request, answer.whole())
            return Response(whole, media_type="application/json", headers=asked.version.headers)
        # The first tokens are awaited here, so that what goes wrong before them still has a status of its own.
        first = await unless_left(request, answer.read())
        headers = asked.version.headers | {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return AnswerStream(answer, first, headers)
    except Exception as error:
        failure = as_api_error(error)  # a ValueError is what only the backend could know
        answer.close(failure.status)
        raise failure from None
    except BaseException:  # the server ends the request, because its client has gone away
        answer.close(499)
        raise


class AnswerStream(StreamingResponse):
    """A stream of events whose answer is closed even where the client left before the first event was asked for."""

    def __init__(self, answer: "Answer", first: list[dict[str, Any]], headers: Mapping[str, str]) -> None:
        super().__init__(answer.events(first), media_type="text/event-stream", headers=headers)
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.close(499)  # nothing, where the events came to their end


async def unless_left(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """Do the work and return its result; raises `ApiError` 499, and cancels it, if the client goes away before."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ApiError(499, "The client has gone away.")
    finally:
        working.cancel()
        leaving.cancel()


async def check(service: Service, body: CompletionRequest, began: float, request: Request) -> CheckedRequest:
    """Turn a body into engine requests; raises `ApiError` for what cannot be answered."""
    body.check()
    model_id, version = service.models.find(body.model)
    tokenizer, context_length = version.loaded.tokenizer, version.loaded.context_length
    settings_for = cache(partial(body.sampling, vocab_size=tokenizer.vocab_size, ends=tokenizer.stop_tokens))
    settings_for(1)  # what is wrong with it is known before a prompt is tokenized
    request_id = uuid.uuid4().hex
    deadline = began + service.deadline_seconds
    key: ApiKey | None = request.scope["api_key"]
    owner = key.name if key else ""
    prompts: list[list[int]] = []
    requests: list[GenerationRequest] = []
    async for prompt in read_prompts(body, version):
        settings = settings_for(choose_max_tokens(body, len(prompt), context_length))
        requests.append(GenerationRequest(f"{request_id}-{len(prompts)}", prompt, settings, deadline, owner))
        prompts.append(prompt)
    return CheckedRequest(body, model_id, version, prompts, requests, request_id, began)


async def read_prompts(body: CompletionRequest, version: LiveVersion) -> AsyncIterator[list[int]]:
    """Yield the token ids of one prompt after the other; whoever finds one too long spares the work on the rest."""
    given: Any = body.prompt
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        given = [given]
    if not given:
        raise ApiError(400, "prompt is an empty array.", param="prompt")
    loaded = version.loaded
    total_characters = sum(len(prompt) for prompt in given if isinstance(prompt, str))
    for prompt in given:
        if isinstance(prompt, str):
            text = shorten(body, version, prompt)
            tokens = await encode(loaded.tokenizer, text, "prompt", in_thread=total_characters > SHORT_TEXT_CHARACTERS)
        else:
            check_tokens(prompt, version, "prompt")
            tokens = prompt
        # An empty prompt asks for the start of a document, which is what follows the end of another.
        yield truncate(body, tokens or [loaded.tokenizer.begin_of_text], loaded.context_length)


def shorten(body: CompletionRequest, version: LiveVersion, text: str) -> str:
    """Return the part of a prompt that may count: one that is too long by any count is cut, or refused, unread."""
    loaded = version.loaded
    longest = loaded.context_length * int(loaded.tokenizer.byte_lengths.max())
    if len(text) <= longest:
        return text
    if body.truncate_prompt_tokens is None:
        raise too_long(f"over {loaded.context_length}", loaded.context_length)
    return text[-longest:]


def truncate(body: CompletionRequest, tokens: list[int], context_length: int) -> list[int]:
    keep = body.truncate_prompt_tokens
    if keep is None:
        return tokens
    if keep == 0:
        raise ApiError(400, "truncate_prompt_tokens must be -1 or at least 1.", param="truncate_prompt_tokens")
    room = context_length - max(1, DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens)
    return tokens[-(max(1, room) if keep == -1 else keep) :]


def choose_max_tokens(body: CompletionRequest, prompt_tokens: int, context_length: int) -> int:
    """How many tokens to generate: as asked, or up to 16; raises `ApiError` where the context has no room for them."""
    room = context_length - prompt_tokens
    if room < 1:
        raise too_long(str(prompt_tokens), context_length)
    if body.max_tokens is None:
        return min(DEFAULT_MAX_TOKENS, room)
    if body.max_tokens > room:
        raise ApiError(
            400,
            f"This model's context is {context_length} tokens: after a prompt of {prompt_tokens} there is room for"
            f" {room}, not for max_tokens={body.max_tokens}.",
            code="context_length_exceeded",
            param="max_tokens",
        )
    return max(1, body.max_tokens)


def too_long(tokens: str, context_length: int) -> ApiError:
    return ApiError(
        400,
        f"This model's context is {context_length} tokens, one of them for the answer, and the prompt has {tokens};"
        " shorten it, or set truncate_prompt_tokens.",
        code="context_length_exceeded",
        param="prompt",
    )


def check_tokens(tokens: list[int], version: LiveVersion, param: str) -> None:
    vocab_size = version.loaded.tokenizer.vocab_size
    if tokens and max(tokens) >= vocab_size:
        message = f"{param} holds token {max(tokens)}; token ids go from 0 to {vocab_size - 1}."
        raise ApiError(400, message, param=param)


async def encode(tokenizer: Tokenizer, text: str, param: str, *, in_thread: bool) -> list[int]:
    """Tokenize; long texts want a thread, where they do not hold up the event loop."""
    try:
        if not in_thread:
            return tokenizer.encode(text).tolist()
        return await asyncio.to_thread(lambda: tokenizer.encode(text).tolist())
    except ValueError as error:
        raise ApiError(400, str(error).replace("The text", param, 1), param=param) from None


class Answer:
    """One HTTP answer in the making: its ticket in the engine, and what is counted on the way."""

    id_prefix = "cmpl"
    kind = stream_kind = "text_completion"

    def __init__(self, service: Service, asked: CheckedRequest, key: ApiKey | None) -> None:
        self._service = service
        self._asked = asked
        self._key = key
        self._frame = {
            "id": f"{self.id_prefix}-{asked.request_id}",
            "object": self.stream_kind if asked.body.stream else self.kind,
            "created": int(time.time()),
            "model": asked.model_id,
            "system_fingerprint": asked.version.fingerprint,
        }
        self._prompt_numbers = {each.request_id: number for number, each in enumerate(asked.requests)}
        self._ticket = asked.version.backend.submit(asked.requests)
        self._offsets: dict[int, TextOffsets] = {}  # by choice
        self._name = cache(partial(name_token, asked.tokenizer))
        self._generated = 0
        self._reused: dict[str, int] = {}  # by request: tokens of its prompt that need not be read again
        self._first_token_at = 0.0
        self._closed = False

    async def whole(self) -> bytes:
        """Wait for all of it, and return the body as JSON."""
        texts: dict[int, list[str]] = {}
        logprobs: dict[int, dict[str, list[Any]]] = {}
        reasons: dict[int, str] = {}
        while pieces := await self.read():
            for piece in pieces:
                index = piece["index"]
                texts.setdefault(index, []).append(piece["text"])
                for name, values in (piece["logprobs"] or {}).items():
                    logprobs.setdefault(index, {}).setdefault(name, []).extend(values)
                reasons[index] = piece["finish_reason"]
        choices = []
        for index, text in sorted(texts.items()):
            found = {"index": index, "text": "".join(text), "logprobs": logprobs.get(index)}
            choices.append(_json(self._choice(found | {"finish_reason": reasons[index]})))
            await asyncio.sleep(0)  # twenty log-probabilities for each of a thousand tokens take a while to write
        self.close(200)
        rest = _json(self._frame | {"usage": self.usage})
        return f'{rest[:-1]},"choices":[{",".join(choices)}]}}'.encode()

    async def events(self, pieces: list[dict[str, Any]]) -> AsyncIterator[str]:
        """Server-sent events from the first pieces on, each with all tokens that came since the one before."""
        status = 499  # what it is if the client goes away meanwhile
        try:
            while pieces:
                for choices in self._steps(pieces):
                    yield _event(self._frame | {"choices": choices})
                await self._ticket.rest(WRITE_SPACING_SECONDS * (len(self._asked.version.backend.tickets) - 1))
                pieces = await self.read()
            options = self._asked.body.stream_options
            if options is not None and options.include_usage:
                yield _event(self._frame | {"choices": [], "usage": self.usage})
            yield "data: [DONE]\n\n"
            status = 200
        except Exception as error:  # the status line is long gone: the stream itself has to say it
            failure = as_api_error(error)
            status = failure.status
            yield _event(failure.body)
        finally:
            self.close(status)

    def _choice(self, found: dict[str, Any]) -> dict[str, Any]:
        """Give a whole choice its shape; `found` is that of completions."""
        return found

    def _steps(self, pieces: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
        """Give what came since the last event its shape: the choices of one event, or of several."""
        return [pieces]

    async def read(self) -> list[dict[str, Any]]:
        """The next choices with what came since the last look, one per choice; empty at the end."""
        while chunks := await self._ticket.read():
            gathered: dict[int, dict[str, Any]] = {}
            for chunk in chunks:
                self._take(chunk, gathered)
            if gathered:
                return list(gathered.values())
        return []

    def _take(self, chunk: Chunk, gathered: dict[int, dict[str, Any]]) -> None:
        if chunk.finish_reason == "deadline":
            raise ApiError(504, "The answer was not finished by its deadline.", code="deadline_exceeded")
        if chunk.finish_reason in ("error", "cancelled"):
            raise ApiError(500, f"The engine gave this request up: {chunk.error or chunk.finish_reason}.")
        self._reused[chunk.request_id] = max(chunk.reused_tokens, self._reused.get(chunk.request_id, 0))
        body = self._asked.body
        scoring = body.max_tokens == 0  # only the prompt was asked for; the engine had to add one token
        if not chunk.is_prompt and chunk.tokens and not scoring:
            self._generated += len(chunk.tokens)
            if not self._first_token_at:
                self._first_token_at = time.monotonic()
                self._service.metrics.first_token.observe(self._first_token_at - self._asked.began)
        index = self._prompt_numbers[chunk.request_id] * body.num_choices + chunk.index
        piece = gathered.setdefault(index, {"index": index, "text": "", "logprobs": None, "finish_reason": None})
        if chunk.is_prompt or not scoring:
            piece["text"] += chunk.text
            if body.logprobs is not None and chunk.logprobs is not None:
                found = self._logprobs(index, chunk.logprobs, body.logprobs)
                if piece["logprobs"] is None:
                    piece["logprobs"] = found
                else:
                    for name, values in found.items():
                        piece["logprobs"][name] += values
        piece["finish_reason"] = "length" if scoring and chunk.finish_reason else chunk.finish_reason

    def _logprobs(self, index: int, found: list[TokenLogprob], num_top: int) -> dict[str, list[Any]]:
        return format_logprobs(found, num_top, self._name, self._offsets_of(index))

    def _offsets_of(self, index: int) -> "TextOffsets":
        """Return the counter of one choice's characters; it starts after the prompt, which OpenAI counts too."""
        if index not in self._offsets:
            found = self._offsets[index] = TextOffsets(self._asked.tokenizer)
            if not self._asked.body.echo:
                for token in self._asked.prompts[index // self._asked.body.num_choices]:
                    found.advance(token)
        return self._offsets[index]

    @property
    def usage(self) -> dict[str, Any]:
        prompt_tokens, cached_tokens = sum(map(len, self._asked.prompts)), sum(self._reused.values())
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": self._generated,
            "total_tokens": prompt_tokens + self._generated,
            "prompt_tokens_details": {"cached_tokens": cached_tokens},
        }

    def close(self, status: int) -> None:
        """Leave the engine, and count what happened."""
        if self._closed:
            return
        self._closed = True
        self._asked.version.backend.leave(self._ticket)
        used = self.usage
        self._service.access.settle(self._key, self._asked.reserved_tokens, used["total_tokens"])
        metrics, version = self._service.metrics, self._asked.version.record.version
        now = time.monotonic()
        metrics.prompt_tokens.labels(version).inc(used["prompt_tokens"])
        metrics.generated_tokens.labels(version).inc(self._generated)
        metrics.duration.observe(now - self._asked.began)
        if self._generated > 1:
            metrics.per_token.observe((now - self._first_token_at) / (self._generated - 1))
        if status == 499:
            metrics.cancelled.labels().inc()


class TextOffsets:
    """Counts the characters before each token of a text; a token may hold half a character."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._characters = 0

    def advance(self, token: int) -> int:
        start = self._characters
        self._characters += len(self._decoder.decode(self.tokenizer.decode_bytes([token])))
        return start


def format_logprobs(
    found: list[TokenLogprob], num_top: int, name: Callable[[int], str], offsets: TextOffsets
) -> dict[str, list[Any]]:
    """OpenAI's four parallel lists for some tokens in a row."""
    return {
        "tokens": [name(each.token) for each in found],
        "token_logprobs": [each.logprob for each in found],
        "top_logprobs": [
            None if each.logprob is None else {name(token): logprob for token, logprob in each.top[:num_top]}
            for each in found
        ],
        "text_offset": [offsets.advance(each.token) for each in found],
    }


def name_token(tokenizer: Tokenizer, token: int) -> str:
    """A token as text; as OpenAI does, bytes that are not whole characters are spelled out."""
    if token in tokenizer.special_names:
        return tokenizer.special_names[token]
    content = tokenizer.decode_bytes([token])
    try:
        return content.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


def _event(body: Mapping[str, Any]) -> str:
    """One server-sent event. Some clients end lines at every character that Python does, and JSON leaves three of them
    as they are."""
    text = _json(body)
    for character in "\x85\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return f"data: {text}\n\n"


def _json(body: Mapping[str, Any]) -> str:
    return json.dumps(body, ensure_ascii=False, separators=(",", ":"))
