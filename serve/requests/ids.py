"""One id for each request, known to everything that serves it: answers, logs, traces, rows.

A client's own is kept where it is sane; another or none is replaced. Serve's proxy is told the same id
(`serve.proxy.envelope`), so that its lines and ours can be read together.
"""

import re
import uuid
from collections.abc import Iterable
from contextvars import ContextVar

from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER = "x-request-id"
_NAME = HEADER.encode()
MAX_CHARS = 128
_SANE = re.compile(rb"[\x21-\x7e]{1,%d}" % MAX_CHARS)
"""No spaces and no control characters: an id is one word in a log."""

_serving: ContextVar[str | None] = ContextVar("request_id", default=None)


def current() -> str | None:
    """Of the request that this task serves; None outside of requests."""
    return _serving.get()


def id_of(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """The client's own, where it is one sane word, else a new one."""
    given = [value for name, value in headers if name.lower() == _NAME]
    return given[0].decode("ascii") if len(given) == 1 and _SANE.fullmatch(given[0]) else f"req_{uuid.uuid4().hex}"


def with_id(headers: Iterable[tuple[bytes, bytes]], request_id: str) -> list[tuple[bytes, bytes]]:
    """Headers that carry this id, once."""
    return [*((name, value) for name, value in headers if name.lower() != _NAME), (_NAME, request_id.encode())]


class Identified:
    """ASGI: gives each request its id, and each answer the same in its header."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = id_of(scope["headers"])

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": with_id(message.get("headers", ()), request_id)}
            await send(message)

        token = _serving.set(request_id)
        try:
            await self._app({**scope, "headers": with_id(scope["headers"], request_id)}, receive, named)
        finally:
            _serving.reset(token)
