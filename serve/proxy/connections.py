"""What one connection may take of Serve's proxy, whatever its client sends or leaves out. It runs inside the proxy.

Serve starts uvicorn with its parser in C (httptools) and without bounds on a request's head, on the time that it takes
to come in, or on the number of connections, and has no settings for them. `listen_bounded` puts a protocol with bounds
in the place where uvicorn looks its own up; without it requests are answered the same, and nothing is bounded.

Left to others: how long a body may take (the request's deadline, in the gateway), how long a connection may idle
between two requests (Serve's keep-alive, 90 s), and floods of new connections (the kernel's backlog, a load balancer).
"""

import asyncio
import dataclasses
import json
import os
import resource
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from uvicorn import config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from cluster.door_settings import HttpSettings
from serve.requests import ids as request_ids

VARIABLE = "HTTP_BOUNDS_OF_METASEPIA"
"""Environment variable of Ray's processes: `Bounds` as JSON."""
MAX_HEADERS = 128
OTHER_FILES = 512
"""Of the proxy's process beside connections: Ray's, gRPC's."""
LINGER_S = 5.0
"""So long what is still sent after an answer is read and thrown away: a client that writes on sees the answer."""
STALLED_S = 60.0
"""Of an answer that its client does not read."""

_REFUSALS: Mapping[int, tuple[str, str]] = {
    400: ("malformed_request", "this is not HTTP/1.1 as the server reads it"),
    408: ("head_timeout", "the head of the request did not come in within {bounds.head_timeout_s:g} s"),
    431: ("head_too_large", "the head of the request is larger than {bounds.max_head_kib:g} KiB or has more than "
          f"{MAX_HEADERS} fields"),
    503: ("unavailable", "too many connections are open; try again soon"),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """Of every connection of one proxy."""

    max_head_kib: float = HttpSettings.max_head_kib
    head_timeout_s: float = HttpSettings.head_timeout_s
    max_connections: int = HttpSettings.max_connections

    @classmethod
    def told(cls) -> "Bounds":
        """By the environment, else the settings' defaults; never more connections than the process may open files."""
        text = os.environ.get(VARIABLE)
        told = cls(**json.loads(text)) if text else cls()
        files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = told.max_connections + OTHER_FILES
        if files < wanted:
            files = min(wanted, most)
            resource.setrlimit(resource.RLIMIT_NOFILE, (files, most))
        return dataclasses.replace(told, max_connections=max(1, min(told.max_connections, files - OTHER_FILES)))


def environment(http: HttpSettings) -> dict[str, str]:
    """For Ray's processes."""
    names = [one.name for one in dataclasses.fields(Bounds)]
    return {VARIABLE: json.dumps({name: getattr(http, name) for name in names})}


def listen_bounded() -> None:
    """Makes the HTTP server that is about to start in this process use `BoundedProtocol`."""
    config.HTTP_PROTOCOLS["auto"] = f"{__name__}:BoundedProtocol"


class _HeadTooLarge(Exception):
    """Through the parser, which gives it back as an error of its own."""


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's protocol, with bounds; what it refuses by itself is in the error envelope."""

    bounds: Bounds | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if BoundedProtocol.bounds is None:
            BoundedProtocol.bounds = Bounds.told()
        self._bounds = BoundedProtocol.bounds
        self._max_head = int(self._bounds.max_head_kib * 1024)
        self._in_head, self._head_bytes, self._head_parsed = True, 0, 0
        self._refused = 0
        self._timers: dict[str, asyncio.TimerHandle] = {}

    # -- a connection --------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._bounds.max_connections:
            self._refuse(503)
        else:
            self._after("head", self._bounds.head_timeout_s, self._head_is_late)

    def connection_lost(self, exc: Exception | None) -> None:
        for name in tuple(self._timers):
            self._forget(name)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused or self.parser is None:
            return
        if self._in_head:
            self._head_bytes += len(data)
            if "head" not in self._timers:  # the next request of a connection that was kept
                self._after("head", self._bounds.head_timeout_s, self._head_is_late)
        super().data_received(data)
        if self._in_head and self._head_bytes > self._max_head:
            self._refuse(431)

    def send_400_response(self, msg: str) -> None:
        self._refuse(431 if self._head_parsed > self._max_head or len(self.headers or ()) > MAX_HEADERS else 400)

    def _should_upgrade_to_ws(self) -> bool:
        return (
            False  # nothing here speaks it: the request is answered as if it had asked for no upgrade (RFC 9110, 7.8)
        )

    # -- the parser's callbacks ----------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        self._in_head, self._head_parsed = True, 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._parsed(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._parsed(len(name) + len(value) + 4)
        super().on_header(name, value)
        if len(self.headers) > MAX_HEADERS:
            raise _HeadTooLarge

    def on_headers_complete(self) -> None:
        self._in_head, self._head_bytes = False, 0
        self._forget("head")
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._in_head, self._head_bytes = True, 0
        self._forget("linger")  # the connection may be used again
        super().on_message_complete()

    def _parsed(self, num_bytes: int) -> None:
        self._head_parsed += num_bytes
        if self._head_parsed > self._max_head:
            raise _HeadTooLarge

    # -- answers -------------------------------------------------------------------------------------------------------

    def on_response_complete(self) -> None:
        if self.cycle is not None and self.cycle.more_body and not self.transport.is_closing():
            self._after("linger", LINGER_S, self.transport.close)
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._after("stalled", STALLED_S, self.transport.abort)

    def resume_writing(self) -> None:
        self._forget("stalled")
        super().resume_writing()

    def _head_is_late(self) -> None:
        if not self._in_head or self.transport.is_closing():
            return
        if self._head_bytes:
            self._refuse(408)
        else:  # it never said a word
            self.transport.close()

    def _refuse(self, status: int) -> None:
        """The envelope, and the connection's end."""
        if self._refused or self.transport.is_closing():
            return
        self._refused = status
        code, says = _REFUSALS[status]
        kind = "server_error" if status == 503 else "invalid_request_error"
        message = says.format(bounds=self._bounds)
        body = json.dumps({"error": {"message": message, "type": kind, "param": None, "code": code}}).encode()
        head = [STATUS_LINE[status], b"content-type: application/json\r\n", b"connection: close\r\n"]
        head += [b"%b: %b\r\n" % pair for pair in request_ids.with_id((), request_ids.id_of(()))]
        head += [b"retry-after: 1\r\n"] if status == 503 else []
        self.transport.write(b"".join([*head, b"content-length: %d\r\n\r\n" % len(body), body]))
        self.transport.close()

    def _after(self, name: str, seconds: float, then: Any) -> None:
        self._forget(name)
        self._timers[name] = self.loop.call_later(seconds, then)

    def _forget(self, name: str) -> None:
        timer = self._timers.pop(name, None)
        if timer is not None:
            timer.cancel()
