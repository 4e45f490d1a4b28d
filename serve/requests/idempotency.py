"""Requests that are answered once: whoever sends an Idempotency-Key again gets the answer that was given before.

The same tenant, key and request (method, path, query, body, kinds of content) get the kept answer, marked
`idempotent-replayed: true`; another request under the key is a conflict; one that still runs is told so. Answers that
ask to be tried again (429, 5xx, 499) and streams that broke off are not kept. A request that changes something is
carried to its end though its client leaves, and its answer is on disk before its client has it whole: so it is not done
twice. Answers are kept by the registry's process (`metasepia.registry.replays`); nothing here is lost with a gateway.
"""

import asyncio
import contextlib
import hashlib
import logging
import re
import uuid
from collections.abc import Awaitable, Iterable, Sequence
from typing import Protocol

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.routing import compile_path
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from actors import meters
from cluster.door_settings import HttpSettings
from metasepia.errors import (
    CorruptArtefact,
    IdempotencyConflict,
    InProgress,
    InvalidRequest,
    MetasepiaError,
    NotSupported,
    Unavailable,
)
from metasepia.registry.replays import Claim, KeptAnswer
from serve.access.principal import current
from serve.operations import Operation
from serve.requests import failures, streaming
from serve.requests.deadlines import Deadline

HEADER = "idempotency-key"
REPLAYED = (b"idempotent-replayed", b"true")
MAX_KEY_CHARS = 255
LEASE_S = 15.0
"""So long after a gateway died its requests may be made again."""
RENEW_S = 5.0
RETRY_AFTER_S = 1.0
STORE_TIMEOUT_S = 5.0
DRAIN_BYTES, DRAIN_S = 1 << 16, 1.0
"""What may be left of a body that its handler did not read to the end, and how long it is waited for."""
OUT_OF_HAND_BYTES = 1 << 20
"""By which a repeated body may be longer than any that is taken, before it is given up as another one."""

_METHODS = ("POST", "PUT", "DELETE")
_PRINTABLE = re.compile(rb"[\x20-\x7e]{1,%d}" % MAX_KEY_CHARS)
_NOT_KEPT = (408, 425, 429, 499)
_OF_ONE_ANSWER = ("content-length", "date", "server", "connection", "transfer-encoding", "x-request-id", "retry-after")
"""Headers that are made anew for each answer."""
_BOUNDARY = re.compile(r"""boundary=(?:"([^"]+)"|([^\s;]+))""", re.IGNORECASE)

logger = logging.getLogger(__name__)


class Replays(Protocol):
    """Where answers are kept. Calls may be repeated; each raises Unavailable, and the first one Overloaded."""

    async def claim_replay(
        self, tenant: str, key: str, holder: str, lease_s: float, /, *, timeout_s: float | None = None
    ) -> Claim: ...

    async def keep_replay(
        self,
        tenant: str,
        key: str,
        holder: str,
        answer: KeptAnswer,
        durable: bool,
        /,
        *,
        timeout_s: float | None = None,
    ) -> bool: ...

    async def let_go_of_replay(
        self, tenant: str, key: str, holder: str, /, *, timeout_s: float | None = None
    ) -> None: ...


