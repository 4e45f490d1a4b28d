"""Where a model crosses over: the number of tasks beyond which it is nearer one estimator than the other.

Two curves over log2 M are compared by the logarithm of their ratio, which is taken as straight between neighbours; a
crossing is where it rises through zero. Intervals are percentile bootstraps that draw seeds, and within each seed
blocks of evaluation sequences, which all M share; infinite M lies on no axis and takes no part.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

BELOW, ABOVE = -math.inf, math.inf


@dataclass(frozen=True)
class Crossing:
    """log2 of a number of tasks; -inf: below the smallest, +inf: above the largest, NaN: the curves cross downwards."""

    log2_tasks: float
    low: float
    """2.5 %, an actual replicate; may be infinite."""
    high: float
    replicates: Float[np.ndarray, " draws"]
    smallest: int
    largest: int
    """The M between which was looked."""
    changes: int
    """How often the sign of the difference changes; more than once says that the crossing is not clean."""

    @property
    def found(self) -> bool:
        return math.isfinite(self.log2_tasks)

    @property
    def num_tasks(self) -> float:
        return 2.0**self.log2_tasks if self.found else self.log2_tasks

    @property
    def share_found(self) -> float:
        """Of the bootstrap's replicates that cross between the smallest and the largest M."""
        return float(np.isfinite(self.replicates).mean())

    @property
    def interval(self) -> str:
        """In words, with the ends said plainly where they lie outside of what was run."""
        return f"{self._end(self.low)} to {self._end(self.high)}"

    @property
    def text(self) -> str:
        """A sentence's end: M with its interval, or that it was not crossed."""
        if self.log2_tasks == BELOW:
            return f"not crossed, beyond it at the smallest M already, {self.smallest} (95 % interval {self.interval})"
        if self.log2_tasks == ABOVE:
            return f"not crossed, not yet at the largest M, {self.largest} (95 % interval {self.interval})"
        if math.isnan(self.log2_tasks):
            return f"not crossed upwards between {self.smallest} and {self.largest}"
        return f"M = {self.num_tasks:.3g} (2^{self.log2_tasks:.2f}; 95 % interval {self.interval})"

    def _end(self, log2: float) -> str:
        if math.isnan(log2):
            return "undetermined"
        if math.isinf(log2):
            return f"below {self.smallest}" if log2 < 0 else f"above {self.largest}"
        return f"{2.0**log2:.3g}"


def crossing_of(
    over: Float[np.ndarray, "tasks seeds blocks"],
    under: Float[np.ndarray, "tasks seeds blocks"],
    num_tasks: Sequence[int],
    *,
    draws: int = 1000,
    seed: int = 0,
) -> Crossing | None:
    """The M from which `over` exceeds `under`, both positive; NaN stands for a trial that is missing.

    With `over` the distance to dMMSE and `under` that to ridge, it is the M from which a model is nearer ridge. None
    with fewer than two M. One seed alone gives an interval over sequences only.
    """
    log2 = np.log2(np.asarray(num_tasks, dtype=float))
    present: np.ndarray = np.isfinite((over + under).sum(axis=-1))  # [tasks, seeds]
    kept = np.flatnonzero(present.sum(axis=1))  # M with a seed at least
    if len(kept) < 2:
        return None
    over, under, present, log2 = over[kept], under[kept], present[kept], log2[kept]
    _, num_seeds, num_blocks = over.shape
    seeds, blocks = np.arange(num_seeds), np.tile(np.arange(num_blocks), (num_seeds, 1))
    curve = _log_ratio(over, under, present, seeds, blocks)
    draw = np.random.default_rng(seed)
    replicates = np.empty(draws)
    for i in range(draws):
        chosen = draw.integers(num_seeds, size=num_seeds)
        parts = draw.integers(num_blocks, size=(num_seeds, num_blocks))
        replicates[i] = first_crossing(log2, _log_ratio(over, under, present, chosen, parts))
    known = replicates[~np.isnan(replicates)]
    # The inverted distribution function picks a replicate and never averages two: an end may be infinite.
    low, high = np.quantile(known, [0.025, 0.975], method="inverted_cdf") if known.size else (math.nan, math.nan)
    return Crossing(
        log2_tasks=first_crossing(log2, curve),
        low=float(low),
        high=float(high),
        replicates=replicates,
        smallest=round(2 ** log2[0]),
        largest=round(2 ** log2[-1]),
        changes=int((np.diff(np.sign(curve)) != 0).sum()),
    )


def _log_ratio(
    over: np.ndarray, under: np.ndarray, present: np.ndarray, seeds: np.ndarray, blocks: np.ndarray
) -> np.ndarray:
    """log(over / under) for each M, means over the drawn seeds and blocks; NaN where no drawn seed has this M."""
    there = present[:, seeds]
    count = there.sum(1)
    sums = []
    for values in (over, under):
        means = np.where(there, values[:, seeds[:, None], blocks].mean(-1), 0.0)
        sums.append(means.sum(1))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.log(sums[0]) - np.log(sums[1])
    return np.where(count > 0, ratio, np.nan)


def first_crossing(log2: Float[np.ndarray, " tasks"], curve: Float[np.ndarray, " tasks"]) -> float:
    """Where a curve over ascending log2 M first rises through zero; see `Crossing.log2_tasks` for the infinite ones."""
    there = ~np.isnan(curve)
    log2, curve = log2[there], curve[there]
    if not curve.size:
        return math.nan
    if (curve > 0).all():
        return BELOW
    if (curve <= 0).all():
        return ABOVE
    for i in range(len(curve) - 1):
        if curve[i] <= 0 < curve[i + 1]:
            if not (math.isfinite(curve[i]) and math.isfinite(curve[i + 1])):
                return float((log2[i] + log2[i + 1]) / 2)
            share = -curve[i] / (curve[i + 1] - curve[i])
            return float(log2[i] + share * (log2[i + 1] - log2[i]))
    return math.nan


@dataclass(frozen=True)
class Move:
    """How far a crossing lies from another, in doublings of M."""

    log2_difference: float
    low: float
    high: float

    @property
    def text(self) -> str:
        if not math.isfinite(self.log2_difference):
            return "cannot be said: one of the two was not crossed"
        direction = "up" if self.log2_difference > 0 else "down"
        clear = self.low > 0 or self.high < 0
        doubt = "" if clear else "; the interval contains no move"
        return (
            f"{direction} by {abs(self.log2_difference):.2f} doublings of M "
            f"(95 % interval {_signed(self.low)} to {_signed(self.high)}{doubt})"
        )


def _signed(doublings: float) -> str:
    """An end of an interval; infinite where one of the two was not crossed in that draw."""
    return f"{doublings:+.2f}" if math.isfinite(doublings) else "unbounded"


def move_between(first: Crossing, second: Crossing) -> Move:
    """From the first crossing to the second. Their replicates drew the same seeds and blocks, so they are paired."""
    if not (first.found and second.found):
        return Move(math.nan, math.nan, math.nan)
    with np.errstate(invalid="ignore"):
        differences = second.replicates - first.replicates
    known = differences[~np.isnan(differences)]
    low, high = np.quantile(known, [0.025, 0.975], method="inverted_cdf") if known.size else (math.nan, math.nan)
    return Move(second.log2_tasks - first.log2_tasks, float(low), float(high))
