"""Chat completions: messages become a prompt through the model's template, the answer becomes a message.

What a chat request may cost is bounded as a completion's is (protocol.py): 2,048 messages, read once; a conversation
that is longer than the context by any count is refused unread; strangers' templates are rendered in a process that is
stopped after two seconds.
"""

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal

from fastapi import Request
from fastapi.responses import Response
from pydantic import BaseModel, Field, PlainValidator

from model.chat import Message, OwnTemplate, encode, turn_ends
from model.chat import render as render_turns
from model.sampling import TokenLogprob
from pipeline.serving.completion import SHORT_TEXT_CHARACTERS, Answer, Service, check, respond, too_long
from pipeline.serving.errors import ApiError
from pipeline.serving.protocol import (
    TOKEN_LIMIT,
    CompletionRequest,
    Number,
    StreamOptions,
    Strict,
    TokenId,
    Usage,
    check_text,
)
from pipeline.serving.versions import LiveVersion

MAX_MESSAGES = 2048
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}  # theirs -> ours
NO_TEMPLATE = (
    "This model has no chat template, for it was not trained on conversations. Use /v1/completions; or train it on"
    " conversations (source.kind=conversations) and register what comes of it."
)
TOOLS = "Tools are not supported: this model writes text alone; leave {} out."
TEXT_ALONE = "{} not supported: this model reads and writes text alone."


# What is asked ----------------------------------------------------------------------------------------------------


def check_messages(given: Any) -> list[Message]:
    """Return messages with a role of ours and a text; raises `ApiError` for the first that is anything else."""
    if type(given) is not list or not given:
        raise ApiError(400, "messages must be an array of at least one message.", param="messages")
    if len(given) > MAX_MESSAGES:
        raise ApiError(400, f"A request may hold at most {MAX_MESSAGES:,} messages.", param="messages")
    messages: list[Message] = []
    for number, message in enumerate(given):
        where = f"messages[{number}]"
        if type(message) is not dict:
            raise ApiError(400, f"{where} must be an object with role and content.", param="messages")
        role = message.get("role")
        if role in ("tool", "function") or message.get("tool_calls") or message.get("function_call"):
            raise ApiError(400, TOOLS.format(where), param="messages")
        if type(role) is not str or role not in ROLES:
            raise ApiError(
                400, f"{where} has the role {str(role)[:50]!r}; roles are {', '.join(ROLES)}.", param="messages"
            )
        messages.append({"role": ROLES[role], "content": read_content(message.get("content"), where)})
        # What clients send back of an answer that they got, all of it null here.
        known = ("role", "content", "name", "refusal")
        unknown = next((name for name in message if name not in known and message[name] not in (None, [])), None)
        if unknown is not None:
            said = TEXT_ALONE.format("audio is") if unknown == "audio" else f"there is no field {str(unknown)[:50]!r}."
            raise ApiError(400, f"{where}: {said}", param="messages")
    return messages


def read_content(content: Any, where: str) -> str:
    """Return the text of a message's content: a string, or parts of text."""
    if type(content) is str:
        return check_text(content, where)
    if type(content) is not list:
        raise ApiError(400, f"{where} needs a content: a string, or an array of parts of type text.", param="messages")
    for part in content:
        kind = part.get("type") if type(part) is dict else None
        if kind != "text":
            named = {"image_url": "images are", "input_audio": "audio is", "file": "files are"}
            said = TEXT_ALONE.format(named.get(str(kind), f"parts of type {str(kind)[:50]!r} are"))
            raise ApiError(400, f"{where}: {said}", param="messages")
        if type(part.get("text")) is not str:
            raise ApiError(400, f"{where} has a part of type text without a text.", param="messages")
    return check_text("".join(part["text"] for part in content), where)


class TextPart(BaseModel):
    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]


Messages = Annotated[list[Any], PlainValidator(check_messages, json_schema_input_type=list[ChatMessage])]