class Idempotent:
    """ASGI before the routes, behind the check of keys."""

    def __init__(self, app: ASGIApp, replays: Replays, operations: Sequence[Operation], http: HttpSettings) -> None:
        self._app, self._replays, self._http = app, replays, http
        self._operations = [(compile_path(one.path)[0], one) for one in operations if one.method in _METHODS]
        self._carried: set[asyncio.Task[None]] = set()
        """What runs on though its client has left."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        keys = [value for name, value in scope.get("headers", ()) if name.lower() == HEADER.encode()]
        operation = self._operation(scope) if keys else None
        if operation is None:
            await self._app(scope, receive, send)
            return
        try:
            await self._answered(operation, _checked(keys, operation), scope, receive, send)
        except MetasepiaError as error:
            if isinstance(error, InProgress | IdempotencyConflict):
                outcome = "in_progress" if isinstance(error, InProgress) else "conflict"
                meters.REPLAYS.inc(outcome=outcome)
            said = failures.answer(error)
            await JSONResponse(said.body, said.failure.status, headers=said.headers)(scope, receive, send)

    def _operation(self, scope: Scope) -> Operation | None:
        if scope["type"] != "http" or scope["method"] not in _METHODS:
            return None
        found = (one for path, one in self._operations if one.method == scope["method"] and path.match(scope["path"]))
        return next(found, None)

    async def _answered(self, operation: Operation, key: str, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises our errors only while nothing has been sent."""
        tenant, holder = current().tenant, uuid.uuid4().hex
        try:
            claim = await self._replays.claim_replay(tenant, key, holder, LEASE_S, timeout_s=STORE_TIMEOUT_S)
        except (Unavailable, CorruptArtefact):
            if operation.changes:
                raise
            await self._app(scope, receive, send)  # asked twice, it is answered twice, and nothing is the worse for it
            return
        if claim.answer is not None:
            await self._replay(claim.answer, key, scope, receive, send)
        elif not claim.is_taken:
            raise InProgress(key, min(claim.busy_s, RETRY_AFTER_S))
        else:
            run = _Run(self._replays, (tenant, key, holder), operation, scope, receive, send, self._http)
            if operation.changes:
                await self._carry(run.through(self._app), run)
            else:
                await run.through(self._app)

    async def _carry(self, work: Awaitable[None], run: "_Run") -> None:
        """To its end, also when the client leaves meanwhile."""
        task = asyncio.ensure_future(work)
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            if not task.done():
                run.client_left = True
                self._carried.add(task)
                task.add_done_callback(self._carried.discard)
            raise

    async def _replay(self, kept: KeptAnswer, key: str, scope: Scope, receive: Receive, send: Send) -> None:
        digest = _Digest(scope)
        most = int(max(self._http.max_body_mib, self._http.max_upload_mib) * 2**20) + OUT_OF_HAND_BYTES
        async with Deadline.of(Headers(scope=scope), self._http.request_timeout_s).limit("reading the body"):
            while not (digest.is_whole or digest.is_cut) and digest.num_bytes <= most:
                digest.add(await receive())
        if digest.is_cut:
            return  # nobody waits for an answer any more
        if digest.value() != kept.digest:
            raise IdempotencyConflict(key)
        meters.REPLAYS.inc(outcome="replayed")
        headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in kept.headers]
        headers += [(b"content-length", str(len(kept.body)).encode()), REPLAYED]
        await send({"type": "http.response.start", "status": kept.status, "headers": headers})
        await send({"type": "http.response.body", "body": kept.body})


