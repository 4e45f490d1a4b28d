"""GET and DELETE /v1/hidden_states/tasks: how the tasks stand whose running centroids the graph keeps."""

import itertools
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from cluster.door_settings import HttpSettings
from metasepia.centroids import ROUTED, CentroidFacts
from metasepia.errors import UnknownName
from metasepia.registry.entries import check_name
from serve.access.principal import current
from serve.parts import Backbone
from serve.requests.asked import deadline_of
from serve.states.observing import Centroids


class ObservedTasks:
    """Answers the routes of /v1/hidden_states/tasks."""

    def __init__(self, http: HttpSettings, backbones: Mapping[str, Backbone], part: Centroids) -> None:
        self._http, self._part = http, part
        self._ids = {one.prepared.digest: id_ for id_, one in backbones.items()}

    async def list(self, request: Request) -> Response:
        """GET /v1/hidden_states/tasks"""
        return JSONResponse({"object": "list", "data": await self._listing(request)})

    async def get(self, request: Request) -> Response:
        """GET /v1/hidden_states/tasks/{task}"""
        name, data = request.path_params["task"], await self._listing(request)
        for one in data:
            if one["id"] == name:
                return JSONResponse(one)
        raise UnknownName("task", name[:80], tuple(one["id"] for one in data))

    async def delete(self, request: Request) -> Response:
        """DELETE /v1/hidden_states/tasks/{task}"""
        name = request.path_params["task"]
        check_name(name.removeprefix(ROUTED), "task")
        async with deadline_of(request, self._http).limit("deleting the task"):
            if not await self._part.forget(current().tenant, name):
                known = {one.key.task for one in await self._part.facts(current().tenant)}
                raise UnknownName("task", name[:80], tuple(sorted(known)))
        return JSONResponse({"id": name, "object": "hidden_states.task.deleted", "deleted": True})

    async def _listing(self, request: Request) -> "list[dict[str, Any]]":
        async with deadline_of(request, self._http).limit("listing the tasks"):
            facts = await self._part.facts(current().tenant)
        by_task = itertools.groupby(sorted(facts, key=lambda one: one.key.task), key=lambda one: one.key.task)
        return [
            {
                "id": task,
                "object": "hidden_states.task",
                "centroids": [{"backbone": self._ids.get(one.key.backbone)} | facts_json(one) for one in group],
            }
            for task, group in by_task
        ]


def facts_json(facts: CentroidFacts) -> dict[str, Any]:
    """A centroid without its vectors."""
    return {
        "expert": facts.key.adapter or None,
        "layer": facts.key.layer,
        "pooling": facts.key.pooling,
        "count": facts.count,
        "spread": facts.spread,
        "drift": facts.drift,
        "drift_by_chance": facts.chance,
        "separation": facts.separation,
    }
