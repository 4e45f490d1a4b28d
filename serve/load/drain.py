"""How a gateway ends: what is under way may finish, streams too, what comes is refused with 503 and sent elsewhere.

`serve.main` orders it on its first signal. A gateway that Serve itself takes down (an update, fewer replicas) is sent
nothing new and has the same time, `admission.drain_s`, as its `graceful_shutdown_timeout_s`.
"""

import asyncio
import time

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from metasepia.errors import Unavailable
from serve.load.admission import Admission
from serve.requests import failures

OPEN = ("/health", "/metrics", "/version")
"""Answered until the end, and not waited for."""
WAITING_SHARE = 0.7
"""Of the time: who has not begun by then is refused, so that it can go elsewhere rather than be cut off."""
RETRY_AFTER_S = 5.0


class Drain:
    """Of one gateway: what is under way, and whether it is ending."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self.begun = False
        self.num_running = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def run(self, budget_s: float) -> int:
        """Refuses what comes from now on; how many requests are still under way when all have ended or the time has."""
        self.begun = True
        begin = time.monotonic()
        if not await self._ended(WAITING_SHARE * budget_s):
            self._admission.drain()
            await self._ended(budget_s - (time.monotonic() - begin))
        return self.num_running

    async def _ended(self, seconds: float) -> bool:
        try:
            async with asyncio.timeout(max(0.0, seconds)):  # wait_for would swallow a cancellation now and then
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    def enter(self) -> None:
        self.num_running += 1
        self._idle.clear()

    def leave(self) -> None:
        self.num_running -= 1
        if self.num_running == 0:
            self._idle.set()


class Draining:
    """ASGI around everything that a client asks of a gateway."""

    def __init__(self, app: ASGIApp, drain: Drain) -> None:
        self._app, self._drain = app, drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif scope["path"] in OPEN:
            if self._drain.begun and scope["path"] == "/health":
                await self._refuse(scope, receive, send)
            else:
                await self._app(scope, receive, send)
        elif self._drain.begun:
            await self._refuse(scope, receive, send)
        else:
            self._drain.enter()
            try:
                await self._app(scope, receive, self._closing(send))
            finally:
                self._drain.leave()

    def _closing(self, send: Send) -> Send:
        """Connections of answers that begin while draining are not used again."""

        async def told(message: Message) -> None:
            if self._drain.begun and message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), (b"connection", b"close")]}
            await send(message)

        return told

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = failures.answer(Unavailable("the server, which is ending,", RETRY_AFTER_S))
        body = answer.body | ({"status": "draining"} if scope["path"] == "/health" else {})
        refusal = JSONResponse(body, answer.failure.status, headers=answer.headers | {"connection": "close"})
        await refusal(scope, receive, send)
