"""The HTTP API over the served models: OpenAI's completions, the registry's facts, metrics, and the page.

    app = build_api(service)     # an ASGI application; Ray Serve hosts it, and so does any other server

Who may ask is decided first, then what is asked is checked; only a request that can be answered meets the backend.
"""

from pathlib import Path
from typing import Any

import fastapi_swagger
from fastapi import FastAPI, Request
from fastapi import HTTPException as BodyTooLarge
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeline.serving.completion import Service, check_tokens, complete, encode
from pipeline.serving.errors import ApiError, EngineDied, Overloaded, as_api_error, error_body
from pipeline.serving.protocol import (
    Completion,
    CompletionRequest,
    DetokenizeAnswer,
    DetokenizeRequest,
    ErrorAnswer,
    ModelAnswer,
    ModelList,
    TokenizeAnswer,
    TokenizeRequest,
    describe_validation,
)
from pipeline.serving.versions import ServedModels

PAGE = Path(__file__).with_name("page.html")


def build_api(service: Service) -> FastAPI:
    """The application; its OpenAPI description is at /docs."""
    errors: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorAnswer}, "5XX": {"model": ErrorAnswer}}
    app = FastAPI(
        title="GPT",
        description="OpenAI's completions API over a model of the MLflow registry.",
        version="1",
        responses=errors,
        docs_url=None,
        redoc_url=None,
        swagger_ui_oauth2_redirect_url=None,
    )
    # FastAPI's own pages load Swagger UI from a CDN; this one brings it along.
    fastapi_swagger.patch_fastapi(app, redirect_from_root_to_docs=False)
    app.add_middleware(Gate, service=service)
    # What only Exception's handler answers is raised again after it, and costs the client its connection.
    for kind in (ApiError, Overloaded, EngineDied, ValueError, Exception):
        app.add_exception_handler(kind, answer_error)
    app.add_exception_handler(RequestValidationError, answer_validation_error)
    app.add_exception_handler(HTTPException, answer_http_error)

    @app.post("/v1/completions", response_model=Completion)
    async def create_completion(body: CompletionRequest, request: Request) -> Response:
        """Complete prompts; with stream=true as server-sent events, ended by `data: [DONE]`."""
        return await complete(service, body, request)

    @app.get("/v1/models")
    async def list_models() -> ModelList:
        """The models that answer here, with the version each one is now."""
        return ModelList(data=service.models.describe())

    @app.get("/v1/models/{model_id}")
    async def get_model(model_id: str) -> ModelAnswer:
        """One model."""
        service.models.find(model_id)
        return next(entry for entry in service.models.describe() if entry.id == model_id)

    @app.get("/v1/models/{model_id}/card")
    async def get_card(model_id: str) -> dict[str, Any]:
        """How one model was trained: its loss curves as [step, value] pairs, and its run's page."""
        return service.models.find(model_id)[1].card

    @app.post("/v1/tokenize", response_model=TokenizeAnswer)
    async def tokenize(body: TokenizeRequest, request: Request) -> Response:
        """Text to token ids."""
        model_id, version = service.models.find(body.model)
        service.access.start(request.scope["api_key"], 0)
        tokens = await encode(version.loaded.tokenizer, body.text, "text")
        return JSONResponse({"model": model_id, "tokens": tokens, "count": len(tokens)}, headers=version.headers)

    @app.post("/v1/detokenize", response_model=DetokenizeAnswer)
    async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
        """Token ids to text; bytes that are no text become U+FFFD."""
        model_id, version = service.models.find(body.model)
        service.access.start(request.scope["api_key"], 0)
        check_tokens(body.tokens, version, "tokens")
        text = version.loaded.tokenizer.decode(body.tokens)
        return JSONResponse({"model": model_id, "text": text}, headers=version.headers)

    @app.get("/healthz", response_class=PlainTextResponse)
    async def healthz() -> str:
        """The process is alive."""
        return "ok"

    @app.get("/readyz", response_class=PlainTextResponse)
    async def readyz() -> str:
        """The models are loaded and work."""
        check_engines(service.models)
        return "ready"

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Prometheus metrics of all replicas."""
        page = await service.metrics_page()
        return PlainTextResponse(page, media_type="text/plain; version=1.0.0; charset=utf-8")

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def playground() -> Response:
        return HTMLResponse(PAGE.read_bytes(), headers=PAGE_HEADERS)

    return app


PAGE_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'self'; script-src 'unsafe-inline'; style-src 'unsafe-inline';"
    " img-src data:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


# -- errors --


def check_engines(models: ServedModels) -> None:
    try:
        models.check()
    except EngineDied as error:
        raise as_api_error(error) from None


async def answer_error(request: Request, error: Exception) -> Response:
    failure = as_api_error(error)
    return JSONResponse(failure.body, status_code=failure.status, headers=failure.headers)


async def answer_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if request.method == "POST" and content_type != "application/json":
        return JSONResponse(error_body(415, "Send the body as Content-Type: application/json."), status_code=415)
    message, param = describe_validation(list(error.errors()))
    return JSONResponse(error_body(400, message, param=param), status_code=400)


async def answer_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    sentences = {
        400: "The body is not JSON that can be read.",
        404: f"There is nothing at {request.url.path}; the API is described at /docs.",
        405: f"{request.url.path} does not take {request.method}.",
    }
    # FastAPI's own 400: JSON that no parser can hold, such as a hundred thousand brackets.
    message = sentences.get(error.status_code, str(error.detail))
    return JSONResponse(error_body(error.status_code, message), status_code=error.status_code, headers=error.headers)


# -- what stands before every endpoint --


class Gate:
    """Decides who may ask, refuses bodies over the limit while they arrive, and counts every answer."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit = self._service.max_body_bytes
        status = 0
        seen_bytes = 0
        too_large = BodyTooLarge(413, f"The body is over the limit of {limit} bytes.")

        async def count_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        async def limited_receive() -> Message:
            nonlocal seen_bytes
            message = await receive()
            seen_bytes += len(message.get("body", b""))
            if seen_bytes > limit:
                raise too_large  # inside FastAPI, which lets its own kind through
            return message

        headers = Headers(scope=scope)
        declared = headers.get("content-length", "")
        try:
            if scope["path"].startswith("/v1/"):
                client = scope["client"][0] if scope.get("client") else None
                authorization, host = headers.get("authorization"), headers.get("host")
                scope["api_key"] = self._service.access.admit(authorization, client, host)
            if declared.isdigit() and int(declared[:20]) > limit:
                raise ApiError(413, too_large.detail)
            await self._app(scope, limited_receive, count_status)
        except ApiError as error:
            if status:
                raise
            answer = JSONResponse(error.body, status_code=error.status, headers=error.headers)
            await answer(scope, receive, count_status)
        finally:
            route = getattr(scope.get("route"), "path", "other")  # not the path: anybody can invent those
            self._service.metrics.requests.labels(route, str(status or 499)).inc()
