"""Few-shot search of a mixture by the cross-entropy method (Transformer-squared, arXiv:2501.06252, section 3.2).

`CrossEntropySearch` is asked for a population of mixtures and told their scores; it does nothing else, so the same
scores give the same bytes whoever computes them, however often it is written down and read back in between.

Where we differ from the reference: it samples weights in a box, [0, 1] for each expert, where every multiple of a
renormalised mixture is the same model. Here a sample is the point of the simplex nearest to the Gaussian draw
(Euclidean; in each layer by itself where weights are by layer), so single experts and the base are met often. The
first generation holds every candidate alone. A search that starts warm (`warm_start`) tries them alone in the order of
their promise, in half of the places of each generation, until all have been tried: so a start that misleads cannot hide
one. Equal scores are ranked by the likelihood of the right answers and then by position, for elites as for the best.
numpy only.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from metasepia.digests import canonical_json
from metasepia.errors import CorruptArtefact, InvalidRequest
from metasepia.experts.mixing import adapter_of
from metasepia.rows import Adapter
from metasepia.search.warm_start import Start

FORMAT = "metasepia.search.1"
GRID = 10_000
"""Weights are multiples of 1 / GRID, so that they add up to one and read well."""
SCORE_DIGITS = 3
"""Scores are compared rounded to this: coarser than what a row's neighbours in a batch change in its last bits."""

Stop = Literal["perfect", "no improvement", "generations", "evaluations"]


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """How a search goes. The defaults are the reference's, but for the stop rule, which it has not."""

    population: int = 32
    """Mixtures of a generation. From 2 to 1024."""
    elites: int = 6
    """The best of a generation, from which the next one is drawn. From 1 to the population."""
    generations: int = 20
    """At most. From 1 to 1000."""
    patience: int = 5
    """Generations in a row without improvement after which it stops. From 1 to 1000."""
    max_evaluations: int = 32_000
    """Mixtures scored, at most; no generation is begun that could exceed it. From the population to 10**6."""
    min_std: float = 0.05
    """A perfect score ends the search once no weight's standard deviation is above this. From 0 to 1."""
    smoothing: float = 0.0
    """Share of the old mean and deviation that is kept; 0 takes the elites' own. From 0 to 0.99."""
    per_layer: bool = False
    """A weight for each expert and factored layer instead of one for each expert."""
    seed: int = 0

    def __post_init__(self) -> None:
        bounds = {
            "population": (2, 1024),
            "elites": (1, self.population),
            "generations": (1, 1000),
            "patience": (1, 1000),
            "max_evaluations": (self.population, 10**6),
            "min_std": (0, 1),
            "smoothing": (0, 0.99),
            "seed": (0, 2**63 - 1),
        }
        for name, (low, high) in bounds.items():
            if not low <= getattr(self, name) <= high:  # written so that NaN fails too
                raise InvalidRequest(name, f"must lie from {low:g} to {high:g}, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True, order=True)
class Score:
    """What a mixture is ranked by: `value`, more is better; among equals the greater `likelihood`."""

    value: float
    likelihood: float = 0.0
    """Mean natural log-probability of the right answers; at most 0."""

    @property
    def rounded(self) -> "Score":
        """Raises ValueError unless both are finite."""
        if not (math.isfinite(self.value) and math.isfinite(self.likelihood)):
            raise ValueError(f"a score must be finite, got {self}")
        return Score(value=round(self.value, SCORE_DIGITS), likelihood=round(self.likelihood, SCORE_DIGITS))


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One generation in the trace."""

    number: int
    """From 0."""
    scores: tuple[Score, ...]
    """Of the population in order, rounded; the first is the incumbent's."""
    best: int
    """Position of the best in the population."""
    improved: bool
    """Whether the best beats the incumbent."""
    weights: tuple[float, ...]
    """Of the best, by candidate; by layer, the means over the layers."""
    mean: tuple[float, ...]
    """Of the next generation's distribution, by candidate; by layer, the means over the layers."""
    std: float
    """The largest standard deviation of the next generation's distribution."""
    evaluations: int
    """Mixtures scored so far."""

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "scores": [[one.value, one.likelihood] for one in self.scores]}


