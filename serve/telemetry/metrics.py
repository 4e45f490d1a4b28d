"""Every request counted, timed, traced and logged, whatever becomes of it; and `GET /metrics` over all nodes."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from actors import meters, tracing
from serve.access.principal import charge
from serve.requests import ids as request_ids
from serve.telemetry import request_log
from serve.telemetry.status import Recent

LEFT = 499
"""Status of a request whose client left before it was answered."""
CLIENT_LEFT = "client_left"
QUIET = frozenset({"/health", "/metrics", "/version", "/v1/status"})
"""Asked again and again by machines: not traced, and logged at `debug` only."""


class Metrics:
    """What one door counts."""

    def __init__(self) -> None:
        self.recent = Recent()

    def begin(self) -> None:
        self.recent.running += 1
        meters.RUNNING.set(self.recent.running)

    def end(self, route: str, status: int, reason: str | None, duration_s: float) -> None:
        """`reason`: the code of the error that the request ended with."""
        self.recent.running -= 1
        self.recent.end(route, reason is not None, duration_s)
        meters.RUNNING.set(self.recent.running)
        meters.REQUESTS.inc(route=route, status=str(status))
        meters.DURATION.observe(duration_s, route=route)
        if reason is not None:
            meters.FAILURES.inc(route=route, reason=reason)

    def add_tokens(self, prompt: int, answer: int) -> None:
        self.recent.num_tokens += prompt + answer
        request_log.add_tokens(prompt, answer)
        charge(prompt, answer)
        meters.TOKENS_DONE.inc(prompt, kind="prompt")
        meters.TOKENS_DONE.inc(answer, kind="answer")


class Measured:
    """ASGI around the gateway's app: streams are followed to their end."""

    def __init__(self, app: ASGIApp, metrics: Metrics, begin: Callable[[], None]) -> None:
        """`begin` is called with each request, in the loop that serves it."""
        self._app, self._metrics, self._begin = app, metrics, begin

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        quiet = scope["path"] in QUIET
        given = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"traceparent"), None)
        opened = tracing.NOTHING if quiet else tracing.request_span("request", given)
        status, begin = LEFT, time.perf_counter()

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if span.traceparent is not None:
                    message["headers"] = [*message.get("headers", ()), (b"traceresponse", span.traceparent.encode())]
            await send(message)

        self._begin()
        self._metrics.begin()
        with request_log.story(request_ids.current()) as facts, opened as span:
            try:
                await self._app(scope, receive, watched)
            except asyncio.CancelledError:  # also of a stream whose status has left
                facts.setdefault("reason", CLIENT_LEFT)
                raise
            finally:
                duration_s = time.perf_counter() - begin
                route = getattr(scope.get("route"), "path", "unmatched")  # its pattern: clients make no new labels
                reason = _reason(status, facts.get("reason"))
                self._metrics.end(route, status, reason, duration_s)
                told: dict[str, Any] = {"method": scope["method"], "route": route, "status": status, "reason": reason}
                told |= {"door": "grpc" if scope.get("scheme") == "grpc" else "http"}
                told |= {"duration_ms": round(1000 * duration_s, 2), **facts}
                request_log.write(told, quiet=quiet)
                span.rename(f"{scope['method']} {route}")
                span.set(**{name: value for name, value in told.items() if isinstance(value, str | int | float)})
                if reason is not None and status >= 500:
                    span.failed(reason)


def _reason(status: int, noted: str | None) -> str | None:
    """Why a request was not answered well: its error's code, also of one that came after the status had left."""
    if noted is not None:
        return noted
    if status == LEFT:
        return CLIENT_LEFT
    return None if status < 400 else f"http_{status}"
