"""What a request asks, before its route looks into it: a body bounded in bytes, depth and time."""

from dataclasses import dataclass
from typing import Any

from starlette.requests import Request

from cluster.door_settings import HttpSettings
from metasepia.digests import digest_of
from serve import bodies
from serve.deadlines import Deadline


@dataclass(frozen=True)
class Asked:
    """A body in plain values, its digest, and the time that it has."""

    tree: dict[str, Any]
    digest: str
    deadline: Deadline
    num_bytes: int = 0
    """Of the body."""

    @classmethod
    async def of(cls, request: Request, http: HttpSettings) -> "Asked":
        """The body, bounded in bytes, depth and time. Raises InvalidRequest, BodyTooLarge and DeadlineExceeded."""
        deadline = deadline_of(request, http)
        async with deadline.limit("reading the body"):
            body = await bodies.read(request.stream(), request.headers, http.max_body_mib)
        tree = bodies.parse(body, http.max_json_depth)
        return cls(tree, digest_of(tree), deadline, len(body))


def deadline_of(request: Request, http: HttpSettings) -> Deadline:
    """Counted from now. Raises InvalidRequest for a header that is no number of seconds."""
    return Deadline.of(request.headers, http.request_timeout_s)
