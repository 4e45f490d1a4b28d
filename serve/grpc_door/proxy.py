"""The gRPC door's part in Serve's proxy: which services there are, and what the proxy says by itself in typed statuses.

It runs inside the proxy process, as `serve.proxy.envelope` does for HTTP. Serve registers services by the functions of
`FUNCTIONS`, and its proxy makes each method pass its bytes on to the gateway. Around that stands here what the gateway
cannot see or do: how long the client will wait, a client that leaves between two messages of a stream, the message that
only carries a status, and the statuses of a request that never reached a gateway.
"""

import asyncio
import os
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any, Protocol

import grpc
from grpc_health.v1 import health_pb2
from ray.serve._private import default_impl
from ray.serve._private.proxy_request_response import gRPCStreamingType

from serve.grpc_door import status as grpc_status
from serve.protos import metasepia_pb2 as pb
from serve.requests import ids as request_ids
from serve.requests.deadlines import HEADER, MAX_TIMEOUT_S

FUNCTIONS = ["serve.grpc_door.proxy.add_services"]
HOST = "GRPC_HOST_OF_METASEPIA"
"""Environment variable: the address that the proxy listens on. Serve's own is every interface."""
SERVICES = (pb.DESCRIPTOR.services_by_name["Metasepia"], health_pb2.DESCRIPTOR.services_by_name["Health"])

Handler = Callable[[Any, Any], Any]

_OWN = {
    grpc.StatusCode.NOT_FOUND: (
        grpc.StatusCode.UNAVAILABLE,
        "unavailable",
        503,
        2.0,
        "the gateway is starting or down",
    ),
    grpc.StatusCode.UNAVAILABLE: (grpc.StatusCode.UNAVAILABLE, "unavailable", 503, 2.0, "the gateway is down"),
    grpc.StatusCode.INTERNAL: (grpc.StatusCode.UNAVAILABLE, "unavailable", 503, 2.0, "the gateway did not answer"),
    grpc.StatusCode.RESOURCE_EXHAUSTED: (
        *(grpc.StatusCode.RESOURCE_EXHAUSTED, "overloaded", 429, 1.0),
        "too many requests are waiting",
    ),
}
"""The proxy's own status to ours: (code, reason, HTTP status, seconds until another try, text)."""


class Server(Protocol):
    """What Serve gives to those who register services."""

    service_handler_factory: Callable[..., Handler]

    def add_generic_rpc_handlers(self, generic_rpc_handlers: Sequence[grpc.GenericRpcHandler]) -> None: ...


def listen_where_told() -> None:
    """Makes the proxy that is about to start in this process listen on `HOST`. Without that variable Serve's way holds.

    Serve has no setting for it; `add_grpc_address` is where it can be told, and `serve.main` looks whether it worked.
    """
    host = os.environ.get(HOST)
    if not host:
        return
    spelt = f"[{host}]" if ":" in host else host

    def add_grpc_address(server: Any, address: str) -> None:
        server.add_insecure_port(f"{spelt}:{address.rpartition(':')[2]}")

    default_impl.add_grpc_address = add_grpc_address


def add_services(_servicer: object, server: Server) -> None:
    """Registers all services. Bytes stay bytes in the proxy: the gateway says in words what is wrong with them."""
    serves = server.service_handler_factory
    server.service_handler_factory = _around(serves)
    try:
        for service in SERVICES:
            empty = {method.name: _empty(method) for method in service.methods}  # Serve puts its own calls in
            server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service.full_name, empty),))
    finally:
        server.service_handler_factory = serves


def _empty(method: Any) -> grpc.RpcMethodHandler:
    """Of a method's descriptor: whether requests and answers stream, and that bytes stay bytes."""
    made: Any = grpc.unary_stream_rpc_method_handler if method.server_streaming else grpc.unary_unary_rpc_method_handler
    made = grpc.stream_unary_rpc_method_handler if method.client_streaming else made
    return made(None)


def _around(serves: Callable[..., Handler]) -> Callable[..., Handler]:
    def made(*, service_method: str, streaming_type: gRPCStreamingType) -> Handler:
        inner = serves(service_method=service_method, streaming_type=streaming_type)

        async def unary(asked: Any, context: Any) -> bytes:
            seen = Context(context)
            answer = await inner(asked, seen)
            _explain(seen)
            return answer

        async def stream(asked: Any, context: Any) -> AsyncGenerator[bytes]:
            seen = Context(context)
            answers, at_end = inner(asked, seen), False
            try:
                async for answer in answers:
                    if not seen.code():  # else the message only brought the status
                        yield answer
                at_end = True
            finally:
                if not at_end:
                    await _leave(answers)
            _explain(seen)

        return stream if streaming_type.endswith("_stream") else unary

    return made


class Context:
    """The call's context for Serve, with metadata that also say when the client's deadline is, and the one id that the
    request has in Serve's logs as in ours. Serve itself reads neither grpc-timeout nor x-request-id.
    """

    def __init__(self, context: Any) -> None:
        self._context = context
        # Asked of a call that has ended, grpc reads freed memory; and Serve's access log asks after clients have left.
        self._peer: str = context.peer()
        given: list[tuple[str, str]] = list(context.invocation_metadata() or ())
        told = dict(given)
        left_s: float | None = context.time_remaining()
        if left_s is not None and left_s < _seconds(told.get(HEADER)):
            left_s = min(max(left_s, 0.001), MAX_TIMEOUT_S)
            given = [(key, value) for key, value in given if key != HEADER] + [(HEADER, f"{left_s:.3f}")]
        asked = told.get(request_ids.HEADER)
        request_id = request_ids.id_of([] if asked is None else [(request_ids.HEADER.encode(), asked.encode())])
        given = [(key, value) for key, value in given if key not in (request_ids.HEADER, "request_id")]
        self._given = (*given, (request_ids.HEADER, request_id), ("request_id", request_id))

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return self._given

    def peer(self) -> str:
        return self._peer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)


def _seconds(text: str | None) -> float:
    """Infinite for none; the gateway refuses what is no number, so that it must reach it."""
    try:
        return float("inf") if text is None else float(text)
    except ValueError:
        return 0.0


async def _leave(answers: AsyncGenerator[bytes]) -> None:
    """Has Serve tell the replica that the client has gone. It does so only where that happens while it awaits the next
    message, and we are between two of them: so it is made to await once more.
    """
    while True:
        waiting = asyncio.ensure_future(anext(answers, None))
        await asyncio.sleep(0)
        waiting.cancel()
        (answer,) = await asyncio.gather(waiting, return_exceptions=True)
        if not isinstance(answer, bytes):
            return


def _explain(context: Context) -> None:
    """Details for a status that no gateway has set."""
    told: list[tuple[str, Any]] = list(context.trailing_metadata() or ())
    found = _OWN.get(context.code())
    if found is None or any(key == grpc_status.DETAILS for key, _ in told):
        return
    code, reason, status, retry_after_s, text = found
    text += "; try again soon"
    details = grpc_status.details(code, text, reason=reason, http_status=status, retry_after_s=retry_after_s)
    context.set_code(code)
    context.set_details(text)
    context.set_trailing_metadata((*told, (grpc_status.DETAILS, details)))
