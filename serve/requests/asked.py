"""What a request asks, before its route looks into it: a body bounded in bytes, depth and time."""

import asyncio
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request

from cluster.door_settings import HttpSettings
from metasepia.digests import digest_of
from metasepia.errors import NotSupported
from serve.requests import arrow, arrow_bodies, bodies
from serve.requests.deadlines import Deadline


@dataclass(frozen=True)
class Asked:
    """A body in plain values, its digest, and the time that it has."""

    tree: dict[str, Any]
    digest: str
    deadline: Deadline
    num_bytes: int = 0
    """Of the body."""

    @classmethod
    async def of(cls, request: Request, http: HttpSettings, rows: arrow_bodies.Shape | None = None) -> "Asked":
        """The body, bounded in bytes, depth and time; JSON, or an Arrow stream where it has `rows`.

        Raises InvalidRequest, BodyTooLarge, DeadlineExceeded, and NotSupported for Arrow where it is not read.
        """
        is_arrow = request.headers.get("content-type", "").partition(";")[0].strip().lower() == arrow.MEDIA_TYPE
        if is_arrow and rows is None:
            raise NotSupported("this body as an Arrow stream", "send JSON")
        deadline = deadline_of(request, http)
        async with deadline.limit("reading the body"):
            body = await bodies.read(request.stream(), request.headers, http.max_body_mib)
        if is_arrow and rows is not None:
            most = http.max_inputs if rows == "input" else http.max_examples + max(http.max_inputs, http.max_unlabelled)
            limits = arrow_bodies.ArrowLimits(max_rows=most, max_depth=http.max_json_depth)
            tree = await asyncio.to_thread(arrow_bodies.parse, body, rows, limits)
        else:
            tree = bodies.parse(body, http.max_json_depth)
        return cls(tree, digest_of(tree), deadline, len(body))


def deadline_of(request: Request, http: HttpSettings) -> Deadline:
    """Counted from now. Raises InvalidRequest for a header that is no number of seconds."""
    return Deadline.of(request.headers, http.request_timeout_s)
