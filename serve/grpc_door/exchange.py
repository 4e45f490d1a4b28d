"""A request to an ASGI application of this process, without a socket between."""

import asyncio
import json
import secrets
import urllib.parse
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope

QUEUED = 4
"""Messages of an answer that wait for whoever reads it; the application waits beyond."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked."""

    method: str
    path: str
    query: bytes = b""
    headers: Sequence[tuple[str, str]] = ()
    body: bytes | AsyncIterator[bytes] = b""
    """An iterator raises ConnectionError when its client has gone."""
    peer: str = ""
    """As gRPC spells it: `ipv4:127.0.0.1:50000`."""

    def scope(self) -> Scope:
        host, _, port = self.peer.partition(":")[2].rpartition(":")
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},  # from 2.4 on nobody listens for a disconnect
            "http_version": "2",
            "method": self.method,
            "scheme": "grpc",
            "path": self.path,
            "raw_path": urllib.parse.quote(self.path).encode(),
            "query_string": self.query,
            "root_path": "",
            "headers": [(name.encode("latin-1"), value.encode("latin-1", "replace")) for name, value in self.headers],
            "client": (urllib.parse.unquote(host), int(port)) if port.isdigit() else None,
            "server": None,
        }

    def receive(self) -> Receive:
        """Of the application: the body, and then nothing, however long: who leaves cancels."""
        body, ended = self.body, False

        async def received() -> Message:
            nonlocal ended
            if ended:
                await asyncio.Event().wait()
            if isinstance(body, bytes):
                ended = True
                return {"type": "http.request", "body": body, "more_body": False}
            try:
                chunk = await anext(body, None)
            except ConnectionError:
                return {"type": "http.disconnect"}
            ended = chunk is None
            return {"type": "http.request", "body": chunk or b"", "more_body": not ended}

        return received


@dataclass(frozen=True)
class Answer:
    """The beginning of an answer, and the rest as it comes."""

    status: int
    headers: Mapping[str, str]
    chunks: AsyncIterator[bytes]


def _headers(start: Message) -> dict[str, str]:
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in start["headers"]}


async def whole(app: ASGIApp, request: Request) -> tuple[int, Mapping[str, str], bytes]:
    """Status, headers and body, once all is there."""
    messages: list[Message] = []

    async def send(message: Message) -> None:
        messages.append(message)

    await app(request.scope(), request.receive(), send)
    start, *rest = messages
    return start["status"], _headers(start), b"".join([one.get("body", b"") for one in rest])


@asynccontextmanager
async def begun(app: ASGIApp, request: Request) -> AsyncIterator[Answer]:
    """An answer that is read as it comes. Leaving ends the application's work."""
    queue: asyncio.Queue[Message | Exception | None] = asyncio.Queue(QUEUED)
    leaving = False

    async def run() -> None:
        try:
            await app(request.scope(), request.receive(), queue.put)
        except asyncio.CancelledError:
            if leaving:
                raise
            await queue.put(ConnectionError("the call was cancelled behind the door"))  # else its reader waits for ever
        except Exception as error:
            await queue.put(error)
        else:
            await queue.put(None)

    async def message() -> Message | None:
        found = await queue.get()
        if isinstance(found, Exception):
            raise found
        return found

    async def chunks() -> AsyncGenerator[bytes]:
        while (part := await message()) is not None:
            if part.get("body"):
                yield part["body"]

    running = asyncio.create_task(run())
    try:
        start = await message()
        assert start is not None  # an application answers or raises
        yield Answer(start["status"], _headers(start), chunks())
    finally:
        leaving = True
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


def multipart(fields: Mapping[str, bytes], file: AsyncIterator[bytes]) -> tuple[str, AsyncIterator[bytes]]:
    """Content type and body of a form with these fields and one `file`, left out where it has no piece."""
    boundary = secrets.token_hex(16)

    async def body() -> AsyncIterator[bytes]:
        for name, value in fields.items():
            yield f'--{boundary}\r\ncontent-disposition: form-data; name="{name}"\r\n\r\n'.encode() + value + b"\r\n"
        begun = False
        async for piece in file:
            if not begun:
                begun = True
                yield f'--{boundary}\r\ncontent-disposition: form-data; name="file"; filename="file"\r\n\r\n'.encode()
            yield piece
        yield (b"\r\n" if begun else b"") + f"--{boundary}--\r\n".encode()

    return f"multipart/form-data; boundary={boundary}", body()


def as_json(tree: Any) -> bytes:
    """Compact; UTF-8 as it is."""
    return json.dumps(tree, ensure_ascii=False, separators=(",", ":")).encode()
