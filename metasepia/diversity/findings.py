"""What a finished sweep says: crossings and how they move, bounds that hold or do not; each is computed from the table.

Crossings follow Raventos et al. (arXiv:2306.15063) in two ways. By distance: the M from which a model is nearer ridge
than dMMSE. By budget, the paper's own criterion: the M from which more training (steps or batch) brings the model
nearer to ridge on new tasks instead of farther; it needs a sweep with such an axis.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from metasepia.diversity.crossing import Crossing, Move, crossing_of, move_between
from metasepia.diversity.measures import SPLITS
from metasepia.diversity.profiles import PROFILES
from metasepia.diversity.results import Group, Results, spelled, words_of

SPLIT_WORDS = {"pretraining": "pretraining tasks", "new": "new tasks"}
MEMORISED = 4
"""The number of tasks at which a model is held to have kept its tasks."""
BUDGETS = ("num_steps", "batch_size")


@dataclass(frozen=True)
class Claim:
    """A figure with the bound that it is held to."""

    id: str
    what: str
    value: float
    bound: str
    holds: bool | None
    """None: the sweep has no such models."""
    note: str = ""


@dataclass(frozen=True)
class Moved:
    """One axis between two neighbouring values, all other axes the same."""

    axis: str
    values: tuple[Any, Any]
    rest: str
    """The other axes' values, in words; empty where there are none."""
    split: str
    move: Move


@dataclass(frozen=True)
class ByBudget:
    """The paper's criterion between two budgets."""

    axis: str
    values: tuple[Any, Any]
    rest: str
    crossing: Crossing


