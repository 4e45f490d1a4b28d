"""The door's calls over gRPC: each goes through the application that answers HTTP, in this process.

A method is an operation of `serve.operations` under the same name. Its message becomes the body, path and query of a
request, metadata its headers; the answer's JSON, server-sent events or bytes become messages, and an error's envelope a
status. So keys, quotas, replays, admission, meters and errors are one path. What comes before the gateway, in Serve's
proxy, is `serve.grpc_door.proxy`.
"""

import json
import re
import urllib.parse
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf import message_factory
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import DecodeError, Message
from ray.serve.grpc_util import RayServegRPCContext, gRPCInputStream
from starlette.routing import compile_path
from starlette.types import ASGIApp

from metasepia.errors import InvalidRequest
from serve.grpc_door import status as grpc_status
from serve.grpc_door.exchange import Request, as_json, begun, multipart, whole
from serve.grpc_door.messages import message_of, tree_of
from serve.operations import Operation
from serve.protos import metasepia_pb2 as pb
from serve.requests import failures
from serve.requests import ids as request_ids
from serve.requests.arrow import MEDIA_TYPE as ARROW

SERVICE = pb.DESCRIPTOR.services_by_name["Metasepia"]
JSON = "application/json"
CONTENT_BYTES = 1 << 20
"""Of one message of a file; clients take up to 4 MiB by default."""

_FAILURES = {one.code: one for one in (*failures.TABLE.values(), failures.UNEXPECTED)}
_BY_STATUS = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    404: grpc.StatusCode.UNIMPLEMENTED,
    405: grpc.StatusCode.UNIMPLEMENTED,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
}
"""Of errors that are in no table: no such route."""

_FRAMING = frozenset(
    [
        *("accept", "accept-encoding", "connection", "content-encoding", "content-length", "content-type", "expect"),
        *("host", "te", "trailer", "transfer-encoding", "upgrade"),
    ]
)
"""Headers that say how a body is sent; a client's metadata cannot."""
_NOT_TOLD = _FRAMING | {"cache-control", "content-disposition", "date", "server", "vary"}


@dataclass(frozen=True)
class Variant:
    """A method whose answer streams; over HTTP the same path, by what the request says."""

    of: str
    accept: str
    body: Mapping[str, Any]


VARIANTS = {
    "StreamChatCompletion": Variant("CreateChatCompletion", "text/event-stream", {"stream": True}),
    "StreamCompletion": Variant("CreateCompletion", "text/event-stream", {"stream": True}),
    "StreamHiddenStates": Variant("CreateHiddenStates", ARROW, {}),
}
_BASE64 = {"encoding_format": "base64"}
_EXTRA = {"CreateEmbeddings": _BASE64, "CreateHiddenStates": _BASE64}
"""Fields that a method always asks with; base64 becomes packed floats without a parse of each number."""


