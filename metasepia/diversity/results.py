"""A finished sweep's table beside its trials: figures of each, and groups of trials that differ in M and seed alone."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float

from metasepia.diversity.measures import ESTIMATORS, block_metric
from metasepia.diversity.trial import DiversityTrial
from metasepia.errors import CorruptArtefact

_FOLLOWERS = {"dims": ("points", "noise_variance"), "layers": ("width", "heads")}
"""Fields that are told together with another where they change with it."""
Key = tuple[int, str, str, int, int]


class Results:
    """The table by (trial, metric, split, position, step). A figure that is not there is NaN.

    Raises CorruptArtefact for a table that names other trials.
    """

    def __init__(self, trials: Sequence[DiversityTrial], table: pa.Table) -> None:
        self.trials = tuple(trials)
        columns = [table.column(name).to_pylist() for name in ("trial", "metric", "split", "position", "step")]
        keys: list[Key] = list(zip(*columns, strict=True))
        if any(not 0 <= key[0] < len(self.trials) for key in keys):
            raise CorruptArtefact("table.parquet", f"it names trials beyond the sweep's {len(self.trials)}")
        self._values = dict(zip(keys, table.column("value").to_pylist(), strict=True))
        self.num_rows = table.num_rows
        self.steps: dict[int, tuple[int, ...]] = {
            i: tuple(sorted({key[4] for key in own})) for i, own in _by_trial(keys, len(self.trials)).items()
        }
        self.diverged = {key[0]: int(value) for key, value in self._values.items() if key[1] == "diverged"}
        """Trials whose loss stopped being finite, and at which step."""
        self.unfinished = {i for i, steps in self.steps.items() if self.trials[i].num_steps not in steps}
        """Trials without rows of their last step; with the diverged ones they are left out of every mean."""

    def at(self, trial: int, metric: str, split: str = "", position: int = -1, step: int | None = None) -> float:
        """A figure; of the last step unless another is named."""
        when = self.trials[trial].num_steps if step is None else step
        return self._values.get((trial, metric, split, position, when), math.nan)

    def curve(self, trial: int, metric: str, split: str) -> tuple[list[int], list[float]]:
        """Steps and the figure at each, over all positions."""
        steps = self.steps[trial]
        return list(steps), [self.at(trial, metric, split, step=step) for step in steps]

    def blocks(self, trial: int, metric: str, split: str) -> Float[np.ndarray, " blocks"]:
        """Means of the blocks of evaluation sequences, after the last step."""
        num_blocks = self.trials[trial].measured_blocks
        return np.array([self.at(trial, block_metric(metric, b), split) for b in range(num_blocks)])

    @cached_property
    def groups(self) -> tuple["Group", ...]:
        """Trials that differ in M and seed alone, in order of appearance."""
        found: dict[tuple[tuple[str, Any], ...], list[int]] = {}
        for i, trial in enumerate(self.trials):
            found.setdefault(_setting(trial), []).append(i)
        varying = self.axes.keys()
        return tuple(
            Group(self, tuple(members), {name: value for name, value in setting if name in varying})
            for setting, members in found.items()
        )

    @cached_property
    def axes(self) -> dict[str, list[Any]]:
        """What differs between groups, ascending; fields that follow another are left out (`followers`)."""
        fields = [one.name for one in dataclasses.fields(DiversityTrial) if one.name not in ("num_tasks", "seed")]
        values = {name: sorted({getattr(trial, name) for trial in self.trials}, key=_order) for name in fields}
        found = {name: own for name, own in values.items() if len(own) > 1}
        return {name: own for name, own in found.items() if self._leader(name, found) is None}

    def followers(self, axis: str) -> tuple[str, ...]:
        """Fields that are a function of this axis, as points and noise of the dimension."""
        return tuple(name for name in _FOLLOWERS.get(axis, ()) if self._leader(name, self.axes) == axis)

    def _leader(self, name: str, found: Mapping[str, Any]) -> str | None:
        for leader, followers in _FOLLOWERS.items():
            if name in followers and leader in found:
                pairs = {(getattr(trial, leader), getattr(trial, name)) for trial in self.trials}
                if len(pairs) == len({one for one, _ in pairs}) > 1 and len({other for _, other in pairs}) > 1:
                    return leader
        return None


@dataclass(frozen=True)
class Group:
    """Trials of one setting: a curve over M, with seeds."""

    results: Results
    members: tuple[int, ...]
    setting: Mapping[str, Any]
    """The axes' values that set it apart; empty where there is one group."""

    @property
    def label(self) -> str:
        return ", ".join(f"{words_of(name)} {spelled(name, value)}" for name, value in self.setting.items())

    @property
    def problem(self) -> str:
        return self.results.trials[self.members[0]].problem

    @property
    def first(self) -> DiversityTrial:
        return self.results.trials[self.members[0]]

    @property
    def estimators(self) -> tuple[str, str]:
        """Names in the table: the one that knows the pool, the one that knows the prior."""
        return ESTIMATORS[self.problem]

    @cached_property
    def by_tasks(self) -> dict[int | None, tuple[int, ...]]:
        """Trials for each M, ascending; infinite (None) last. Diverged and unfinished ones are left out."""
        left_out = self.results.diverged.keys() | self.results.unfinished
        alive = [i for i in self.members if i not in left_out]
        sizes = sorted({self.results.trials[i].num_tasks for i in alive}, key=_order)
        return {m: tuple(i for i in alive if self.results.trials[i].num_tasks == m) for m in sizes}

    @property
    def finite(self) -> tuple[int, ...]:
        return tuple(m for m in self.by_tasks if m is not None)

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(sorted({self.results.trials[i].seed for i in self.members}))

    def seed_values(self, metric: str, split: str, num_tasks: int | None, **where: int) -> list[float]:
        """The figure of each seed's model."""
        return [self.results.at(i, metric, split, **where) for i in self.by_tasks.get(num_tasks, ())]

    def mean(self, metric: str, split: str, num_tasks: int | None, **where: int) -> float:
        """Over seeds; NaN where there is none."""
        values = self.seed_values(metric, split, num_tasks, **where)
        return float(np.mean(values)) if values else math.nan

    def blocks(self, metric: str, split: str) -> Float[np.ndarray, "tasks seeds blocks"]:
        """Block means of the last step for every finite M and seed; NaN where a trial is missing or diverged."""
        made = np.full((len(self.finite), len(self.seeds), self.first.measured_blocks), np.nan)
        for m, num_tasks in enumerate(self.finite):
            for i in self.by_tasks[num_tasks]:
                made[m, self.seeds.index(self.results.trials[i].seed)] = self.results.blocks(i, metric, split)
        return made


