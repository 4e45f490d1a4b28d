"""The first part of a request's body goes to the gateway with the request.

Serve's replicas fetch what a client sends from the proxy, by a call back: 2 ms of a small request. Most bodies are one
part that is there when its head is, so the proxy puts that part beside the head, and the gateway reads it from there.
"""

import asyncio
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

KEY = "metasepia.first_message"
"""In the ASGI scope on its way from proxy to gateway; clients cannot put anything there."""
WAIT_S = 0.005
"""For a part that is a little behind its head; a later one is fetched as Serve fetches it."""
MAX_BYTES = 64 * 1024
"""Larger parts are fetched: a call's arguments of 100 KiB and more would take Ray's way for large objects."""


async def with_first_message(scope: Scope, receive: Receive) -> tuple[Scope, Receive]:
    """In the proxy: the scope, with the first part of the body where there is one; and what receives the rest."""
    if not _has_body(scope):
        return scope, receive
    try:
        async with asyncio.timeout(WAIT_S):
            message = await receive()
    except TimeoutError:
        return scope, receive
    if message["type"] != "http.request" or len(message.get("body", b"")) > MAX_BYTES:
        return scope, _after(message, receive)
    return {**scope, KEY: dict(message)}, receive


class Given:
    """ASGI, in the gateway: the first message that came with the request, then those that Serve fetches."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if KEY in scope:
            message: Any = scope[KEY]
            scope, receive = {name: value for name, value in scope.items() if name != KEY}, _after(message, receive)
        await self._app(scope, receive, send)


def _after(message: Message, receive: Receive) -> Receive:
    """`message`, once, and then the others."""
    waiting = [message]

    async def received() -> Message:
        return waiting.pop() if waiting else await receive()

    return received


def _has_body(scope: Scope) -> bool:
    names = {name.lower() for name, _ in scope["headers"]}
    return b"content-length" in names or b"transfer-encoding" in names
