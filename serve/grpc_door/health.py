"""grpc.health.v1 on the ingress: what GET /health says, to clients and probes that know gRPC alone."""

import asyncio
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.message import DecodeError, Message
from grpc_health.v1 import health_pb2
from ray.serve.grpc_util import RayServegRPCContext

from serve.grpc_door import status as grpc_status
from serve.protos import metasepia_pb2 as pb

if TYPE_CHECKING:
    from serve.door import Door

Response = health_pb2.HealthCheckResponse
ListResponse: Any = getattr(health_pb2, "HealthListResponse")  # noqa: B009 (newer than its types)

SERVICES = ("", pb.DESCRIPTOR.services_by_name["Metasepia"].full_name)
"""The whole server, and its one service."""
LOOK_S = 2.0
"""Between two looks of a watcher; whoever looks at the same time shares one."""


class GrpcHealth:
    """What the ingress has of grpc.health.v1.Health."""

    _door: "Door"
    """Who mixes this in sets these."""
    _max_watchers: int
    _watchers = 0

    async def Check(self, asked: bytes | health_pb2.HealthCheckRequest, grpc_context: RayServegRPCContext) -> Response:
        """NOT_FOUND for a service that is not here, as the protocol has it."""
        service = _service(asked)
        if service not in SERVICES:
            _refuse(grpc_context, grpc.StatusCode.NOT_FOUND, f"no service named {service!r:.80}", "unknown_service")
            return Response()
        return Response(status=await self._status())

    async def List(self, asked: bytes | Message, grpc_context: RayServegRPCContext) -> Message:
        status = await self._status()
        return ListResponse(statuses={name: Response(status=status) for name in SERVICES})

    async def Watch(
        self, asked: bytes | health_pb2.HealthCheckRequest, grpc_context: RayServegRPCContext
    ) -> AsyncGenerator[Response]:
        """The status, and again whenever it changes. RESOURCE_EXHAUSTED beyond `grpc.max_watchers` streams."""
        service = _service(asked)
        if self._watchers >= self._max_watchers:
            text = f"{self._watchers} watch already (grpc.max_watchers); call Check now and then"
            _refuse(grpc_context, grpc.StatusCode.RESOURCE_EXHAUSTED, text, "overloaded", retry_after_s=60.0)
            yield Response()
            return
        self._watchers += 1
        try:
            told, ending = None, False
            while not ending:
                ending = self._door.drain.begun
                status = await self._status() if service in SERVICES else Response.SERVICE_UNKNOWN
                if status != told:
                    told = status
                    yield Response(status=status)
                await asyncio.sleep(0 if ending else LOOK_S)
        finally:
            self._watchers -= 1

    async def _status(self) -> Response.ServingStatus:
        if self._door.drain.begun:
            return Response.NOT_SERVING
        report = await self._door.health_of_parts.report()
        return Response.SERVING if report.ready else Response.NOT_SERVING


def _service(asked: bytes | health_pb2.HealthCheckRequest) -> str:
    """Bytes that are no message name no service that is here."""
    if isinstance(asked, bytes):
        try:
            asked = health_pb2.HealthCheckRequest.FromString(asked)
        except DecodeError:
            return "(no message)"
    return asked.service


def _refuse(
    context: RayServegRPCContext, code: grpc.StatusCode, text: str, reason: str, retry_after_s: float | None = None
) -> None:
    status = 404 if code == grpc.StatusCode.NOT_FOUND else 429
    details = grpc_status.details(code, text, reason=reason, http_status=status, retry_after_s=retry_after_s)
    context.set_code(code)
    context.set_details(text)
    context.set_trailing_metadata([(grpc_status.DETAILS, details)])  # type: ignore[list-item]
