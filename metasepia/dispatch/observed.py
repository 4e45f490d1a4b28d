"""Task centroids for the stage `centroid` from what was observed, beside those on experts' cards. numpy only.

A running centroid (`metasepia.centroids`) whose task is named after an expert stands for that expert.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from metasepia.centroids import KnownMean
from metasepia.dispatch.centroid import TaskCentroid


def routable(known: Sequence[KnownMean], cards: Mapping[str, TaskCentroid | None]) -> dict[str, TaskCentroid]:
    """Task centroids for the experts of `cards`, from what was observed under tasks of the experts' names.

    `cards` has what each expert's own card says; its layer, pooling, centre and threshold then stay, and the observed
    mean takes the centroid's place. An expert whose card says nothing gets all four from the observed tasks: the layer
    and pooling where its task is told apart best, as the centre the mean of the other tasks, and a threshold halfway
    between the cosines to be expected of its own prompts and of the most similar other task's. That takes another task.
    """
    found: dict[str, TaskCentroid] = {}
    for name, card in cards.items():
        own = [one for one in known if one.key.task == name]
        if card is not None:
            fits = [one for one in own if (one.key.layer, one.key.pooling) == (card.layer, card.pooling)]
            if fits and fits[0].mean.shape == card.centre.shape:
                found[name] = dataclasses.replace(card, centroid=fits[0].mean - card.centre)
            continue
        made = [(one, _among(one, known)) for one in own]
        best = max(((gap, one) for _, (gap, one) in made if one is not None), key=lambda pair: pair[0], default=None)
        if best is not None:
            found[name] = best[1]
    return found


def _among(own: KnownMean, known: Sequence[KnownMean]) -> tuple[float, TaskCentroid | None]:
    """The gap between the cosines of a task's own prompts and others', and the centroid; None without others."""
    kind = (own.key.backbone, own.key.layer, own.key.pooling)
    others = [
        one
        for one in known
        if one is not own and (one.key.backbone, one.key.layer, one.key.pooling) == kind and one.mean.any()
    ]
    if not others:
        return 0.0, None
    centre = np.stack([one.mean for one in others]).mean(0, dtype=np.float64)
    centroid = own.mean - centre
    norm = float(np.linalg.norm(centroid))
    if not norm > 0:
        return 0.0, None

    def expected(one: KnownMean) -> float:
        """Cosine with the centroid of a state of `one`: its squared norm is that of the mean and the spread's."""
        away = one.mean - centre
        return float(away @ centroid) / norm / max(math.sqrt(float(away @ away) + one.spread**2), 1e-12)

    inner, outer = expected(own), max(0.0, *(expected(one) for one in others))
    return inner - outer, TaskCentroid(
        backbone=own.key.backbone,
        layer=own.key.layer,
        pooling=own.key.pooling,
        centre=centre.astype(np.float32),
        centroid=centroid.astype(np.float32),
        threshold=round((inner + outer) / 2, 6),
    )
