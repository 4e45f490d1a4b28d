"""Gauges of online centroids: how far tasks drift, how well layers tell them apart. Set by the part that keeps them."""

from collections.abc import Mapping, Sequence

from actors import meters
from metasepia.centroids import CentroidFacts
from metasepia.digests import short
from metasepia.experts.mixing import BASE


def tell_drift(facts: Sequence[CentroidFacts], ids: Mapping[str, str]) -> None:
    """Of backbones that are served: `ids` by digest. Centroids that are gone take their series with them."""
    states: dict[tuple[str, ...], float] = {}
    drifts: dict[tuple[str, ...], float] = {}
    separations: dict[tuple[str, ...], list[float]] = {}
    for one in facts:
        key = one.key
        if key.backbone not in ids:
            continue
        rest = (short(key.adapter) or BASE, str(key.layer), key.pooling)
        labels = (ids[key.backbone], key.task, *rest)
        states[labels] = one.count
        if one.drift is not None:
            drifts[labels] = one.drift
        if one.separation is not None:
            source = "auto" if key.is_routed else "requests"
            separations.setdefault((ids[key.backbone], source, *rest), []).append(one.separation)
    quality = {labels: sum(each) / len(each) for labels, each in separations.items()}
    for gauge, values in ((meters.CENTROID_STATES, states), (meters.DRIFT, drifts), (meters.QUALITY, quality)):
        gauge.keep_only(values)
        for labels, value in values.items():
            gauge.set(value, **dict(zip(gauge.labels, labels, strict=True)))