class Findings:
    def __init__(self, results: Results, profile: str = "") -> None:
        self.results, self.profile = results, profile

    @cached_property
    def crossings(self) -> dict[tuple[int, str], Crossing | None]:
        """By group and split; None where a group has fewer than two finite M."""
        made: dict[tuple[int, str], Crossing | None] = {}
        for g, group in enumerate(self.results.groups):
            of_pool, of_prior = group.estimators
            for split in SPLITS:
                made[g, split] = crossing_of(
                    group.blocks(f"delta_{of_pool}", split), group.blocks(f"delta_{of_prior}", split), group.finite
                )
        return made

    @cached_property
    def moves(self) -> list[Moved]:
        """How the crossing moves along each axis."""
        made: list[Moved] = []
        for axis, low, high in self._neighbours():
            values = (self._value(low, axis), self._value(high, axis))
            for split in SPLITS:
                first, second = self.crossings[low, split], self.crossings[high, split]
                if first is not None and second is not None:
                    made.append(Moved(axis, values, self._rest(low, axis), split, move_between(first, second)))
        return made

    @cached_property
    def by_budget(self) -> list[ByBudget]:
        """The paper's own criterion, on new tasks, wherever two groups differ in steps or batch alone."""
        made: list[ByBudget] = []
        for axis, low, high in self._neighbours():
            less, more = self.results.groups[low], self.results.groups[high]
            sizes = [m for m in less.finite if m in more.finite]
            if axis not in BUDGETS or less.seeds != more.seeds:
                continue
            metric = f"delta_{less.estimators[1]}"
            rows = [np.array([group.finite.index(m) for m in sizes], dtype=int) for group in (less, more)]
            found = crossing_of(less.blocks(metric, "new")[rows[0]], more.blocks(metric, "new")[rows[1]], sizes)
            if found is not None:
                values = (self._value(low, axis), self._value(high, axis))
                made.append(ByBudget(axis, values, self._rest(low, axis), found))
        return made

    def _neighbours(self) -> list[tuple[str, int, int]]:
        """Pairs of groups one step apart on one axis and alike on all others."""
        groups = self.results.groups
        found: list[tuple[str, int, int]] = []
        for axis, values in self.results.axes.items():
            for low, group in enumerate(groups):
                place = values.index(self._value(low, axis))
                for high, other in enumerate(groups):
                    alike = all(
                        group.setting[name] == other.setting[name] for name in self.results.axes if name != axis
                    )
                    if alike and values.index(self._value(high, axis)) == place + 1:
                        found.append((axis, low, high))
        return found

    def _value(self, group: int, axis: str) -> Any:
        return self.results.groups[group].setting[axis]

    def _rest(self, group: int, axis: str) -> str:
        setting = self.results.groups[group].setting
        return ", ".join(f"{words_of(n)} {spelled(n, v)}" for n, v in setting.items() if n != axis)

    @cached_property
    def claims(self) -> list[Claim]:
        """Bounds on the first group of a linear sweep, and the paper's word on the dimension where it is an axis."""
        group = self.results.groups[0]
        if group.problem != "linear":
            return []
        excess = PROFILES[self.profile].excess if self.profile in PROFILES else 1.35
        kept = ratio(group, "delta_ridge", "delta_dmmse", "pretraining", MEMORISED)
        lost = ratio(group, "error", "ridge_error", "new", MEMORISED)
        learnt = ratio(group, "error", "ridge_error", "new", None)
        crossing = self.crossings[0, "new"]
        made = [
            _claim(
                "kept", f"M = {MEMORISED}, pretraining tasks: Delta to ridge over Delta to dMMSE", kept, at_least=5.0
            ),
            _claim("lost", f"M = {MEMORISED}, new tasks: error over ridge's", lost, at_least=2.0),
            _claim("learnt", "infinite M, new tasks: error over ridge's", learnt, at_most=excess),
        ]
        if crossing is not None:
            made.append(
                Claim(
                    "crossing",
                    "new tasks: the M from which the model is nearer ridge than dMMSE",
                    crossing.num_tasks,
                    "found, with an interval",
                    crossing.found,
                    crossing.text,
                )
            )
        made += [
            Claim(
                "dimension",
                f"crossing on new tasks from dimension {moved.values[0]} to {moved.values[1]}, doublings of M"
                + (f" ({moved.rest})" if moved.rest else ""),
                moved.move.log2_difference,
                "up, as the paper says",
                moved.move.low > 0 if math.isfinite(moved.move.log2_difference) else False,
                moved.move.text,
            )
            for moved in self.moves
            if moved.axis == "dims" and moved.split == "new"
        ]
        return made

    def beaten(self, group: Group) -> int | None:
        """The smallest M whose models are, on new tasks, nearer the prior's estimator and err less than the pool's.

        Raventos et al.'s sign that what was learned is not the Bayesian answer for the pretraining tasks.
        """
        of_pool, of_prior = group.estimators
        for m in group.finite:
            nearer = group.mean(f"delta_{of_prior}", "new", m) < group.mean(f"delta_{of_pool}", "new", m)
            if nearer and group.mean("error", "new", m) < group.mean(f"{of_pool}_error", "new", m):
                return m
        return None


def ratio(group: Group, over: str, under: str, split: str, num_tasks: int | None) -> float:
    """Of the means over seeds, after the last step; NaN where there are no such models."""
    below = group.mean(under, split, num_tasks)
    return group.mean(over, split, num_tasks) / below if below else math.nan


def seed_ratios(group: Group, over: str, under: str, split: str, num_tasks: int | None) -> list[float]:
    """The same of each seed."""
    pairs = zip(group.seed_values(over, split, num_tasks), group.seed_values(under, split, num_tasks), strict=True)
    return [a / b if b else math.nan for a, b in pairs]


def _claim(id: str, what: str, value: float, *, at_least: float | None = None, at_most: float | None = None) -> Claim:
    bound = f"at least {at_least:g}" if at_least is not None else f"at most {at_most:g}"
    if math.isnan(value):
        return Claim(id, what, value, bound, None, "no such models in this sweep")
    holds = value >= at_least if at_least is not None else value <= (at_most or math.inf)
    return Claim(id, what, value, bound, bool(holds))


def text_of(claims: Sequence[Claim]) -> str:
    """How many hold, in one sentence."""
    judged = [claim for claim in claims if claim.holds is not None]
    missed = [claim.what for claim in judged if not claim.holds]
    if not judged:
        return "No bound applies to this sweep."
    if not missed:
        return f"All {len(judged)} bounds hold."
    return f"{len(judged) - len(missed)} of {len(judged)} bounds hold; missed: {'; '.join(missed)}."
