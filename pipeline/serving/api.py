"""The HTTP API over the served models: OpenAI's completions, the registry's facts, metrics, and the page.

    app = build_api(service)     # an ASGI application; Ray Serve hosts it, and so does any other server

Who may ask is decided first, then what is asked is checked; only a request that can be answered meets the backend.
"""

from pathlib import Path
from typing import Any

import fastapi_swagger
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException

from pipeline.serving.chat import ChatCompletion, ChatRequest, chat
from pipeline.serving.completion import Service, complete
from pipeline.serving.errors import ApiError, EngineDied, Overloaded, as_api_error, error_body
from pipeline.serving.gate import Gate
from pipeline.serving.protocol import (
    Completion,
    CompletionRequest,
    ErrorAnswer,
    ModelAnswer,
    ModelList,
    describe_validation,
)
from pipeline.serving.tokens import token_routes

PAGE = Path(__file__).with_name("page")
PAGE_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}


def build_api(service: Service) -> FastAPI:
    """The application; its OpenAPI description is at /docs."""
    errors: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorAnswer}, "5XX": {"model": ErrorAnswer}}
    app = FastAPI(
        title="GPT",
        description="OpenAI's completions and chat completions API over a model of the MLflow registry.",
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

    @app.post("/v1/chat/completions", response_model=ChatCompletion)
    async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation; with stream=true as server-sent events, ended by `data: [DONE]`."""
        return await chat(service, body, request)

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

    app.include_router(token_routes(service))

    @app.get("/healthz", response_class=PlainTextResponse)
    async def healthz() -> str:
        """The process is alive."""
        return "ok"

    @app.get("/readyz", response_class=PlainTextResponse)
    async def readyz() -> str:
        """The models are loaded and work."""
        service.models.check()
        return "ready"

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Prometheus metrics of all replicas."""
        page = await service.metrics_page()
        return PlainTextResponse(page, media_type="text/plain; version=1.0.0; charset=utf-8")

    files = {path.name: path for path in PAGE.iterdir() if path.suffix in PAGE_TYPES}

    def file_of_page(name: str) -> Response:
        path = files[name]
        media_type = f"{PAGE_TYPES[path.suffix]}; charset=utf-8"
        return Response(path.read_bytes(), media_type=media_type, headers=PAGE_HEADERS)

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def playground() -> Response:
        return file_of_page("index.html")

    @app.get("/page/{name}", include_in_schema=False)
    async def part_of_playground(name: str) -> Response:
        if name not in files:
            raise HTTPException(404)
        return file_of_page(name)

    return app


PAGE_HEADERS = {
    "Cache-Control": "no-cache",
    # Scripts and styles from our own files alone: what a model writes could not run even if it became HTML.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self';"
    " img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


# -- errors --


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
