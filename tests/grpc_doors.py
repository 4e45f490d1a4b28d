"""The gRPC door over fakes: a real server on loopback with Serve's own proxy code, and a gateway beside it where the
graph would have one in another process.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from ray.serve._private.grpc_util import get_grpc_response_status, start_grpc_server
from ray.serve._private.proxy import gRPCProxy
from ray.serve._private.proxy_request_response import ResponseStatus, gRPCProxyRequest
from ray.serve.config import gRPCOptions
from ray.serve.grpc_util import gRPCInputStream

from serve.grpc_door import proxy as grpc_proxy
from serve.grpc_door import status as grpc_status
from serve.grpc_door.health import GrpcHealth
from serve.grpc_door.methods import Calls, GrpcDoor
from serve.operations import operations
from serve.protos import metasepia_pb2_grpc
from tests.doors import Bench
from tests.serving import free_port


class NearGateway(GrpcDoor, GrpcHealth):
    """The ingress's gRPC methods."""

    def __init__(self, bench: Bench) -> None:
        self._door, self._max_watchers = bench.door, 2
        self._calls = Calls(bench.app, operations(bench.door))


class NearProxy(gRPCProxy):
    """Serve's proxy, which asks a gateway of this process where it would ask a replica."""

    def __init__(self, gateway: NearGateway) -> None:
        self.gateway = gateway
        self.error: Exception | None = None
        """Raised in place of an answer, as if a replica had died."""

    async def proxy_request(self, proxy_request: gRPCProxyRequest) -> AsyncIterator[Any]:  # type: ignore[override]
        context = proxy_request.ray_serve_grpc_context
        stream = proxy_request.request_iterator
        asked = proxy_request._request_proto if stream is None else gRPCInputStream(stream)
        try:
            if self.error is not None:
                raise self.error
            answer = getattr(self.gateway, proxy_request.method_name)(asked, grpc_context=context)
            if proxy_request.stream:
                async with aclosing(answer) as messages:
                    async for message in messages:
                        context._set_on_grpc_context(proxy_request.context)
                        yield message.SerializeToString()
            else:
                message = await answer
                context._set_on_grpc_context(proxy_request.context)
                yield message.SerializeToString()
            status = ResponseStatus(code=grpc.StatusCode.OK)
        except BaseException as error:
            status = get_grpc_response_status(error, None, "")
        yield status


class GrpcBench:
    """Talks to a bench's door over gRPC."""

    def __init__(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        self.proxy = NearProxy(NearGateway(bench))
        monkeypatch.setenv(grpc_proxy.HOST, "127.0.0.1")
        monkeypatch.setattr("ray.serve._private.default_impl.add_grpc_address", None)
        grpc_proxy.listen_where_told()

    def run(self, talk: Callable[[grpc.aio.Channel], Awaitable[Any]]) -> Any:
        async def main() -> Any:
            options = gRPCOptions(port=free_port(), grpc_servicer_functions=grpc_proxy.FUNCTIONS)
            loop = asyncio.get_running_loop()
            _, server = await start_grpc_server(self.proxy.service_handler_factory, options, event_loop=loop)
            try:
                async with grpc.aio.insecure_channel(f"127.0.0.1:{options.port}") as channel:
                    return await talk(channel)
            finally:
                await server.stop(None)

        return asyncio.run(main())

    def call(self, name: str, asked: Any, **metadata: str) -> Any:
        """The answer of one unary method, or the messages of one that streams."""
        return self.told(name, asked, **metadata)[0]

    def told(self, name: str, asked: Any, **metadata: str) -> tuple[Any, dict[str, Any]]:
        """The same and the trailing metadata."""

        async def talk(channel: grpc.aio.Channel) -> tuple[Any, dict[str, Any]]:
            method = getattr(metasepia_pb2_grpc.MetasepiaStub(channel), name)
            given = [(key.replace("_", "-"), value) for key, value in metadata.items()]
            call = method(asked, metadata=given, timeout=20)
            answer = [one async for one in call] if hasattr(call, "__aiter__") else await call
            return answer, dict(await call.trailing_metadata())

        return self.run(talk)


def details_of(error: grpc.RpcError) -> dict[str, Any]:
    """google.rpc details of an error, by the names of their messages; its status says what the error says."""
    assert isinstance(error, grpc.Call | grpc.aio.AioRpcError)
    raw = dict(error.trailing_metadata() or ())[grpc_status.DETAILS]
    assert isinstance(raw, bytes)
    status = status_pb2.Status.FromString(raw)
    assert (status.code, status.message) == (error.code().value[0], error.details())
    found: dict[str, Any] = {}
    for one in status.details:
        name = one.type_url.rpartition(".")[2]
        found[name] = getattr(error_details_pb2, name)()
        one.Unpack(found[name])
    return found
