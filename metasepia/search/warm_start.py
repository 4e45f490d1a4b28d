"""Where a few-shot search begins: at equal weights, or near the experts whose tasks are nearest to the task at hand.

Tasks near each other in an embedding space tend to lend each other their adaptations (FUTE, arXiv:2402.14522; Vu et
al., arXiv:2005.00770), so the similarities of the task to the candidates' own tasks say where to look first. They may
mislead, so a start only moves the first generation: the distribution stays wide, every candidate keeps a part of the
mean, and from the second generation on the scores alone decide. numpy only.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from metasepia.errors import InvalidRequest

LEAST_SPREAD = 0.01
"""Of cosines, below which they are taken for alike."""


@dataclass(frozen=True, kw_only=True)
class WarmStartSettings:
    """How similarities become the first generation's distribution. Chosen on the development tasks that
    `benchmarks.warm_start` names.
    """

    temperature: float = 1.0
    """Standard deviations of the candidates' similarities that multiply a weight by e. From 0.1 to 100."""
    base: float = 0.5
    """Share of the mean that the base has where it is a candidate: what it leaves to the experts is their strength.
    From 0 to 0.9."""
    uniform: float = 0.25
    """Share of the rest that every expert has alike, whatever its similarity. From 0.05 to 1, a uniform mean."""
    std: float = 0.25
    """Standard deviation of each weight, before a draw is put onto the simplex; a uniform start has 0.5. From 0.2, so
    that a wrong start is left behind, to 1."""

    def __post_init__(self) -> None:
        for name, low, high in (("temperature", 0.1, 100), ("base", 0, 0.9), ("uniform", 0.05, 1), ("std", 0.2, 1)):
            if not low <= getattr(self, name) <= high:  # written so that NaN fails too
                raise InvalidRequest(f"start.{name}", f"must lie from {low:g} to {high:g}, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Nearness:
    """How near the tasks of experts are to the task at hand, as it was found before anybody chose candidates."""

    experts: tuple[tuple[str, float], ...]
    """(expert's name or digest, cosine); of one that is there several times, having several tasks, the nearest counts.
    """
    source: str
    """For people: which task, in which space."""
    settings: WarmStartSettings

    def start(
        self, digests: Mapping[str, str], candidates: Sequence[str], bases: Collection[str] = frozenset()
    ) -> "Start":
        """`digests` by the names that stand for something; experts without one are left out. Raises as `warm_start`."""
        similarities: dict[str, float] = {}
        for name, cosine in self.experts:
            if (digest := digests.get(name)) is not None:
                similarities[digest] = max(cosine, similarities.get(digest, -1.0))
        return warm_start(similarities, candidates, self.settings, bases=bases, source=self.source)


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
        """The candidates in the order in which they are tried alone: first those that nothing is known of, the base
        among them, then the most promising."""
        return tuple(sorted(range(len(self.mean)), key=lambda i: (self.similarities[i] is not None, -self.mean[i], i)))

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
    bases: Collection[str] = (),
    source: str = "similarities",
) -> Start:
    """The start of a search over `candidates` (digests), by their similarity to the task; cosines, in [-1, 1].

    The base (`bases`) has its share of the mean, and the K experts the rest: uniform / K + (1 - uniform) softmax(s /
    temperature), where s is the similarity in standard deviations of the known ones (of 0.01 at least: cosines all
    alike tell nothing), because one method's cosines lie between 0 and 0.1 and another's between 0.9 and 1. An expert
    whose similarity is not known is given the mean of the known ones: nothing speaks for or against it. What is no
    candidate is left out. Raises InvalidRequest when no expert's similarity is known, and for one that is not finite.
    """
    settings = settings or WarmStartSettings()
    ordered = sorted(candidates)
    experts = [one for one in ordered if one not in bases]
    known = {one: float(similarities[one]) for one in experts if one in similarities}
    if not known:
        raise InvalidRequest("start", "nothing is known of any candidate; embed their tasks, or start uniform")
    if not all(math.isfinite(one) for one in known.values()):
        raise InvalidRequest("start", f"a similarity is not finite: {known}")
    values = np.array(list(known.values()))
    middle, spread = float(values.mean()), max(float(values.std()), LEAST_SPREAD)
    scores = (np.array([known.get(one, middle) for one in experts]) - middle) / spread / settings.temperature
    soft = np.exp(scores - scores.max())
    of_experts = settings.uniform / len(experts) + (1 - settings.uniform) * soft / soft.sum()
    num_bases = len(ordered) - len(experts)
    share = settings.base if num_bases else 0.0
    weights = dict(zip(experts, (1 - share) * of_experts, strict=True))
    mean = np.array([weights.get(one, share / max(num_bases, 1)) for one in ordered])
    return Start(
        mean=tuple(float(one) for one in mean / mean.sum()),
        std=(settings.std,) * len(ordered),
        similarities=tuple(round(known[one], 4) if one in known else None for one in ordered),
        source=source,
    )
