"""What each kind of process needs, as data. Applied with `.options(...)` where the process is created."""

from collections.abc import Iterable
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


def parts(settings: Settings) -> list[tuple[str, float, float]]:
    """(part, CPUs, GPUs) of everything that the graph places: on a cluster of our own, which cannot grow, as many
    replicas as a part may ever have, else those that it begins with.
    """

    def row(part: str, scaling: ScalingSettings, cpus: float, gpus: float = 0.0) -> tuple[str, float, float]:
        number = scaling.max_replicas if settings.ray.address == "local" else scaling.min_replicas
        return f"{part} x {number}" if number > 1 else part, number * cpus, number * gpus

    rows = [
        ("gateway", settings.gateway.cpus, 0.0),
        ("registry", settings.registry.cpus, 0.0),
        ("expert mixing", settings.mixing.cpus, 0.0),
        ("task embedding", settings.tasks.cpus, 0.0),
        row("reasoning pool", settings.reasoning.scaling, settings.reasoning.cpus),
    ]
    rows += [row(f"encoder {e.id}", e.scaling, e.cpus, e.gpus) for e in settings.encoders]
    for b in settings.backbones:
        bundles = gang_bundles(b)
        cpus, gpus = (sum(bundle.get(kind, 0.0) for bundle in bundles) for kind in ("CPU", "GPU"))
        rows.append(row(f"backbone {b.id} (tp_size {b.tp_size})", b.scaling, cpus, gpus))
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
