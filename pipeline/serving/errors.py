"""What can go wrong with a request, and its answer in OpenAI's shape: from a replica, or from Serve's proxy when the
replica cannot speak any more.

The proxy imports this file in a process of its own, so nothing here imports torch.
"""

import json
import logging
from typing import Any

from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger("ray.serve")

LOST = "The replica that worked on this request was lost; send the request again."


class Overloaded(Exception):
    """No place for a request now; `retry_after` says in how many seconds there may be one."""

    def __init__(self, reason: str, retry_after: int) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


class EngineDied(Exception):
    """The backend has ended or hangs; nothing it was asked will be answered."""


class ApiError(Exception):
    """An answer that is an error: its HTTP status, one sentence, and what OpenAI's clients look at."""

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None, retry_after: int = 0
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.retry_after = retry_after

    @property
    def body(self) -> dict[str, Any]:
        return error_body(self.status, self.message, code=self.code, param=self.param)

    @property
    def headers(self) -> dict[str, str]:
        headers = {"Retry-After": str(self.retry_after)} if self.retry_after else {}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


ERROR_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


def error_body(status: int, message: str, *, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """OpenAI's error object."""
    default = "server_error" if status >= 500 else "invalid_request_error"
    kind = ERROR_TYPES.get(status, default)
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def as_api_error(error: Exception) -> ApiError:
    """The answer that an exception stands for."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Overloaded):
        wait = error.retry_after
        return ApiError(429, f"{error} Try again in {wait} s.", code="overloaded", retry_after=wait)
    if isinstance(error, EngineDied):
        return ApiError(503, str(error), code="engine_failed", retry_after=5)
    if isinstance(error, ValueError):
        logger.warning("A request was refused with an error that nobody foresaw.", exc_info=error)
        return ApiError(400, str(error))
    logger.error("A request has failed.", exc_info=error)
    return ApiError(500, "The server has failed on this request; its log says why.", code="internal_error")


def proxy_middlewares() -> list[Middleware]:
    """What Serve's proxies call where RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names this function."""
    return [Middleware(ProxyErrors)]


class ProxyErrors:
    """Gives every request an answer in OpenAI's shape, whatever becomes of the replica that has it.

    When a replica dies, Serve's proxy answers its requests with a plain 500, and simply ends the streams that have
    begun. The proxy's own refusals (no replica, too many requests) are plain text.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started: Message | None = None
        refusal: bytearray | None = None  # the proxy's own plain text, while it is gathered
        ended = is_event_stream = False

        async def watch(message: Message) -> None:
            nonlocal started, refusal, ended, is_event_stream
            if message["type"] == "http.response.start":
                started = message
                headers = dict(message.get("headers", ()))
                kind = headers.get(b"content-type", b"")
                is_event_stream = kind.startswith(b"text/event-stream")
                if message["status"] >= 400 and not kind.startswith(b"application/json"):
                    refusal = bytearray()
                    return
            elif message["type"] == "http.response.body":
                ended = not message.get("more_body", False)
                if refusal is not None:
                    refusal += message.get("body", b"")
                    if ended:
                        await answer(started, bytes(refusal))
                    return
            await send(message)

        async def answer(start: Message | None, text: bytes) -> None:
            status = start["status"] if start else 503
            kept = (b"retry-after", b"x-request-id")
            headers = {
                name.decode(): value.decode()
                for name, value in (start or {}).get("headers", ())
                if name.lower() in kept
            }
            if status == 503:
                headers.setdefault("retry-after", "1")
            body = error_body(status, text.decode(errors="replace").strip() or LOST)
            await JSONResponse(body, status_code=status, headers=headers)(scope, receive, send)

        await self._app(scope, receive, watch)
        if started is None:
            await answer(None, b"")
        elif not ended and refusal is None and is_event_stream:
            event = f"data: {json.dumps(error_body(503, LOST))}\n\n"
            await send({"type": "http.response.body", "body": event.encode(), "more_body": False})
