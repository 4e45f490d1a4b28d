"""Placement groups that keep the processes of a gang together; one that cannot be placed is refused, not awaited."""

from collections.abc import Mapping

import ray
from ray.exceptions import GetTimeoutError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from metasepia.errors import CannotPlace

SETTLE_S = 10.0
"""Resources of processes that have just died are given back within this time."""


def place(bundles: list[dict[str, float]], *, name: str, wait_s: float = SETTLE_S) -> PlacementGroup:
    """A placement group of `bundles`, reserved: on one node if one is large enough, else on few. `name` is for people.

    Raises CannotPlace with the sum: at once when the cluster is too small, after `wait_s` when others hold it.
    """
    bundles = [{kind: amount for kind, amount in bundle.items() if amount} for bundle in bundles]
    needed: dict[str, float] = {}
    for bundle in bundles:
        for kind, amount in bundle.items():
            needed[kind] = round(needed.get(kind, 0.0) + amount, 6)
    _check(needed, ray.cluster_resources(), bundles, name)
    one_node = any(_fits(needed, node["Resources"]) for node in ray.nodes() if node["Alive"])
    group = placement_group(bundles, strategy="STRICT_PACK" if one_node else "PACK")
    try:
        ray.get(group.ready(), timeout=wait_s)
    except GetTimeoutError:
        remove_placement_group(group)
        _check(needed, ray.available_resources(), bundles, name)
        # The sum is there, but in pieces: name the scarcest kind all the same.
        kind = next(iter(needed))
        raise CannotPlace(
            kind, needed[kind], ray.available_resources().get(kind, 0.0), _parts(bundles, kind, name)
        ) from None
    return group


def _fits(needed: dict[str, float], available: Mapping[str, float]) -> bool:
    return all(available.get(kind, 0.0) >= amount - 1e-6 for kind, amount in needed.items())


def _check(
    needed: dict[str, float], available: Mapping[str, float], bundles: list[dict[str, float]], name: str
) -> None:
    for kind, amount in needed.items():
        if not _fits({kind: amount}, available):
            raise CannotPlace(kind, amount, available.get(kind, 0.0), _parts(bundles, kind, name))


def _parts(bundles: list[dict[str, float]], kind: str, name: str) -> str:
    amounts = " + ".join(f"{bundle[kind]:g}" for bundle in bundles if bundle.get(kind))
    return f"{name}: {amounts}"