class CrossEntropySearch:
    """Ask for a population, tell its scores, until `stopped`.

    Slot 0 of every population is the incumbent: at first the start's mean, which is equal weights by default, later the
    best mixture so far. `perfect` is a score that cannot be beaten (accuracy 1), if there is one.
    """

    def __init__(
        self,
        candidates: Sequence[str],
        settings: SearchSettings,
        *,
        num_layers: int = 1,
        perfect: float | None = None,
        start: Start | None = None,
    ) -> None:
        """`candidates` are digests of experts, the base among them where it takes part; their order does not matter.

        `num_layers`: factored layers, for weights by layer. `start` None: equal weights and a deviation of 0.5. Raises
        InvalidRequest for less than two candidates, and for a start of another number of them.
        """
        if len(set(candidates)) < 2 or len(set(candidates)) != len(candidates):
            raise InvalidRequest("experts", f"a search needs two different candidates or more, got {len(candidates)}")
        if start is not None and len(start.mean) != len(candidates):
            raise InvalidRequest("start", f"is for {len(start.mean)} candidates, not {len(candidates)}")
        self.candidates, self.settings, self.perfect = tuple(sorted(candidates)), settings, perfect
        self.start = start
        self._shape = (len(candidates), num_layers if settings.per_layer else 1)
        self._mean = np.full(self._shape, 1 / len(candidates))
        self._std = np.full(self._shape, 0.5)
        if start is not None:
            self._mean = np.repeat(np.array(start.mean)[:, None], self._shape[1], axis=1)
            self._std = np.repeat(np.array(start.std)[:, None], self._shape[1], axis=1)
        self._incumbent = _on_grid(self._mean[None])[0]
        self._generator: Any = np.random.PCG64(settings.seed).state
        self.generation = 0
        """Generations told."""
        self.evaluations = 0
        self.best: Score | None = None
        """Of the incumbent; None before the first generation was told."""
        self._stale = 0

    # -- asking --------------------------------------------------------------------------------------------------------

    def ask(self) -> Float[np.ndarray, "population experts *layers"]:
        """The next population's weights, on the simplex along the experts; the same until it is told."""
        alpha = self._population()[0]
        return alpha if self.settings.per_layer else alpha[:, :, 0]

    def adapters(self) -> list[Adapter]:
        """The population as adapters."""
        return [self.adapter_of(alpha) for alpha in self._population()[0]]

    @property
    def incumbent(self) -> Adapter:
        """The best mixture so far."""
        return self.adapter_of(self._incumbent)

    def adapter_of(self, alpha: Float[np.ndarray, "experts layers"]) -> Adapter:
        return adapter_of(dict(zip(self.candidates, alpha.tolist(), strict=True)))

    def _population(self) -> tuple[Float[np.ndarray, "population experts layers"], Any]:
        """The next population, and the generator's state after it was drawn."""
        bits = np.random.PCG64()
        bits.state = self._generator
        noise = np.random.Generator(bits).standard_normal((self.settings.population, *self._shape))
        alpha = to_simplex(self._mean + self._std * noise)
        alpha[0] = self._incumbent
        alone = np.eye(len(self.candidates))[self._alone()]
        alpha[1 : 1 + len(alone)] = alone[:, :, None]
        return _on_grid(alpha), bits.state

    def _alone(self) -> list[int]:
        """Candidates that the next generation holds alone."""
        if self.start is None:
            return list(range(len(self.candidates)))[: self.settings.population - 1] if self.generation == 0 else []
        room = max(1, self.settings.population // 2)
        return list(self.start.order[self.generation * room : (self.generation + 1) * room])

    # -- telling -------------------------------------------------------------------------------------------------------

    def tell(self, scores: Sequence[Score]) -> Generation:
        """The scores of the population asked for last, in order. Raises ValueError for a score that is not finite."""
        if self.stopped is not None or len(scores) != self.settings.population:
            raise ValueError(f"{len(scores)} scores for {self.settings.population} mixtures; stopped: {self.stopped}")
        rounded = [one.rounded for one in scores]
        alpha, generator = self._population()
        ranked = sorted(range(len(rounded)), key=lambda i: (rounded[i], -i), reverse=True)
        elites = alpha[sorted(ranked[: self.settings.elites])]
        keep = self.settings.smoothing
        self._mean = keep * self._mean + (1 - keep) * elites.mean(0)
        self._std = keep * self._std + (1 - keep) * elites.std(0)
        best = ranked[0]
        improved = self.best is None or rounded[best] > self.best
        self._incumbent, self.best, self._generator = alpha[best], rounded[best], generator
        self._stale = 0 if improved else self._stale + 1
        self.evaluations += len(scores)
        told = Generation(
            number=self.generation,
            scores=tuple(rounded),
            best=best,
            improved=improved,
            weights=tuple(round(float(one), 4) for one in self._incumbent.mean(1)),
            mean=tuple(round(float(one), 4) for one in self._mean.mean(1)),
            std=round(float(self._std.max()), 4),
            evaluations=self.evaluations,
        )
        self.generation += 1
        return told

    @property
    def stopped(self) -> Stop | None:
        """Why no further generation is asked for; None while there is one."""
        settings = self.settings
        is_perfect = self.best is not None and self.perfect is not None and self.best.value >= self.perfect
        if is_perfect and float(self._std.max()) <= settings.min_std:
            return "perfect"
        if self._stale >= settings.patience:
            return "no improvement"
        if self.generation >= settings.generations:
            return "generations"
        if self.evaluations + settings.population > settings.max_evaluations:
            return "evaluations"
        return None

    # -- as bytes ------------------------------------------------------------------------------------------------------

    def to_bytes(self) -> bytes:
        """Everything that the rest of the search depends on; the same bytes for the same past."""
        warm = {} if self.start is None else {"start": self.start.to_json()}  # none: the bytes of searches before it
        return canonical_json(
            {
                **warm,
                "format": FORMAT,
                "candidates": self.candidates,
                "settings": asdict(self.settings),
                "num_layers": self._shape[1],
                "perfect": self.perfect,
                "mean": self._mean.tolist(),
                "std": self._std.tolist(),
                "incumbent": self._incumbent.tolist(),
                "generator": self._generator,
                "generation": self.generation,
                "evaluations": self.evaluations,
                "best": None if self.best is None else [self.best.value, self.best.likelihood],
                "stale": self._stale,
            }
        )

    @classmethod
    def from_bytes(cls, blob: bytes) -> "CrossEntropySearch":
        """Goes on where `to_bytes` was. Raises CorruptArtefact."""
        try:
            tree = json.loads(blob)
            if tree["format"] != FORMAT:
                raise ValueError(f"its format is {tree['format']!r}, not {FORMAT!r}")
            search = cls(
                tree["candidates"],
                SearchSettings(**tree["settings"]),
                num_layers=tree["num_layers"],
                perfect=tree["perfect"],
                start=Start.from_json(tree["start"]) if "start" in tree else None,
            )
            search._mean, search._std, search._incumbent = (
                np.array(tree[name]).reshape(search._shape) for name in ("mean", "std", "incumbent")
            )
            best = tree["best"]
            search.best = None if best is None else Score(value=best[0], likelihood=best[1])
            search._generator = tree["generator"]
            search._population()  # a generator's state that is none is found now
            search.generation, search.evaluations = int(tree["generation"]), int(tree["evaluations"])
            search._stale = int(tree["stale"])
        except (ValueError, KeyError, TypeError, IndexError, InvalidRequest) as error:
            raise CorruptArtefact("the search's state", f"it cannot be read ({error})") from error
        return search


def to_simplex(
    points: Float[np.ndarray, "population experts layers"],
) -> Float[np.ndarray, "population experts layers"]:
    """The nearest points of the simplex along the experts (Duchi et al., ICML 2008)."""
    ordered = -np.sort(-points, axis=1)
    above = np.cumsum(ordered, axis=1) - 1
    counts = np.arange(1, points.shape[1] + 1)[None, :, None]
    support = (ordered * counts > above).sum(axis=1, keepdims=True)
    threshold = np.take_along_axis(above, support - 1, axis=1) / support
    return np.maximum(points - threshold, 0)


def _on_grid(alpha: Float[np.ndarray, "population experts layers"]) -> Float[np.ndarray, "population experts layers"]:
    """Points of the simplex as multiples of 1 / GRID that add up to one: the largest remainders are rounded up."""
    scaled = alpha * GRID
    whole = np.floor(scaled)
    missing = np.rint(GRID - whole.sum(axis=1, keepdims=True))
    order = np.argsort(np.argsort(whole - scaled, axis=1, kind="stable"), axis=1, kind="stable")
    return (whole + (order < missing)) / GRID
