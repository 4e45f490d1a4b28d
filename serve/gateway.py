"""The Serve ingress: a door over Serve's handles. No torch is loaded here (a test looks)."""

from collections.abc import Mapping
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ReplicaState
from starlette.types import ASGIApp

from actors import heap, logs
from actors.registry import RegistryClient
from cluster.settings import Settings
from serve import prepare, shipped
from serve.access.authentication import Access
from serve.app import create_app
from serve.door import Door
from serve.experts.accepting import Fits
from serve.experts.searching import ServedSearches
from serve.grpc_door.health import GrpcHealth
from serve.grpc_door.methods import Calls, GrpcDoor
from serve.load.admission import Admission, widths
from serve.operations import operations
from serve.parts import ServedBackbone, ServedEncoder, ServedMixing, ServedReasoning
from serve.states.observing import ServedCentroids
from serve.tasks.part import ServedTasks


class Gateway(GrpcDoor, GrpcHealth):
    """A door over Serve's handles; `graph.py` makes it the ingress, of HTTP and gRPC."""

    def __init__(
        self,
        settings: Settings,
        backbones: Mapping[str, DeploymentHandle[Any]],
        encoders: Mapping[str, DeploymentHandle[Any]],
        reasoning: DeploymentHandle[Any],
        mixing: DeploymentHandle[Any],
        tasks: DeploymentHandle[Any],
        registry: RegistryClient,
    ) -> None:
        """Handles of backbones and encoders by their ids. Raises as `prepare.ready` and `shipped.module_cards` do."""
        logs.begin()
        heap.give_back_for_ever()
        prepared = prepare.ready(settings)
        self._max_watchers = settings.grpc.max_watchers
        self._registry = registry
        self._door = Door(
            settings.http,
            [ServedBackbone(id_, prepared[id_], handle) for id_, handle in backbones.items()],
            [ServedEncoder(id_, handle) for id_, handle in encoders.items()],
            ServedReasoning(shipped.module_cards(settings.reasoning.modules), reasoning),
            ServedMixing(mixing),
            ServedSearches(mixing),
            registry,
            settings.dispatch,
            settings.dispatch_margins,
            {one.id: Fits.of(one, prepared[one.id], settings.home) for one in settings.backbones},
            ServedCentroids(mixing),
            settings.centroids,
            ServedTasks(tasks),
            settings.tasks,
            Admission(settings.admission, widths(settings), replicas=_running),
            Access(settings.keys, registry),
        )

    async def waiting_tokens(self, part: str) -> float:
        """For the part's own autoscaling."""
        return self._door.admission.waiting_tokens(part)

    async def drain(self, budget_s: float) -> int:
        """For `serve.main`, of every gateway: `Drain.run`."""
        left = await self._door.drain.run(budget_s)
        await self._door.access.close()
        return left

    def __serve_build_asgi_app__(self) -> ASGIApp:
        app = create_app(self._door, self._registry)
        self._calls = Calls(app, operations(self._door))
        return app


def _running() -> dict[str, int]:
    """How many replicas of each backbone and encoder serve, by its id. Asks Serve's controller."""
    found: dict[str, int] = {}
    for application in serve.status().applications.values():
        for name, one in application.deployments.items():
            kind, _, id_ = name.partition("-")
            if kind in ("backbone", "encoder"):
                found[id_] = one.replica_states.get(ReplicaState.RUNNING, 0)
    return found
