"""What stands before every endpoint: who may ask, how large a body may be, what it may cost to read, and the counting.

A parser holds the event loop, and with it everybody's answers, from the first byte of a body to the last. So its work
is bounded before it begins: by the size of the body, and by the values in it. Four megabytes of text take it 4 ms;
four megabytes of `[],[],…` took it three seconds, and the checks after it a minute.
"""

import asyncio

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeline.serving.completion import Service
from pipeline.serving.errors import ApiError
from pipeline.serving.tokens import VLLM_PATHS

# Nanoseconds that Python's parser takes for one of each on a slow core: a character outside of strings, and beside
# that a comma (a value more), an opening bracket, a brace or colon (a dict, a key), a point or an exponent (a float).
CHARACTER_COST = 25
COSTS = {b",": 120, b"[": 1000, b"{": 1000, b":": 1000, b".": 1000, b"e": 1000, b"E": 1000}
MOST_COST = 40_000_000  # 40 ms: about 135,000 token ids, or 128 prompts of a thousand
SLICE_BYTES = 64 * 1024  # looked through in a millisecond; then others have their turn


class JsonCost:
    """Adds up what parsing a body will cost, without parsing it; `feed` takes the body in pieces, as it arrives."""

    def __init__(self) -> None:
        self.nanoseconds = 0
        self._in_string = False
        self._escaped = False  # the last byte was a backslash that belongs to the next

    def feed(self, piece: bytes) -> None:
        if self._escaped and piece:
            piece, self._escaped = piece[1:], False
        if b"\\" in piece:
            piece = piece.replace(b"\\\\", b"").replace(b'\\"', b"")
            if piece.endswith(b"\\"):
                piece, self._escaped = piece[:-1], True
        parts = piece.split(b'"')
        outside = b"".join(parts[self._in_string :: 2])
        self._in_string ^= len(parts) % 2 == 0
        self.nanoseconds += CHARACTER_COST * len(outside)
        self.nanoseconds += sum(cost * outside.count(kind) for kind, cost in COSTS.items())


class Gate:
    """Lets a request through to the application, or refuses it; counts every answer."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        head_only = scope["method"] == "HEAD"
        if head_only:  # whatever answers GET answers HEAD
            scope = {**scope, "method": "GET"}
        status = 0

        async def watched_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            elif head_only and message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        outcome = 500  # of a request that ends without an answer
        try:
            if scope["path"].startswith("/v1/") or scope["path"] in VLLM_PATHS:
                headers = Headers(scope=scope)
                client = scope["client"][0] if scope.get("client") else None
                admitted = self._service.access.admit(headers.get("authorization"), client, headers.get("host"))
                scope["api_key"] = admitted
                if scope["method"] == "POST":
                    body = await read_body(headers, receive, self._service.max_body_bytes)
                    receive = replay(body, receive)
            await self._app(scope, receive, watched_send)
        except ApiError as error:
            if status:
                raise
            answer = JSONResponse(error.body, status_code=error.status, headers=error.headers)
            await answer(scope, receive, watched_send)
        except asyncio.CancelledError:
            outcome = 499
            raise
        finally:
            route = getattr(scope.get("route"), "path", "other")  # not the path: anybody can invent those
            self._service.metrics.requests.labels(route, str(status or outcome)).inc()


async def read_body(headers: Headers, receive: Receive, most_bytes: int) -> bytes:
    """Receive a body; raises `ApiError` where it is over the limit, or costs too much to parse."""
    too_large = ApiError(413, f"The body is over the limit of {most_bytes} bytes.")
    declared = headers.get("content-length", "")
    if declared.isdigit() and int(declared[:20]) > most_bytes:
        raise too_large
    cost = JsonCost()
    pieces: list[bytes] = []
    num_bytes = 0
    arrives = True
    while arrives:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ApiError(499, "The client has gone away.")
        piece = message.get("body", b"")
        num_bytes += len(piece)
        if num_bytes > most_bytes:
            raise too_large
        for start in range(0, len(piece), SLICE_BYTES):
            if start:
                await asyncio.sleep(0)
            if cost.nanoseconds <= MOST_COST:
                cost.feed(piece[start : start + SLICE_BYTES])
        if cost.nanoseconds <= MOST_COST:
            pieces.append(piece)  # else the rest is read and dropped: the connection stays in order
        arrives = message.get("more_body", False)
    if cost.nanoseconds > MOST_COST:
        raise ApiError(400, "The body holds more values than one request may have; send fewer prompts at once.")
    return b"".join(pieces)


def replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives the body first and then what comes after it."""
    waiting = [body]

    async def receive_again() -> Message:
        if waiting:
            return {"type": "http.request", "body": waiting.pop(), "more_body": False}
        return await receive()

    return receive_again
