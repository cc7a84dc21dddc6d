"""Text to token ids and back: in a form of our own under /v1, and in vLLM's, which lm-eval and other tools know.

In vLLM's form a special token's name in the text is that token, as it is to `transformers`; in ours it is plain text.
"""

import asyncio
from typing import Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field

from model.chat import Rendered
from model.chat import encode as encode_rendered
from pipeline.serving.chat import NO_TEMPLATE, Messages, render
from pipeline.serving.completion import SHORT_TEXT_CHARACTERS, Service, check_tokens, encode
from pipeline.serving.errors import ApiError
from pipeline.serving.protocol import Strict, Tokens, check_text
from pipeline.serving.versions import LiveVersion

VLLM_PATHS = ("/tokenize", "/detokenize", "/tokenizer_info")


class TokenizeRequest(Strict):
    """The body of POST /v1/tokenize."""

    model: str | None = Field(None, max_length=256)
    text: str


class TokenizeAnswer(BaseModel):
    model: str
    tokens: list[int]
    count: int


class DetokenizeRequest(Strict):
    """The body of POST /v1/detokenize and of POST /detokenize."""

    model: str | None = Field(None, max_length=256)
    tokens: Tokens


class DetokenizeAnswer(BaseModel):
    model: str
    text: str


class VllmTokenizeRequest(Strict):
    """The body of POST /tokenize: a prompt, or messages."""

    model: str | None = Field(None, max_length=256)
    prompt: str | None = None
    messages: Messages | None = None
    add_generation_prompt: bool = Field(True, description="of messages: what stands before the next answer too")
    add_special_tokens: bool = Field(True, description="changes nothing: no text gets a token before or after it")
    return_token_strs: Literal[False] | None = Field(None, description="not supported: must be null or false")


class VllmTokenizeAnswer(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]


class VllmDetokenizeAnswer(BaseModel):
    prompt: str


class TokenizerInfo(BaseModel):
    """What `tokenizer_config.json` says, as far as clients ask for it."""

    tokenizer_class: str = "PreTrainedTokenizerFast"
    bos_token: str | None
    eos_token: str | None
    model_max_length: int
    chat_template: str | None


def token_routes(service: Service) -> APIRouter:
    """The routes that turn text into token ids and back."""
    router = APIRouter()

    @router.post("/v1/tokenize", response_model=TokenizeAnswer)
    async def tokenize(body: TokenizeRequest, request: Request) -> Response:
        """Text to token ids."""
        model_id, version = service.models.find(body.model)
        service.access.start(request.scope["api_key"], 0)
        in_thread = len(body.text) > SHORT_TEXT_CHARACTERS
        tokens = await encode(version.loaded.tokenizer, body.text, "text", in_thread=in_thread)
        return JSONResponse({"model": model_id, "tokens": tokens, "count": len(tokens)}, headers=version.headers)

    @router.post("/v1/detokenize", response_model=DetokenizeAnswer)
    async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
        """Token ids to text; bytes that are no text become U+FFFD."""
        model_id, version, text = decode(body, request)
        return JSONResponse({"model": model_id, "text": text}, headers=version.headers)

    @router.post("/tokenize", response_model=VllmTokenizeAnswer)
    async def tokenize_as_vllm(body: VllmTokenizeRequest, request: Request) -> Response:
        """Text, or a conversation, to token ids in vLLM's form; special tokens by their names in the text."""
        _, version = service.models.find(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "Send either prompt or messages.", param="prompt")
        service.access.start(request.scope["api_key"], 0)
        if body.messages is not None:
            if version.loaded.chat_template is None:
                raise ApiError(400, NO_TEMPLATE, code="no_chat_template", param="messages")
            tokens = await render(body.messages, version, ask=body.add_generation_prompt)
        else:
            tokens = await encode_with_special_tokens(version, check_text(body.prompt or "", "prompt"))
        answer = {"count": len(tokens), "max_model_len": version.loaded.context_length, "tokens": tokens}
        return JSONResponse(answer, headers=version.headers)

    @router.post("/detokenize", response_model=VllmDetokenizeAnswer)
    async def detokenize_as_vllm(body: DetokenizeRequest, request: Request) -> Response:
        """Token ids to text in vLLM's form."""
        _, version, text = decode(body, request)
        return JSONResponse({"prompt": text}, headers=version.headers)

    @router.get("/tokenizer_info")
    async def tokenizer_info(model: str | None = None) -> TokenizerInfo:
        """The tokenizer's special tokens and chat template, in vLLM's form."""
        loaded = service.models.find(model)[1].loaded
        template, names = loaded.chat_template, loaded.tokenizer.template_names
        return TokenizerInfo(
            bos_token=names.get("bos_token"),
            eos_token=names.get("eos_token"),
            model_max_length=loaded.context_length,
            chat_template=None if template is None else template.text,
        )

    def decode(body: DetokenizeRequest, request: Request) -> tuple[str, LiveVersion, str]:
        model_id, version = service.models.find(body.model)
        service.access.start(request.scope["api_key"], 0)
        check_tokens(body.tokens, version, "tokens")
        return model_id, version, version.loaded.tokenizer.decode(body.tokens)

    return router


async def encode_with_special_tokens(version: LiveVersion, text: str) -> list[int]:
    """Tokenize; long texts in a thread, where they do not hold up the event loop."""

    def tokens() -> list[int]:
        return encode_rendered(version.loaded.tokenizer, Rendered(text))[0].tolist()

    return tokens() if len(text) <= SHORT_TEXT_CHARACTERS else await asyncio.to_thread(tokens)