@dataclass(frozen=True)
class Call:
    """One method: how it asks the application."""

    method: MethodDescriptor
    operation: Operation
    accept: str
    extra: Mapping[str, Any]
    before: tuple[re.Pattern[str], ...]
    """Paths that another operation of the same HTTP method answers, though they match this one's too."""

    def answer(self, tree: Any = None) -> Message:
        """The answer's message; an empty one for no tree."""
        kind = message_factory.GetMessageClass(self.method.output_type)
        return kind() if tree is None else message_of(kind, tree)

    def read(self, request: bytes | Message) -> Any:
        """Raises InvalidRequest for bytes that are no message of this kind."""
        if isinstance(request, Message):
            return request
        kind = self.method.input_type
        try:
            return message_factory.GetMessageClass(kind).FromString(request)
        except DecodeError:
            raise InvalidRequest("message", f"these bytes are no {kind.full_name}") from None

    def path(self, tree: dict[str, Any]) -> str:
        """With fields of the request in it, which it takes out of `tree`. Raises InvalidRequest naming the field."""
        name = ""

        def filled(found: re.Match[str]) -> str:
            nonlocal name
            name = found[1]
            value = tree.pop(name, "")
            if not value:
                raise InvalidRequest(name, "this field is required")
            if "/" in value and not found[2]:
                raise InvalidRequest(name, f"{value[:80]!r} has a slash, as no name here has")
            return value

        path = re.sub(r"{(\w+)(:path)?}", filled, self.operation.path)
        if any(one.match(path) for one in self.before):
            raise InvalidRequest(name, f"{path} is another call's path")
        return path

    def request(self, asked: bytes | Message, context: RayServegRPCContext) -> Request:
        """Raises InvalidRequest."""
        tree: dict[str, Any] = tree_of(self.read(asked))
        path, method, headers, query, body = self.path(tree), self.operation.method, self._headers(context), b"", b""
        if method in ("GET", "DELETE"):
            query = urllib.parse.urlencode(tree).encode()
        else:
            body = as_json({**tree, **self.extra})
            headers += [("content-type", JSON), ("content-length", str(len(body)))]
        return Request(method=method, path=path, query=query, headers=headers, body=body, peer=context.peer())

    async def upload(self, stream: gRPCInputStream[Any], context: RayServegRPCContext) -> Request:
        """Raises InvalidRequest for a first message that is none; what follows it is read as it is asked for."""
        first = self.read(await anext(stream, b""))
        fields = {name: getattr(first, name) for name in ("name", "backbone", "config") if first.HasField(name)}
        path = self.path(fields)
        if first.HasField("card"):
            fields["card"] = as_json(tree_of(first.card))
        parts = {name: value if isinstance(value, bytes) else value.encode() for name, value in fields.items()}

        async def file() -> AsyncIterator[bytes]:
            if first.HasField("file"):
                yield first.file
            async for message in stream:
                piece = self.read(message)
                if [one.name for one, _ in piece.ListFields()] != ["file"]:
                    raise InvalidRequest("message", "only `file` goes on after the first message")
                yield piece.file
            if stream.is_cancelled():
                raise ConnectionError

        kind, body = multipart(parts, file())
        headers = [*self._headers(context), ("content-type", kind)]
        return Request(method=self.operation.method, path=path, headers=headers, body=body, peer=context.peer())

    def _headers(self, context: RayServegRPCContext) -> list[tuple[str, str]]:
        """The client's metadata, but for what says how bytes are sent."""
        given = [
            (key, value)
            for key, value in context.invocation_metadata()
            if isinstance(value, str) and key not in _FRAMING and not key.startswith("grpc-")
        ]
        return [*given, ("accept", self.accept)]


def calls_of(operations: Sequence[Operation]) -> dict[str, Call]:
    """Every method of the service by its name. Raises KeyError for one that no operation stands behind."""
    table = {one.name: one for one in operations}
    found: dict[str, Call] = {}
    for method in SERVICE.methods:
        variant = VARIANTS.get(method.name, Variant(method.name, JSON, _EXTRA.get(method.name, {})))
        operation = table[variant.of]
        earlier = operations[: operations.index(operation)]
        before = tuple(compile_path(one.path)[0] for one in earlier if one.method == operation.method)
        found[method.name] = Call(method, operation, variant.accept, variant.body, before)
    return found


class Calls:
    """Asks an application what methods ask."""

    def __init__(self, app: ASGIApp, operations: Sequence[Operation]) -> None:
        self._app, self._calls = app, calls_of(operations)

    async def unary(self, name: str, asked: Any, context: RayServegRPCContext) -> Message:
        """The answer; an empty one where the context says why there is none.

        `asked` is the message, its bytes, or of an upload the stream of either.
        """
        call = self._calls[name]
        try:
            is_upload = isinstance(asked, gRPCInputStream)
            request = await call.upload(asked, context) if is_upload else call.request(asked, context)
        except InvalidRequest as error:
            return _refused(call, failures.answer(error).body, 400, {}, context)
        status, headers, body = await whole(self._app, request)
        _tell(context, headers)
        if status >= 400:
            return _refused(call, body, status, headers, context)
        return call.answer(json.loads(body))

    async def stream(self, name: str, asked: Any, context: RayServegRPCContext) -> AsyncGenerator[Message]:
        """The answer's messages. An error is one more, empty, with a context that says so; the proxy drops it."""
        call = self._calls[name]
        try:
            request = call.request(asked, context)
        except InvalidRequest as error:
            yield _refused(call, failures.answer(error).body, 400, {}, context)
            return
        async with begun(self._app, request) as answer:
            _tell(context, answer.headers)
            if answer.status >= 400:
                body = b"".join([chunk async for chunk in answer.chunks])
                yield _refused(call, body, answer.status, answer.headers, context)
            elif call.method.output_type is pb.Content.DESCRIPTOR:
                async for piece in _pieces(answer.chunks, answer.headers):
                    yield piece
            else:
                async for event in _events(answer.chunks):
                    if "error" in event:
                        yield _refused(call, event, 500, answer.headers, context)
                        return
                    yield call.answer(event)