class ChatRequest(Strict):
    """The body of POST /v1/chat/completions; null means the default."""

    model: str | None = Field(None, description="an id of /v1/models; the first one if absent", max_length=256)
    messages: Messages = Field(description="turns by role; a system turn can be the first")
    frequency_penalty: Number | None = Field(None, ge=-2, le=2)
    logit_bias: dict[Annotated[str, Field(max_length=10)], Annotated[Number, Field(ge=-100, le=100)]] | None = Field(
        None, description="token id -> added to its logit", max_length=1024
    )
    logprobs: bool | None = Field(None, description="return the log-probability of each token")
    max_completion_tokens: int | None = Field(None, ge=1, description="at most; null: what the context has room for")
    max_tokens: int | None = Field(None, ge=1, description="the older name of max_completion_tokens")
    n: int | None = Field(None, ge=1, le=16, description="answers")
    presence_penalty: Number | None = Field(None, ge=-2, le=2)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | Annotated[list[str], Field(max_length=16)] | None = Field(
        None, description="strings that end an answer"
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Number | None = Field(None, ge=0, le=10)
    top_logprobs: int | None = Field(None, ge=0, le=20, description="with logprobs: of this many likeliest tokens")
    top_p: Number | None = Field(None, gt=0, le=1)
    # Refused in a sentence, unless empty.
    audio: Any = Field(None, description="not supported: must be null")
    function_call: Any = Field(None, description="not supported: must be null")
    functions: Any = Field(None, description="not supported: must be null or empty")
    modalities: Any = Field(None, description='text alone is supported: null or ["text"]')
    reasoning_effort: Any = Field(None, description="not supported: must be null")
    response_format: Any = Field(None, description='text alone is supported: null or {"type": "text"}')
    tool_choice: Any = Field(None, description='not supported: must be null, "none" or "auto"')
    tools: Any = Field(None, description="not supported: must be null or empty")
    web_search_options: Any = Field(None, description="not supported: must be null")
    # Without a meaning here.
    metadata: Any = Field(None, description="ignored")
    parallel_tool_calls: Any = Field(None, description="ignored")
    prompt_cache_key: Any = Field(None, description="ignored")
    safety_identifier: Any = Field(None, description="ignored")
    service_tier: Any = Field(None, description="ignored")
    store: Any = Field(None, description="ignored")
    user: str | None = Field(None, max_length=256, description="ignored")
    # Ours: what the engine can do beyond OpenAI's API.
    top_k: int | None = Field(None, ge=0, lt=TOKEN_LIMIT, description="0: all")
    min_p: Number | None = Field(None, ge=0, le=1)
    typical_p: Number | None = Field(None, gt=0, le=1)
    repetition_penalty: Number | None = Field(None, gt=0, le=10)
    stop_token_ids: Annotated[list[TokenId], Field(max_length=256)] | None = None

    def check(self) -> None:
        """Refuse what this model cannot do, and what each field allows alone but not together."""
        for name in ("tools", "functions", "function_call"):
            if getattr(self, name):
                raise ApiError(400, TOOLS.format(name), param=name)
        if self.tool_choice not in (None, "none", "auto"):
            raise ApiError(400, TOOLS.format("tool_choice"), param="tool_choice")
        if self.audio or self.modalities not in (None, [], ["text"]):
            name = "audio" if self.audio else "modalities"
            raise ApiError(400, TEXT_ALONE.format("audio is" if self.audio else "modalities are"), param=name)
        if self.response_format not in (None, {"type": "text"}):
            message = "response_format can only be text: this model cannot be held to JSON; leave it out."
            raise ApiError(400, message, param="response_format")
        for name in ("reasoning_effort", "web_search_options"):
            if getattr(self, name) is not None:
                raise ApiError(400, f"{name} is not supported; leave it out.", param=name)
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs=true.", param="top_logprobs")

    def as_completion(
        self, prompt: list[int], room: int, stops: tuple[str, ...], ends: Iterable[int] = ()
    ) -> CompletionRequest:
        """The completion that answers: `prompt` holds the conversation's tokens, `room` what the context has left.

        `stops` and `ends` are the texts and the tokens that end a turn.
        """
        same = (
            *("model", "frequency_penalty", "logit_bias", "n", "presence_penalty", "seed", "stream", "stream_options"),
            *("temperature", "top_p", "user", "top_k", "min_p", "typical_p", "repetition_penalty"),
        )
        asked = self.max_completion_tokens or self.max_tokens or room
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return CompletionRequest.model_construct(
            **{name: getattr(self, name) for name in same},
            prompt=prompt,
            max_tokens=min(asked, room),  # an upper bound, as OpenAI calls it
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            stop=[*stop, *stops],
            stop_token_ids=[*(self.stop_token_ids or ()), *ends],
        )


# What is answered -------------------------------------------------------------------------------------------------


class AnswerMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Delta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None


class TopLogprob(BaseModel):
    token: str
    logprob: float | None
    bytes: list[int]


class ContentLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[ContentLogprob]
    refusal: None = None


class ChatChoice(BaseModel):
    """One answer; streamed, `delta` stands in the place of `message`."""

    index: int
    message: AnswerMessage | None = None
    delta: Delta | None = None
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class ChatCompletion(BaseModel):
    """The answer of POST /v1/chat/completions; streamed, each event is one of these, without usage until the last."""

    id: str
    object: Literal["chat.completion", "chat.completion.chunk"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage | None = None


async def chat(service: Service, body: ChatRequest, request: Request) -> Response:
    """Check, render, admit, generate, answer."""
    began = time.monotonic()
    body.check()
    _, version = service.models.find(body.model)
    if version.loaded.chat_template is None:
        raise ApiError(400, NO_TEMPLATE, code="no_chat_template", param="model")
    prompt = await render(body.messages, version)
    room = version.loaded.context_length - len(prompt)
    if room < 1:
        raise conversation_too_long(str(len(prompt)), version.loaded.context_length)
    template, ends = version.loaded.chat_template, frozenset[int]()
    if not isinstance(template, OwnTemplate):  # whose answers end with the end of text
        ends = await asyncio.to_thread(turn_ends, version.loaded.tokenizer, template)
    completion = body.as_completion(prompt, room, template.stops, ends)
    return await respond(service, await check(service, completion, began, request), request, ChatAnswer)


async def render(messages: list[Message], version: LiveVersion, ask: bool = True) -> list[int]:
    """Return a conversation's tokens; with `ask` up to where the assistant answers."""
    loaded = version.loaded
    template = loaded.chat_template
    assert template is not None
    characters = sum(len(message["content"]) for message in messages)
    if characters > loaded.context_length * int(loaded.tokenizer.byte_lengths.max()):
        raise conversation_too_long(f"over {loaded.context_length}", loaded.context_length)

    def tokens() -> list[int]:
        return encode(loaded.tokenizer, render_turns(loaded.tokenizer, template, messages, ask))[0].tolist()

    is_quick = isinstance(template, OwnTemplate) and characters + 20 * len(messages) <= SHORT_TEXT_CHARACTERS
    try:
        return tokens() if is_quick else await asyncio.to_thread(tokens)
    except ValueError as error:
        raise ApiError(400, str(error), param="messages") from None


def conversation_too_long(tokens: str, context_length: int) -> ApiError:
    error = too_long(tokens, context_length)
    message = f"This model's context is {context_length} tokens, one of them for the answer, and the conversation has"
    return ApiError(400, f"{message} {tokens}; leave out its first turns.", code=error.code, param="messages")


class ChatAnswer(Answer):
    """An answer in chat's shape."""

    id_prefix = "chatcmpl"
    kind = "chat.completion"
    stream_kind = "chat.completion.chunk"

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._begun: set[int] = set()  # the choices whose role has been told

    def _choice(self, found: dict[str, Any]) -> dict[str, Any]:
        message = {"role": "assistant", "content": found["text"], "refusal": None}
        return _shaped(found, message=message, finish_reason=found["finish_reason"])

    def _steps(self, pieces: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
        """What was written, and then, as OpenAI does, in an event of its own how it ended."""
        written, ended = [], []
        for piece in pieces:
            index = piece["index"]
            delta = {"content": piece["text"]}
            if index not in self._begun:
                self._begun.add(index)
                delta = {"role": "assistant", **delta}
            if piece["text"] or piece["logprobs"] or "role" in delta:
                written.append(_shaped(piece, delta=delta, finish_reason=None))
            if piece["finish_reason"]:
                ended.append(_shaped(piece | {"logprobs": None}, delta={}, finish_reason=piece["finish_reason"]))
        return [choices for choices in (written, ended) if choices]

    def _logprobs(self, index: int, found: list[TokenLogprob], num_top: int) -> dict[str, list[Any]]:
        spell: Callable[[int], bytes] = lambda token: self._asked.tokenizer.decode_bytes([token])  # noqa: E731

        def describe(token: int, logprob: float | None) -> dict[str, Any]:
            return {"token": self._name(token), "logprob": logprob, "bytes": list(spell(token))}

        return {
            "content": [
                describe(each.token, each.logprob)
                | {"top_logprobs": [describe(token, logprob) for token, logprob in each.top[:num_top]]}
                for each in found
            ]
        }


def _shaped(found: Mapping[str, Any], **rest: Any) -> dict[str, Any]:
    logprobs = found["logprobs"]
    if logprobs is not None:
        logprobs = logprobs | {"refusal": None}
    return {"index": found["index"], **rest, "logprobs": logprobs}
