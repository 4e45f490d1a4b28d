"""What each kind of process needs, as data. Applied with `.options(...)` where the process is created."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.scaling_settings import ScalingSettings
from cluster.settings import BackboneSettings, RegistrySettings, Settings
from metasepia.errors import CannotPlace

NODE_SHARE = 0.001
"""Of a resource that only says where a node is: asked for by few, it never runs out."""


def gang_bundles(backbone: BackboneSettings) -> list[dict[str, float]]:
    """The placement group of one backbone replica: bundle 0 the replica, then one a rank, then its spares."""
    rank: dict[str, float] = {"CPU": backbone.rank_cpus}
    if backbone.rank_gpus:
        rank["GPU"] = backbone.rank_gpus
    return [{"CPU": backbone.replica_cpus}, *[dict(rank) for _ in range(backbone.tp_size)]]


def registry(settings: RegistrySettings) -> dict[str, Any]:
    """Outlives its creator and restarts for ever, as all it knows is on disk; reads do not wait for one another."""
    alone = {"num_cpus": settings.cpus, "lifetime": "detached", "max_restarts": -1, "max_concurrency": 4}
    return alone | at_home(settings)


def at_home(settings: RegistrySettings) -> dict[str, Any]:
    """What keeps an actor on the node with the disk of `home`, where a resource of that node says which it is.

    It takes no CPU of that node: whatever else is placed there could otherwise leave none.
    """
    return {"num_cpus": 0, "resources": {settings.node_resource: NODE_SHARE}} if settings.node_resource else {}


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of the graph: what one replica takes, all of it on one node, and how many replicas there may be."""

    name: str
    bundles: tuple[dict[str, float], ...]
    """One for each process, by Ray's names of resources."""
    min_replicas: int = 1
    max_replicas: int = 1
    at_home: bool = False
    """It writes under `home`: on the node with its disk."""

    def amount(self, kind: str) -> float:
        """Of one replica."""
        return round(sum(bundle.get(kind, 0.0) for bundle in self.bundles), 6)


def all_parts(settings: Settings) -> list[Part]:
    """Everything that the graph places, from the settings alone."""
    home = bool(settings.registry.node_resource)

    def scaled(name: str, scaling: ScalingSettings, bundles: Sequence[dict[str, float]]) -> Part:
        low, high = scaling.min_replicas, scaling.max_replicas
        return Part(name=name, bundles=tuple(bundles), min_replicas=low, max_replicas=high)

    found = [
        Part(name="gateway", bundles=({"CPU": settings.gateway.cpus},)),
        Part(name="registry", bundles=({"CPU": 0.0 if home else settings.registry.cpus},), at_home=True),
        Part(name="expert mixing", bundles=({"CPU": 0.0 if home else settings.mixing.cpus},), at_home=True),
        Part(name="task embedding", bundles=({"CPU": settings.tasks.cpus},)),
        scaled("reasoning pool", settings.reasoning.scaling, [{"CPU": settings.reasoning.cpus}]),
    ]
    for e in settings.encoders:
        found.append(scaled(f"encoder {e.id}", e.scaling, [{"CPU": e.cpus, "GPU": e.gpus}]))
    for b in settings.backbones:
        found.append(scaled(f"backbone {b.id} (tp_size {b.tp_size})", b.scaling, gang_bundles(b)))
    return found


def parts(settings: Settings) -> list[tuple[str, float, float]]:
    """(part, CPUs, GPUs) of everything that the graph places: on a cluster of our own, which cannot grow, as many
    replicas as a part may ever have, else those that it begins with.
    """
    rows: list[tuple[str, float, float]] = []
    for one in all_parts(settings):
        number = one.max_replicas if settings.ray.address == "local" else one.min_replicas
        name = f"{one.name} x {number}" if number > 1 else one.name
        rows.append((name, number * one.amount("CPU"), number * one.amount("GPU")))
    return rows


def check_fits(settings: Settings, available: dict[str, float]) -> None:
    """Raises CannotPlace with the sum, part by part, when the cluster has less than the settings add up to."""
    _check("CPU", [(part, cpus) for part, cpus, _ in parts(settings)], available.get("CPU", 0.0))
    _check("GPU", [(part, gpus) for part, _, gpus in parts(settings)], available.get("GPU", 0.0))


def _check(resource: str, needs: Iterable[tuple[str, float]], available: float) -> None:
    needs = [(part, amount) for part, amount in needs if amount]
    total = round(sum(amount for _, amount in needs), 6)
    if total > available + 1e-6:
        raise CannotPlace(resource, total, available, " + ".join(f"{part} {amount:g}" for part, amount in needs))