class GrpcDoor:
    """What the ingress has of gRPC: a method for each of the service's."""

    _calls: Calls
    """Who mixes this in sets it."""


def _method(method: MethodDescriptor) -> Callable[..., Any]:
    name = method.name

    async def unary(self: GrpcDoor, asked: Any, grpc_context: RayServegRPCContext) -> Message:
        return await self._calls.unary(name, asked, grpc_context)

    async def stream(self: GrpcDoor, asked: Any, grpc_context: RayServegRPCContext) -> AsyncGenerator[Message]:
        async with aclosing(self._calls.stream(name, asked, grpc_context)) as messages:
            async for message in messages:
                yield message

    return stream if method.server_streaming else unary


for _one in SERVICE.methods:
    setattr(GrpcDoor, _one.name, _method(_one))


def _tell(context: RayServegRPCContext, headers: Mapping[str, str]) -> None:
    """What an answer's headers say, as trailing metadata."""
    context.set_trailing_metadata(
        [(key, value) for key, value in headers.items() if key not in _NOT_TOLD and value.isascii()]
    )


def _refused(
    call: Call,
    answer: bytes | Mapping[str, Any],
    status: int,
    headers: Mapping[str, str],
    context: RayServegRPCContext,
) -> Message:
    """Sets the status that an envelope stands for; the message that goes with it is empty."""
    error = (json.loads(answer) if isinstance(answer, bytes) else answer)["error"]
    reason, delay = str(error["code"]), headers.get("retry-after", "")
    failure = _FAILURES.get(reason)
    code = failure.grpc if failure else _BY_STATUS.get(status, grpc.StatusCode.UNKNOWN)
    text = grpc_status.cut(str(error["message"]))
    details = grpc_status.details(
        code,
        text,
        reason=reason,
        http_status=failure.status if failure else status,
        param=None if error["param"] is None else str(error["param"])[:200],
        retry_after_s=float(delay) if delay.isdigit() else None,
        request_id=headers.get(request_ids.HEADER, ""),
    )
    context.set_code(code)
    context.set_details(text)
    context.set_trailing_metadata([*context.trailing_metadata(), (grpc_status.DETAILS, details)])  # type: ignore[list-item]
    return call.answer()


async def _pieces(chunks: AsyncIterator[bytes], headers: Mapping[str, str]) -> AsyncIterator[Message]:
    """A body as messages of bounded size; one at least, since the first tells what it is."""
    about: dict[str, Any] = {
        "content_type": headers.get("content-type", ""),
        "etag": headers.get("etag", "").strip('"'),
    }
    async for chunk in chunks:
        for begin in range(0, len(chunk), CONTENT_BYTES):
            yield pb.Content(**about, data=chunk[begin : begin + CONTENT_BYTES])
            about = {}
    if about:
        yield pb.Content(**about)


async def _events(chunks: AsyncIterator[bytes]) -> AsyncIterator[dict[str, Any]]:
    """The JSON of server-sent events, up to [DONE]."""
    rest = b""
    async for chunk in chunks:
        *events, rest = (rest + chunk).split(b"\n\n")
        for event in events:
            data = event.removeprefix(b"data: ")
            if data != b"[DONE]":
                yield json.loads(data)