class _Run:
    """One request that is answered for the first time: its body is digested and its answer gathered as they pass."""

    def __init__(
        self,
        replays: Replays,
        claimed: tuple[str, str, str],
        operation: Operation,
        scope: Scope,
        receive: Receive,
        send: Send,
        http: HttpSettings,
    ) -> None:
        """`claimed`: tenant, key, holder."""
        self._replays, self._claimed, self._operation = replays, claimed, operation
        self._scope, self._receive, self._send = scope, receive, send
        self._max_bytes = int(http.max_replayed_mib * 2**20)
        self._digest = _Digest(scope)
        self._status, self._headers = 0, ()
        self._parts: list[bytes] | None = []
        self._num_bytes = 0
        self._ended = False
        self._broken: list[bool] = []
        self.client_left = False

    async def through(self, app: ASGIApp) -> None:
        renewing = asyncio.create_task(self._renew())
        try:
            with streaming.told_of_breaks() as self._broken:
                await app(self._scope, self._read, self._write)
        finally:
            renewing.cancel()
            if not self._ended:  # cancelled, or broken off: whoever asks again may begin at once
                letting_go = asyncio.create_task(self._let_go())
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.shield(letting_go)

    async def _read(self) -> Message:
        message = await self._receive()
        self._digest.add(message)
        return message

    async def _write(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status, self._headers = message["status"], tuple(message.get("headers", ()))
        elif message["type"] == "http.response.body":
            self._gather(message.get("body", b""))
            if not message.get("more_body", False):
                await self._end()
        if not self.client_left:
            await self._send(message)

    def _gather(self, piece: bytes) -> None:
        self._num_bytes += len(piece)
        if self._num_bytes > self._max_bytes:
            self._parts = None
        if self._parts is not None:
            self._parts.append(piece)

    async def _end(self) -> None:
        """Keeps the answer, before its client has it whole. What cannot be kept is given all the same."""
        self._ended = True
        passing = self._status >= 500 or self._status in _NOT_KEPT or bool(self._broken)
        if passing or self._parts is None or not await self._body_is_whole():
            await self._let_go()
            return
        headers = tuple(
            (name.decode("latin-1"), value.decode("latin-1"))
            for name, value in self._headers
            if name.decode("latin-1").lower() not in _OF_ONE_ANSWER
        )
        answer = KeptAnswer(
            digest=self._digest.value(), status=self._status, headers=headers, body=b"".join(self._parts)
        )
        try:
            kept = await self._replays.keep_replay(
                *self._claimed, answer, self._operation.changes, timeout_s=STORE_TIMEOUT_S
            )
        except MetasepiaError as error:
            kept = False
            logger.warning("an answer could not be kept for its Idempotency-Key: %s", error)
        meters.REPLAYS.inc(outcome="kept" if kept else "lost")

    async def _body_is_whole(self) -> bool:
        """Reads on where a handler had no use for the body. A request that is not known whole cannot be recognised."""
        left = self._digest.num_bytes + DRAIN_BYTES
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_S):
                while not self._digest.is_whole and not self._digest.is_cut and self._digest.num_bytes < left:
                    await self._read()
        return self._digest.is_whole

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(RENEW_S)
            with contextlib.suppress(MetasepiaError):
                await self._replays.claim_replay(*self._claimed, LEASE_S, timeout_s=STORE_TIMEOUT_S)

    async def _let_go(self) -> None:
        with contextlib.suppress(MetasepiaError):  # the claim ends by itself
            await self._replays.let_go_of_replay(*self._claimed, timeout_s=STORE_TIMEOUT_S)


class _Digest:
    """Of one request, as its body comes in. The boundary of a form is left out: each try has its own."""

    def __init__(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        content_type = headers.get("content-type", "")
        found = _BOUNDARY.search(content_type) if content_type.lower().startswith("multipart/") else None
        self._boundary = (found[1] or found[2]).encode("latin-1") if found else b""
        if found:
            content_type = content_type.replace(found[0], "")
        told = (scope["method"], scope["path"], scope.get("query_string", b""), content_type, headers.get("accept", ""))
        self._hash = hashlib.sha256(repr(told).encode())
        self._tail = b""
        self.num_bytes = 0
        self.is_whole = self.is_cut = False

    def add(self, message: Message) -> None:
        if message["type"] != "http.request":
            self.is_cut = not self.is_whole
            return
        piece = message.get("body", b"")
        self.num_bytes += len(piece)
        if self._boundary:
            piece = (self._tail + piece).replace(self._boundary, b"")
            keep = len(self._boundary) - 1
            piece, self._tail = (piece[:-keep], piece[-keep:]) if keep else (piece, b"")
        self._hash.update(piece)
        if not message.get("more_body", False):
            self._hash.update(self._tail)
            self._tail, self.is_whole = b"", True

    def value(self) -> str:
        return self._hash.hexdigest() if self.is_whole else ""


def _checked(keys: Iterable[bytes], operation: Operation) -> str:
    """The key. Raises InvalidRequest, and NotSupported where no answer may be kept."""
    first, *others = keys
    if others:
        raise InvalidRequest(HEADER, "is there more than once; send one key with a request")
    if not _PRINTABLE.fullmatch(first):
        raise InvalidRequest(HEADER, f"must be 1 to {MAX_KEY_CHARS} printable ASCII characters; a UUID serves well")
    if not operation.replayed:
        raise NotSupported(f"an Idempotency-Key for {operation.name}", "its answer is never kept; leave the header out")
    return first.decode("ascii")
