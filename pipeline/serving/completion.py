"""One completion, in the order it happens: check the request, admit it, generate, answer whole or as a stream."""

import asyncio
import codecs
import json
import time
import uuid
from collections.abc import AsyncIterator, Coroutine, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from model.sampling import TokenLogprob
from model.sequence import Chunk, GenerationRequest
from model.tokenizer import Tokenizer
from pipeline.serving.access import Access, ApiKey
from pipeline.serving.errors import ApiError, as_api_error
from pipeline.serving.metrics import ServingMetrics
from pipeline.serving.protocol import CompletionRequest
from pipeline.serving.versions import LiveVersion, ServedModels

MAX_PROMPTS = 128
DEFAULT_MAX_TOKENS = 16
# Events of one stream are at least this far apart per stream in flight: a write costs the server about 1 ms
# whatever it carries, so beside 31 others a stream gets its tokens in lots, about 8 times a second.
WRITE_SPACING_SECONDS = 0.004


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
        generated = sum(each.settings.max_tokens * each.settings.num_candidates for each in self.requests)
        return sum(map(len, self.prompts)) + generated


async def complete(service: Service, body: CompletionRequest, request: Request) -> Response:
    """Check, admit, generate, answer."""
    began = time.monotonic()
    key: ApiKey | None = request.scope["api_key"]
    asked = await check(service, body, began)
    service.access.start(key, asked.reserved_tokens)
    try:
        answer = Answer(service, asked, key)
    except BaseException:
        service.access.settle(key, asked.reserved_tokens, 0)
        raise
    try:
        if not body.stream:
            return JSONResponse(await unless_left(request, answer.whole()), headers=asked.version.headers)
        # The first tokens are awaited here, so that what goes wrong before them still has a status of its own.
        first = await answer.read()
        headers = asked.version.headers | {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return StreamingResponse(answer.events(first), media_type="text/event-stream", headers=headers)
    except ValueError as error:  # what only the engine could know
        answer.close(400)
        raise ApiError(400, str(error)) from None
    except BaseException:
        answer.close(499)
        raise


async def unless_left(request: Request, work: Coroutine[Any, Any, dict[str, Any]]) -> dict[str, Any]:
    """Do the work, or drop it when the client goes away; nobody reads the error that this raises then."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ApiError(499, "The client has gone away.")
    finally:
        working.cancel()
        leaving.cancel()


async def check(service: Service, body: CompletionRequest, began: float) -> CheckedRequest:
    """Turn a body into engine requests; raises `ApiError` for what cannot be answered."""
    body.check()
    model_id, version = service.models.find(body.model)
    prompts = await read_prompts(body, version)
    if len(prompts) > MAX_PROMPTS:
        raise ApiError(400, f"A request may hold at most {MAX_PROMPTS} prompts.", param="prompt")
    request_id = uuid.uuid4().hex
    requests = []
    for number, prompt in enumerate(prompts):
        max_tokens = choose_max_tokens(body, len(prompt), version.loaded.context_length)
        tokenizer = version.loaded.tokenizer
        settings = body.sampling(max_tokens, tokenizer.vocab_size, tokenizer.end_of_text)
        deadline = began + service.deadline_seconds
        requests.append(GenerationRequest(f"{request_id}-{number}", prompt, settings, deadline))
    return CheckedRequest(body, model_id, version, prompts, requests, request_id, began)


async def read_prompts(body: CompletionRequest, version: LiveVersion) -> list[list[int]]:
    """The token ids of every prompt, each checked and no longer than the context."""
    given: Any = body.prompt
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        given = [given]
    if not given:
        raise ApiError(400, "prompt is an empty array.", param="prompt")
    loaded = version.loaded
    prompts = []
    for prompt in given:
        if isinstance(prompt, str):
            tokens = await encode_prompt(body, version, prompt)
        else:
            check_tokens(prompt, version, "prompt")
            tokens = list(prompt)
        # An empty prompt asks for the start of a document, which is what follows the end of another.
        prompts.append(truncate(body, tokens or [loaded.tokenizer.end_of_text], loaded.context_length))
    return prompts


async def encode_prompt(body: CompletionRequest, version: LiveVersion, text: str) -> list[int]:
    """Tokenize a prompt; one that is too long by any count is refused, or cut, before any work is done on it."""
    loaded = version.loaded
    longest = loaded.context_length * int(loaded.tokenizer.byte_lengths.max())
    if len(text) > longest:
        if body.truncate_prompt_tokens is None:
            raise too_long(f"over {loaded.context_length}", loaded.context_length)
        text = text[-longest:]
    return await encode(loaded.tokenizer, text, "prompt")


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
    wrong = next((token for token in tokens if token >= vocab_size), None)
    if wrong is not None:
        raise ApiError(400, f"{param} holds token {wrong}; token ids go from 0 to {vocab_size - 1}.", param=param)


async def encode(tokenizer: Tokenizer, text: str, param: str) -> list[int]:
    """Tokenize, long texts off the event loop."""
    try:
        if len(text) < 10_000:
            return tokenizer.encode(text).tolist()
        return await asyncio.to_thread(lambda: tokenizer.encode(text).tolist())
    except ValueError as error:
        raise ApiError(400, str(error).replace("The text", param, 1), param=param) from None


class Answer:
    """One HTTP answer in the making: its ticket in the engine, and what is counted on the way."""

    def __init__(self, service: Service, asked: CheckedRequest, key: ApiKey | None) -> None:
        self._service = service
        self._asked = asked
        self._key = key
        self._frame = {
            "id": f"cmpl-{asked.request_id}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": asked.model_id,
            "system_fingerprint": asked.version.fingerprint,
        }
        self._prompt_numbers = {each.request_id: number for number, each in enumerate(asked.requests)}
        self._ticket = asked.version.backend.submit(asked.requests)
        self._offsets: dict[int, TextOffsets] = {}  # by choice
        self._generated = 0
        self._first_token_at = 0.0
        self._closed = False

    async def whole(self) -> dict[str, Any]:
        """Wait for all of it, and return the body."""
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
        choices = [
            {"index": index, "text": "".join(text), "logprobs": logprobs.get(index), "finish_reason": reasons[index]}
            for index, text in sorted(texts.items())
        ]
        self.close(200)
        return self._frame | {"choices": choices, "usage": self.usage}

    async def events(self, pieces: list[dict[str, Any]]) -> AsyncIterator[str]:
        """Server-sent events from the first pieces on, each with all tokens that came since the one before."""
        status = 499  # what it is if the client goes away meanwhile
        try:
            while pieces:
                yield _event(self._frame | {"choices": pieces})
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
                offsets = self._offsets.setdefault(index, TextOffsets(self._asked.tokenizer))
                found = format_logprobs(chunk.logprobs, body.logprobs, offsets)
                if piece["logprobs"] is None:
                    piece["logprobs"] = found
                else:
                    for name, values in found.items():
                        piece["logprobs"][name] += values
        piece["finish_reason"] = "length" if scoring and chunk.finish_reason else chunk.finish_reason

    @property
    def usage(self) -> dict[str, int]:
        prompt_tokens = sum(map(len, self._asked.prompts))
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": self._generated,
            "total_tokens": prompt_tokens + self._generated,
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


def format_logprobs(found: list[TokenLogprob], num_top: int, offsets: TextOffsets) -> dict[str, list[Any]]:
    """OpenAI's four parallel lists for some tokens in a row."""
    name = partial(name_token, offsets.tokenizer)
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
    content = tokenizer.decode_bytes([token])
    if token == tokenizer.end_of_text:
        return "<|endoftext|>"
    try:
        return content.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


def _event(body: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"
