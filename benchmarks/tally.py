"""What every side scored on every set and seed, and the rows that compare ours with the best of others."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from benchmarks import report
from benchmarks.sides import Judged

LOSS_POINTS = 0.5
"""A set on which we are behind by more is named in the row."""

MAX_NAMED = 6


@dataclass
class Tally:
    """Scores of one part: by size (k, or examples a class), side, set; one a seed."""

    scores: dict[tuple[int, str], dict[str, list[Judged]]] = field(default_factory=dict)

    def add(self, size: int, name: str, judged: dict[str, Judged]) -> None:
        for side, one in judged.items():
            self.scores.setdefault((size, side), {}).setdefault(name, []).append(one)

    @property
    def sizes(self) -> list[int]:
        return sorted({size for size, _ in self.scores})

    def sets(self, size: int, side: str) -> list[str]:
        return sorted(self.scores.get((size, side), {}))

    def values(self, size: int, side: str, metric: str, sets: Sequence[str] | None = None) -> np.ndarray:
        """[sets, seeds]."""
        of_set = self.scores[size, side]
        return np.array([[getattr(one, metric) for one in of_set[name]] for name in sets or sorted(of_set)], float)

    def mean(self, size: int, side: str, metric: str = "accuracy", sets: Sequence[str] | None = None) -> float:
        return float(self.values(size, side, metric, sets).mean())

    def best(self, size: int, sides: Sequence[str], metric: str = "accuracy", sets: Sequence[str] | None = None) -> str:
        """The side with the best mean: the highest accuracy, the lowest of the errors."""
        sign = 1 if metric in ("accuracy", "macro") else -1
        return max(sides, key=lambda side: sign * self.mean(size, side, metric, sets))


@dataclass(frozen=True)
class Difference:
    """Ours minus another side's, in points of a hundred, on the same draws."""

    points: float
    standard_error: float
    """Of the mean over sets x seeds, paired."""
    per_set: dict[str, float]
    num_sets: int
    num_seeds: int
    unit: str = "sets"
    """What the sets are called."""

    @classmethod
    def of(
        cls,
        tally: Tally,
        size: int,
        ours: str,
        against: str,
        metric: str = "accuracy",
        sets: Sequence[str] | None = None,
    ) -> "Difference":
        names = list(sets or tally.sets(size, ours))
        values = 100 * (tally.values(size, ours, metric, names) - tally.values(size, against, metric, names))
        error = float(values.std(ddof=1) / np.sqrt(values.size)) if values.size > 1 else 0.0
        per_set = dict(zip(names, values.mean(1).round(2).tolist(), strict=True))
        return cls(float(values.mean()), error, per_set, *values.shape)

    def __str__(self) -> str:
        sets = f"{self.num_sets} {self.unit} x " if self.num_sets > 1 else ""
        return f"{self.points:+.1f} points (se {self.standard_error:.1f}; {sets}{self.num_seeds} seeds)"

    @property
    def losses(self) -> str:
        """The sets where we are behind, worst first, as a phrase; only counted where they are many."""
        behind = sorted((value, name) for name, value in self.per_set.items() if value < -LOSS_POINTS)
        if len(behind) > MAX_NAMED:
            return f"; behind on {len(behind)} of {self.num_sets}, most on {behind[0][1]} {-behind[0][0]:.1f}"
        return "; behind on " + ", ".join(f"{name} {-value:.1f}" for value, name in behind) if behind else ""


def accuracy_row(
    tally: Tally,
    size: int,
    ours: str,
    others: Sequence[str],
    *,
    id: str,
    what: str,
    sets: Sequence[str] | None = None,
    more: str = "",
    of: str = "sets",
    detail: bool = False,
) -> report.Row:
    """Our mean accuracy against the best of the others by its mean, chosen afterwards."""
    best = tally.best(size, others, sets=sets)
    difference = replace(Difference.of(tally, size, ours, best, sets=sets), unit=of)
    per_set = difference.per_set if difference.num_sets > 1 else {}
    note = f"{difference} against {best}{difference.losses if per_set else ''}{more}"
    extra = {"points": round(difference.points, 3), "standard_error": round(difference.standard_error, 3)}
    mean, against = tally.mean(size, ours, sets=sets), tally.mean(size, best, sets=sets)
    return report.rate(
        id,
        what,
        mean,
        against,
        "accuracy",
        note,
        detail=detail,
        extra={**extra, "per_set": per_set} if per_set else extra,
    )


def calibration_row(tally: Tally, size: int, ours: str, others: Sequence[str], *, id: str, what: str) -> report.Row:
    """Our expected calibration error against the lowest of the others; the note has all, and the proper scores."""
    best = tally.best(size, others, "ece")
    sides = {"ours": ours, **{other: other for other in others}}
    notes = [
        f"{metric.replace('_', ' ')} "
        + ", ".join(f"{name} {tally.mean(size, side, metric):.3f}" for name, side in sides.items())
        for metric in ("log_loss", "brier")
    ]
    others_said = [f"{other} {tally.mean(size, other, 'ece'):.3f}" for other in others if other != best]
    note = "; ".join([f"against {best}" + "".join(f" ({said})" for said in others_said), *notes])
    return report.duration(id, what, tally.mean(size, ours, "ece"), tally.mean(size, best, "ece"), "ECE", note)
