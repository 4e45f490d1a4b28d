"""Where a few-shot search begins: at equal weights, or near the experts whose tasks are nearest to the task at hand.

Tasks near each other in an embedding space tend to lend each other their adaptations (FUTE, arXiv:2402.14522; Vu et
al., arXiv:2005.00770), so the similarities of the task to the candidates' own tasks say where to look first. They may
mislead, so a start only moves the first generation: the distribution stays wide, every candidate keeps a part of the
mean, and from the second generation on the scores alone decide. numpy only.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from metasepia.errors import InvalidRequest


@dataclass(frozen=True, kw_only=True)
class WarmStartSettings:
    """How similarities become the first generation's distribution. Chosen on the development tasks that
    `benchmarks.warm_start` names.
    """

    temperature: float = 0.1
    """Cosine that multiplies an expert's weight by e. Above 0."""
    uniform: float = 0.25
    """Share of the mean that every candidate has alike, whatever its similarity. From 0.05 to 1, a uniform mean."""
    std: float = 0.35
    """Standard deviation of each weight, before a draw is put onto the simplex; a uniform start has 0.5. From 0.2, so
    that a wrong start is left behind, to 1."""

    def __post_init__(self) -> None:
        for name, low, high in (("temperature", 1e-3, 100), ("uniform", 0.05, 1), ("std", 0.2, 1)):
            if not low <= getattr(self, name) <= high:  # written so that NaN fails too
                raise InvalidRequest(f"start.{name}", f"must lie from {low:g} to {high:g}, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Start:
    """The first generation's distribution, the same in every layer."""

    mean: tuple[float, ...]
    """By candidate, in the order of their digests; on the simplex."""
    std: tuple[float, ...]
    similarities: tuple[float | None, ...]
    """What the mean was made from; None: nothing is known of this candidate."""
    source: str
    """Where the similarities come from, in words or as a name."""

    def __post_init__(self) -> None:
        if not len(self.mean) == len(self.std) == len(self.similarities):
            raise InvalidRequest("start", f"has {len(self.mean)} means and {len(self.std)} deviations")
        means_ok = all(0 <= one <= 1 for one in self.mean) and abs(math.fsum(self.mean) - 1) <= 1e-6
        if not means_ok or not all(0 < one <= 1 for one in self.std):
            raise InvalidRequest("start", "its mean must lie on the simplex, and its deviations above 0 and at most 1")

    @property
    def order(self) -> tuple[int, ...]:
        """The candidates, the most promising first."""
        return tuple(sorted(range(len(self.mean)), key=lambda i: (-self.mean[i], i)))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> "Start":
        """Raises KeyError, TypeError, ValueError and InvalidRequest for what is no start."""
        columns = {name: tuple(tree[name]) for name in ("mean", "std", "similarities")}
        return cls(**columns, source=str(tree["source"]))


def warm_start(
    similarities: Mapping[str, float],
    candidates: Sequence[str],
    settings: WarmStartSettings | None = None,
    *,
    source: str = "similarities",
) -> Start:
    """The start of a search over `candidates` (digests), by their similarity to the task; cosines, in [-1, 1].

    mean = uniform / K + (1 - uniform) softmax(similarity / temperature). A candidate whose similarity is not known, the
    base as a rule, is given the mean of the known ones: nothing speaks for or against it. What is no candidate is left
    out. Raises InvalidRequest when no candidate's similarity is known, and for one that is not finite.
    """
    settings = settings or WarmStartSettings()
    ordered = sorted(candidates)
    known = {one: float(similarities[one]) for one in ordered if one in similarities}
    if not known:
        raise InvalidRequest("start", "nothing is known of any candidate; embed their tasks, or start uniform")
    if not all(math.isfinite(one) for one in known.values()):
        raise InvalidRequest("start", f"a similarity is not finite: {known}")
    middle = math.fsum(known.values()) / len(known)
    scores = np.array([known.get(one, middle) for one in ordered]) / settings.temperature
    soft = np.exp(scores - scores.max())
    mean = settings.uniform / len(ordered) + (1 - settings.uniform) * soft / soft.sum()
    return Start(
        mean=tuple(float(one) for one in mean / mean.sum()),
        std=(settings.std,) * len(ordered),
        similarities=tuple(round(known[one], 4) if one in known else None for one in ordered),
        source=source,
    )
