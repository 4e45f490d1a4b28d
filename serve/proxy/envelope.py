"""What Ray Serve's own proxy answers in plain text, in the error envelope: it runs inside the proxy process.

The proxy answers by itself when no gateway does: no route yet, too many requests, its own time limit, a gateway that
died. Ray finds `proxy_middlewares` by the import path in RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH, which must be in
the environment before Ray starts (`serve.main` sets it). Without it clients see plain text, and nothing else changes.
"""

import json
from collections.abc import Sequence

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.grpc_door import proxy as grpc_proxy
from serve.proxy import connections
from serve.proxy.first_message import with_first_message
from serve.requests import ids as request_ids
from serve.requests.deadlines import HEADER, INNER_HEADER

ENVIRONMENT = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve.proxy.envelope.proxy_middlewares"}

_HEADER = HEADER.encode()
GRACE_S = 5.0

_ERRORS: dict[int, tuple[int, str, str, str, int | None]] = {
    404: (404, "invalid_request_error", "not_found", "no such path here; is the graph still starting?", None),
    408: (504, "timeout_error", "deadline_exceeded", "the request did not finish before its deadline", None),
    429: (429, "rate_limit_error", "overloaded", "too many requests are waiting; try again soon", 1),
    500: (503, "server_error", "unavailable", "the gateway did not answer; try again soon", 2),
    503: (503, "server_error", "unavailable", "the gateway is starting or down; try again soon", 2),
}
"""The proxy's status to ours: (status, type, code, message, Retry-After in seconds)."""


def proxy_middlewares() -> list[Middleware]:
    """Called once, before the proxy opens a port."""
    grpc_proxy.listen_where_told()
    connections.listen_bounded()
    return [Middleware(Envelope)]


class Envelope:
    """Replaces plain-text errors; the gateway's own answers are JSON and pass untouched."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith("/-/"):
            await self._app(scope, receive, send)
            return
        request_id = request_ids.id_of(scope["headers"])
        headers = request_ids.with_id(_give_the_gateway_time(scope["headers"]), request_id)
        send = _named(send, request_id)
        scope, receive = await with_first_message({**scope, "headers": headers}, receive)
        started = replaced = False

        async def watched(message: Message) -> None:
            nonlocal started, replaced
            if message["type"] == "http.response.start":
                started = True
                if _is_plain_error(message):
                    replaced = True
                    await _answer(send, message["status"], message["headers"])
                    return
            if not replaced:
                await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception:
            if started:
                raise
            started = True
            await _answer(send, 500, ())
        if not started:
            await _answer(send, 500, ())


def _named(send: Send, request_id: str) -> Send:
    """Serve adds a header with the id beside the gateway's own: one of them is enough."""

    async def named(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": request_ids.with_id(message.get("headers", ()), request_id)}
        await send(message)

    return named


def _give_the_gateway_time(headers: Sequence[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """The proxy obeys the deadline's header too, and would cut a stream before the gateway can say why it ends.

    So the gateway gets the client's value under a name of its own, and the proxy one that is a little later.
    """
    kept: list[tuple[bytes, bytes]] = []
    for name, value in headers:
        try:
            seconds = float(value) if name == _HEADER else 0.0
        except ValueError:
            seconds = 0.0  # the gateway refuses it
        if seconds > 0:
            kept += [(INNER_HEADER.encode(), value), (_HEADER, str(seconds + GRACE_S).encode())]
        else:
            kept.append((name, value))
    return kept


def _is_plain_error(start: Message) -> bool:
    content_type = dict(start["headers"]).get(b"content-type", b"")
    return start["status"] in _ERRORS and content_type.startswith(b"text/plain")


async def _answer(send: Send, status: int, headers: Sequence[tuple[bytes, bytes]]) -> None:
    status, type_, code, message, retry_after_s = _ERRORS[status]
    body = json.dumps({"error": {"message": message, "type": type_, "param": None, "code": code}}).encode()
    kept = [(name, value) for name, value in headers if name.lower() in (b"retry-after", b"x-request-id")]
    if retry_after_s is not None and not any(name.lower() == b"retry-after" for name, _ in kept):
        kept.append((b"retry-after", str(retry_after_s).encode()))
    length = str(len(body)).encode()
    kept += [(b"content-type", b"application/json"), (b"content-length", length)]
    await send({"type": "http.response.start", "status": status, "headers": kept})
    await send({"type": "http.response.body", "body": body})
