"""GET /v1/jobs: long works of the caller's tenant in one list: Ray jobs, few-shot searches, tasks that ask models.

Nothing is submitted here: a Ray job is code with all the cluster's rights, and whoever may start one has Ray's own
token (`python -m jobs.submit`). A Ray job is its tenant's by the metadata that `jobs.submit --tenant` gave it; one
without is the tenant's `local`. Ray tells of its jobs through its dashboard alone: where it is off, the list says so.
"""

import asyncio
import builtins
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import ray
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from cluster.door_settings import HttpSettings
from metasepia.errors import InvalidRequest, Unavailable, UnknownName
from metasepia.registry.entries import LOCAL, Artefact
from serve.access.principal import current
from serve.contexts.named import number_of
from serve.experts.searching import Searches
from serve.parts import Catalogue
from serve.requests.asked import deadline_of
from serve.shared import Shared

KINDS = ("ray", "search", "task")
MAX_MESSAGE_CHARS = 500
FRESH_S = 2.0
"""Ray's list this young is given again: the dashboard makes it anew each time, from all jobs that it ever had."""
_STATUS = {
    "PENDING": "queued",
    "RUNNING": "running",
    "SUCCEEDED": "succeeded",
    "FAILED": "failed",
    "STOPPED": "stopped",
    "queued": "queued",
    "running": "running",
    "done": "succeeded",
    "failed": "failed",
    "cancelled": "stopped",
}

Json = dict[str, Any]


class RayJobs(Protocol):
    """Every job that was submitted to the cluster, as our JSON, each with its `tenant`."""

    def __call__(self) -> Sequence[Json]:
        """Blocks. Raises Unavailable where no dashboard answers."""
        ...


class JobRoutes:
    """Reads only."""

    def __init__(self, http: HttpSettings, searches: Searches, catalogue: Catalogue, ray_jobs: RayJobs) -> None:
        self._http, self._searches, self._catalogue = http, searches, catalogue
        self._fresh = _Fresh(ray_jobs)

    async def list(self, request: Request) -> Response:
        limit = number_of(request.query_params, "limit", 100, 1, 200)
        kind = request.query_params.get("kind")
        if kind is not None and kind not in KINDS:
            raise InvalidRequest("kind", f"must be one of {', '.join(KINDS)}")
        async with deadline_of(request, self._http).limit("listing the jobs"):
            jobs, told = await self._all(kind)
        jobs.sort(key=lambda one: (-one["created_unix_s"], one["id"]))
        return JSONResponse({"object": "list", "data": jobs[:limit], "has_more": len(jobs) > limit, "ray": told})

    async def get(self, request: Request) -> Response:
        """Another tenant's job is as unknown as one that is not there."""
        id_ = request.path_params["id"]
        async with deadline_of(request, self._http).limit("reading the job"):
            jobs, told = await self._all(None)
        for one in jobs:
            if one["id"] == id_:
                return JSONResponse(one)
        if not told["available"]:
            raise Unavailable(f"the job {id_[:80]!r}, if it is one of Ray's ({told['reason']}),", 30.0)
        raise UnknownName("job", id_[:80], tuple(one["id"] for one in jobs[:20]))

    async def _all(self, kind: str | None) -> "tuple[builtins.list[Json], Json]":
        tenant, told = current().tenant, {"available": True, "reason": None}
        jobs: builtins.list[Json] = []
        if kind in (None, "ray"):
            try:
                listed = await self._fresh()
                jobs += [{k: v for k, v in one.items() if k != "tenant"} for one in listed if one["tenant"] == tenant]
            except Unavailable as error:
                if kind == "ray":
                    raise
                told = {"available": False, "reason": str(error)}
        if kind in (None, "search"):
            jobs += [_search_json(one) for one in await self._searches.listing(tenant)]
        if kind in (None, "task"):
            found = await self._catalogue.list("embedding", tenant, limit=1000)
            jobs += [_task_json(one) for one in found if one.owner == tenant and one.card.get("kind") != "data_set"]
        return jobs, told


class _Fresh:
    """Ray's list, asked for once for all who want it at the same time."""

    def __init__(self, ask: RayJobs, clock: Callable[[], float] = time.monotonic) -> None:
        self._ask, self._clock = ask, clock
        self._asked = Shared(self._listed)  # a dashboard that hangs holds one thread, however many ask
        self._last: tuple[float, Sequence[Json]] = (float("-inf"), ())

    async def __call__(self) -> Sequence[Json]:
        return await self._asked() if self._clock() - self._last[0] > FRESH_S else self._last[1]

    async def _listed(self) -> Sequence[Json]:
        jobs = await asyncio.to_thread(self._ask)
        self._last = (self._clock(), jobs)
        return jobs


def submitted_jobs() -> list[Json]:
    """See `RayJobs`; of the cluster that this process belongs to."""
    # Here and not above: a gateway nobody asks for jobs does without.
    from ray.job_submission import JobSubmissionClient

    try:
        found = JobSubmissionClient(ray.get_runtime_context().gcs_address).list_jobs()
    except Exception as error:  # whatever a dashboard that is off, restarting or another's makes of it
        words = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise Unavailable(f"Ray's list of jobs (its dashboard does not answer; ray.dashboard: {words})", 30.0) from None
    return [_ray_json(one) for one in found if one.submission_id]


def _ray_json(job: Any) -> Json:
    metadata: Mapping[str, str] = job.metadata or {}
    made = _job(
        job.submission_id,
        "ray",
        metadata.get("job") or job.submission_id,
        str(job.status.value),
        (job.start_time or 0) / 1000,
        began=(job.start_time or 0) / 1000 or None,
        ended=(job.end_time or 0) / 1000 or None,
        message=job.message,
    )
    return {**made, "tenant": metadata.get("tenant", LOCAL)}


def _search_json(search: Json) -> Json:
    progress = {"done": search["generations"], "total": search["max_generations"]}
    created, error = float(search["created_unix_s"]), search["error"]
    return _job(search["id"], "search", "mixture search", search["status"], created, progress=progress, message=error)


def _task_json(found: Artefact) -> Json:
    card: Json = found.card  # pyright: ignore[reportAssignmentType]
    asked: Json | None = card.get("progress")
    progress = None if asked is None else {"done": asked["answered"], "total": asked["of"]}
    created, error = found.created_unix_s, card.get("error")
    return _job(found.name, "task", "task embedding", card["status"], created, progress=progress, message=error)


def _job(
    id_: str,
    kind: str,
    name: str,
    status: str,
    created: float,
    *,
    began: float | None = None,
    ended: float | None = None,
    progress: Json | None = None,
    message: object = None,
) -> Json:
    """Times are seconds of the epoch; null where nobody wrote them down."""
    return {
        "id": id_,
        "object": "job",
        "kind": kind,
        "name": name,
        "status": _STATUS[status],
        "created_unix_s": round(created, 3),
        "started_unix_s": began,
        "ended_unix_s": ended,
        "progress": progress,
        "message": None if message is None else str(message)[:MAX_MESSAGE_CHARS],
    }
