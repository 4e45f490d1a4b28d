"""Choosing an expert from the request alone, stage `centroid`: the nearest task centroid in hidden states.

A causal model's hidden states fall into clusters by task (Wu and Varshney, arXiv:2402.12151), so the base model's own
state at the end of a prompt says which expert it wants, without the generated first pass of Transformer-squared. Every
expert brings its own centroid in its card, so a table is built from a registry's entries. numpy only.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from metasepia.digests import short
from metasepia.errors import CorruptArtefact
from metasepia.rows import HiddenStatesWanted


@dataclass(frozen=True, kw_only=True, eq=False)
class TaskCentroid:
    """Where the prompts of one expert's task lie, and how near a prompt must come to be taken for one of them."""

    backbone: str
    """Digest of the backbone, without experts, whose states these are."""
    layer: int
    """As in `HiddenStatesWanted`."""
    pooling: Literal["mean", "last"]
    centre: Float[np.ndarray, " hidden"]
    """Mean state of prompts of no task; subtracted first, because raw states all point one way."""
    centroid: Float[np.ndarray, " hidden"]
    """Mean state of the task's training prompts, centred."""
    threshold: float
    """Cosine from which on a prompt counts as one of the task. In [-1, 1]."""

    @classmethod
    def calibrate(
        cls,
        states: Float[np.ndarray, "prompts hidden"],
        others: Float[np.ndarray, "others hidden"],
        *,
        backbone: str,
        layer: int,
        pooling: Literal["mean", "last"],
    ) -> "TaskCentroid":
        """From states of the task's training prompts and of prompts of no task.

        The threshold lies halfway between the lowest cosine of the former (but the lowest 2 %) and the highest of the
        latter, and never below the latter.
        """
        centre = others.mean(0)
        centroid = (states - centre).mean(0)
        own, foreign = (_cosines(x - centre, centroid) for x in (states, others))
        threshold = max(float(foreign.max()), float((np.quantile(own, 0.02) + foreign.max()) / 2))
        return cls(
            backbone=backbone,
            layer=layer,
            pooling=pooling,
            centre=centre.astype(np.float32),
            centroid=centroid.astype(np.float32),
            threshold=round(threshold, 6),
        )

    @property
    def mean(self) -> Float[np.ndarray, " hidden"]:
        """Mean state of the task's training prompts, not centred."""
        return self.centre + self.centroid

    def cosine(self, state: Float[np.ndarray, " hidden"]) -> float:
        return float(_cosines((state - self.centre)[None], self.centroid)[0])

    def to_card(self) -> dict[str, object]:
        """For an expert's card, under `dispatch`; four significant digits move a cosine by less than 1e-3."""
        return {
            "stage": "centroid",
            "backbone": self.backbone,
            "layer": self.layer,
            "pooling": self.pooling,
            "threshold": self.threshold,
            "centre": [float(f"{x:.4g}") for x in self.centre],
            "centroid": [float(f"{x:.4g}") for x in self.centroid],
        }

    @classmethod
    def of_card(cls, card: Mapping[str, Any], name: str = "the expert") -> "TaskCentroid | None":
        """None for a card without one: `auto` never chooses that expert. Raises CorruptArtefact for a broken one."""
        entry = card.get("dispatch")
        if entry is None:
            return None
        try:
            one = cls(
                backbone=str(entry["backbone"]),
                layer=int(entry["layer"]),
                pooling=entry["pooling"],
                centre=np.asarray(entry["centre"], np.float32),
                centroid=np.asarray(entry["centroid"], np.float32),
                threshold=float(entry["threshold"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptArtefact(name, f"its card's dispatch entry cannot be read ({error!r})") from error
        numbers = (one.centre, one.centroid, np.float32(one.threshold))
        if one.pooling not in ("mean", "last") or one.centre.shape != one.centroid.shape or one.centre.ndim != 1:
            raise CorruptArtefact(name, "its card's dispatch entry has a wrong pooling or two vectors of unlike length")
        if not all(np.isfinite(number).all() for number in numbers) or not one.centroid.any():
            raise CorruptArtefact(name, "its card's dispatch entry holds NaN, infinity or a centroid of zeros")
        return one


@dataclass(frozen=True, kw_only=True)
class Dispatched:
    """What a stage chose."""

    expert: str | None
    """Digest; None when the stage abstains, and when it finds that no expert is wanted."""
    margin: float
    """How sure it is. Of `centroid`: cosine above both the threshold and the runner-up, 0 or less when it abstains."""
    stage: str = "centroid"
    is_other: bool = False
    """It found that the request is for no expert: the base weights answer, and no other stage is asked."""

    @property
    def abstains(self) -> bool:
        return self.expert is None and not self.is_other


class CentroidTable:
    """The centroids of the experts that one owner can see, on one backbone."""

    def __init__(self, backbone: str, centroids: Mapping[str, TaskCentroid]) -> None:
        """`centroids` by expert digest; those of other backbones are left out."""
        self._centroids = {d: c for d, c in sorted(centroids.items()) if c.backbone == backbone}
        kinds = sorted({(c.layer, c.pooling) for c in self._centroids.values()})
        self._kinds = kinds

    def __len__(self) -> int:
        return len(self._centroids)

    def __getitem__(self, expert: str) -> TaskCentroid:
        """By the expert's digest."""
        return self._centroids[expert]

    @property
    def wanted(self) -> tuple[HiddenStatesWanted, ...]:
        """The hidden states to ask the base model for: one request a pooling, almost always one in all."""
        poolings: list[Literal["mean", "last"]] = ["last", "mean"]
        return tuple(
            HiddenStatesWanted(layers=tuple(layer for layer, own in self._kinds if own == pooling), pooling=pooling)
            for pooling in poolings
            if any(own == pooling for _, own in self._kinds)
        )

    def choose(self, states: Mapping[HiddenStatesWanted, Float[np.ndarray, "layers hidden"]]) -> Dispatched:
        """The expert whose centroid the prompt is nearest to, each cosine counted from its own threshold.

        `states` answers each of `wanted`. Abstains below every threshold, and with an empty table.
        """
        by_kind = {
            (layer, wanted.pooling): states[wanted][i]
            for wanted in self.wanted
            for i, layer in enumerate(wanted.layers)
        }
        scores = {d: c.cosine(by_kind[c.layer, c.pooling]) - c.threshold for d, c in self._centroids.items()}
        ranked = sorted(scores, key=lambda digest: (-scores[digest], digest))
        if not ranked or not scores[ranked[0]] > 0:
            return Dispatched(expert=None, margin=scores[ranked[0]] if ranked else 0.0)
        runner_up = scores[ranked[1]] if len(ranked) > 1 else 0.0
        return Dispatched(expert=ranked[0], margin=scores[ranked[0]] - max(0.0, runner_up))

    def __repr__(self) -> str:
        return f"CentroidTable({', '.join(short(digest) for digest in self._centroids)})"


def _cosines(
    states: Float[np.ndarray, "prompts hidden"], centroid: Float[np.ndarray, " hidden"]
) -> Float[np.ndarray, " prompts"]:
    norms = np.linalg.norm(states, axis=1) * np.linalg.norm(centroid)
    return states @ centroid / np.maximum(norms, 1e-12)
