"""The Serve ingress: a door over Serve's handles. No torch is loaded here (a test looks)."""

from collections.abc import Mapping
from typing import Any

from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from actors.registry import RegistryClient
from cluster.settings import Settings
from serve import prepare, shipped
from serve.accepting import Fits
from serve.admission import Admission, widths
from serve.app import create_app
from serve.door import Door
from serve.observing import ServedCentroids
from serve.parts import ServedBackbone, ServedEncoder, ServedMixing, ServedReasoning
from serve.searching import ServedSearches
from serve.task_part import ServedTasks


class Gateway:
    """A door over Serve's handles; `graph.py` makes it the ingress."""

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
        prepared = prepare.ready(settings)
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
            Admission(settings.admission, widths(settings)),
        )

    async def drain(self, budget_s: float) -> int:
        """For `serve.main`, of every gateway: `Drain.run`."""
        return await self._door.drain.run(budget_s)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return create_app(self._door)
