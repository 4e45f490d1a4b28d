"""The Serve ingress: a door over Serve's handles. No torch is loaded here (a test looks)."""

from collections.abc import Mapping, Sequence
from typing import Any

from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from cluster.door_settings import HttpSettings
from cluster.settings import CentroidSettings, DispatchMargins, TaskSettings
from metasepia.models.prepared import PreparedBackbone
from serve.accepting import Fits
from serve.app import create_app
from serve.door import Door
from serve.observing import ServedCentroids
from serve.parts import (
    Catalogue,
    ServedBackbone,
    ServedEncoder,
    ServedMixing,
    ServedReasoning,
)
from serve.searching import ServedSearches
from serve.shipped import ModuleCard
from serve.task_part import ServedTasks


class Gateway:
    """A door over Serve's handles; `graph.py` makes it the ingress."""

    def __init__(
        self,
        http: HttpSettings,
        backbones: Mapping[str, DeploymentHandle[Any]],
        prepared: Mapping[str, PreparedBackbone],
        encoders: Mapping[str, DeploymentHandle[Any]],
        reasoning: DeploymentHandle[Any],
        mixing: DeploymentHandle[Any],
        modules: Sequence[ModuleCard],
        catalogue: Catalogue,
        dispatch: Sequence[str],
        margins: DispatchMargins,
        fits: Mapping[str, Fits],
        centroids: CentroidSettings,
        tasks: DeploymentHandle[Any],
        embedding_tasks: TaskSettings,
    ) -> None:
        self._door = Door(
            http,
            [ServedBackbone(id_, prepared[id_], handle) for id_, handle in backbones.items()],
            [ServedEncoder(id_, handle) for id_, handle in encoders.items()],
            ServedReasoning(modules, reasoning),
            ServedMixing(mixing),
            ServedSearches(mixing),
            catalogue,
            dispatch,
            margins,
            fits,
            ServedCentroids(mixing),
            centroids,
            ServedTasks(tasks),
            embedding_tasks,
        )

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return create_app(self._door)