def _by_trial(keys: Sequence[Key], num_trials: int) -> dict[int, list[Key]]:
    found: dict[int, list[Key]] = {i: [] for i in range(num_trials)}
    for key in keys:
        found[key[0]].append(key)
    return found


def _setting(trial: DiversityTrial) -> tuple[tuple[str, Any], ...]:
    return tuple((name, value) for name, value in trial.to_json().items() if name not in ("num_tasks", "seed"))


def _order(value: Any) -> tuple[bool, Any]:
    return (value is None, 0 if value is None else value)


_WORDS = {
    "num_tasks": "tasks",
    "dims": "dimension",
    "points": "points",
    "noise_variance": "noise variance",
    "weight_decay": "weight decay",
    "num_steps": "steps",
    "batch_size": "batch",
    "learning_rate": "learning rate",
    "warmup_share": "warm-up share",
}


def words_of(name: str) -> str:
    """A field of a trial, for people."""
    return _WORDS.get(name, name.replace("_", " "))


def spelled(name: str, value: Any) -> str:
    """A value of a field, for people."""
    if name == "num_tasks":
        return tasks_spelled(value)
    if isinstance(value, int) and value >= 10_000:
        return f"{value:,}".replace(",", " ")  # a thin space
    return f"{value:g}" if isinstance(value, float) else str(value)


def tasks_spelled(num_tasks: int | None) -> str:
    """4, 4096, or infinite."""
    return "infinite" if num_tasks is None else f"{num_tasks:,}".replace(",", " ")
