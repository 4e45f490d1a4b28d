"""What a sweep will run: trials in an order fixed by index, and packs of trials that are trained together.

Nothing here depends on how many workers there are or on what finishes first, so the same plan gives the same table.
"""

import dataclasses
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import pyarrow as pa
from torch import Tensor

from metasepia.digests import canonical_json, digest_of
from metasepia.errors import CorruptArtefact, InvalidSettings

MAX_TRIALS = 1_000_000


@runtime_checkable
class PackWork(Protocol):
    """One pack of trials in one process: a deterministic function of its trials and of nothing else.

    It is constructed with (trials, device), device as torch spells it, and its results may depend neither on how
    `advance` is cut into calls nor on whether `restore` came between. A trial that diverges is recorded in `measure`
    (status "diverged", value NaN) and disturbs no neighbour. An exception fails the whole pack.
    """

    def __init__(self, trials: Sequence[Mapping[str, Any]], device: str) -> None: ...

    @property
    def step(self) -> int:
        """Where it is; 0 at first."""
        ...

    @property
    def stops(self) -> tuple[int, ...]:
        """Steps at which it is measured and kept, ascending; the last is the end. May begin with 0."""
        ...

    def advance(self, until: int) -> None:
        """Trains up to step `until`; nothing where it is there already."""
        ...

    def measure(self) -> pa.Table:
        """Figures at this step, with the columns of `metasepia.sweeps.store.ROWS`; `trial` is the place in the pack."""
        ...

    def state(self) -> dict[str, Tensor]:
        """All that `restore` needs to go on to the same bytes."""
        ...

    def restore(self, state: dict[str, Tensor]) -> None: ...


@dataclass(frozen=True)
class SweepPlan:
    """Trials by index, and which of them train together. Raises InvalidSettings where these contradict each other."""

    kind: str
    """What is swept: `[a-z0-9-]`, as "task-diversity" or "instructions"."""
    settings: Mapping[str, Any]
    """What holds for all trials; JSON."""
    trials: tuple[Mapping[str, Any], ...]
    """The settings of each trial; JSON."""
    packs: tuple[tuple[int, ...], ...]
    """Indices of trials; each trial is in one pack."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,63}", self.kind):
            raise InvalidSettings("kind", self.kind, "1 to 64 of a-z, 0-9 and -")
        if not 1 <= len(self.trials) <= MAX_TRIALS:
            raise InvalidSettings("trials", len(self.trials), f"from 1 to {MAX_TRIALS} of them")
        named = [index for one in self.packs for index in one]
        if not all(self.packs) or sorted(named) != list(range(len(self.trials))):
            raise InvalidSettings("packs", self.packs[:4], "lists, none empty, that name each trial once")
        try:
            canonical_json(self._content())
        except (TypeError, ValueError) as error:
            raise InvalidSettings(
                "plan", self.kind, f"what JSON can spell, without NaN or infinity ({error})"
            ) from None

    def _content(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("kind", "settings", "trials", "packs")}

    @cached_property
    def digest(self) -> str:
        """sha256 of its canonical JSON: two plans with one digest are the same sweep."""
        return digest_of(self._content())

    def to_json(self) -> dict[str, Any]:
        """Lists and dictionaries only; `from_json` gives back a plan of the same digest."""
        return json.loads(canonical_json(self._content()))

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "SweepPlan":
        """Raises CorruptArtefact for what is no plan."""
        try:
            names = {field.name for field in dataclasses.fields(cls)}
            if set(value) != names:
                raise ValueError(f"it has the fields {', '.join(sorted(value))}, not {', '.join(sorted(names))}")
            trials = tuple(dict(one) for one in value["trials"])
            packs = tuple(tuple(int(index) for index in one) for one in value["packs"])
            return cls(value["kind"], dict(value["settings"]), trials, packs)
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptArtefact("the sweep's plan", str(error)) from error

    def trials_of(self, pack_index: int) -> list[Mapping[str, Any]]:
        """The trials of one pack, in the pack's order."""
        return [self.trials[index] for index in self.packs[pack_index]]


def grid(axes: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Every combination, the last axis turning fastest; the order is that of the axes and of their values.

    Raises InvalidSettings for no axes, an axis without values, or one with the same value twice.
    """
    if not axes:
        raise InvalidSettings("axes", {}, "at least one axis with at least one value")
    for name, values in axes.items():
        if isinstance(values, str) or not len(values):
            raise InvalidSettings(f"axis {name}", values, "a list of at least one value")
        spelled = [canonical_json(value) for value in values]
        if len(set(spelled)) < len(spelled):
            raise InvalidSettings(f"axis {name}", list(values), "a list in which no value comes twice")
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def pack(trials: Sequence[Mapping[str, Any]], same: Sequence[str], size: int) -> tuple[tuple[int, ...], ...]:
    """Packs of at most `size` trials that agree in every field named by `same`, fixed by the trials' order alone.

    Within a pack the indices ascend; packs are ordered by their first trial. The trials of one kind are spread evenly:
    17 of them in packs of at most 16 make 9 and 8. Raises InvalidSettings for a field that a trial lacks.
    """
    if not size >= 1:
        raise InvalidSettings("size", size, "at least 1")
    alike: dict[bytes, list[int]] = {}
    for index, trial in enumerate(trials):
        lacking = [name for name in same if name not in trial]
        if lacking:
            raise InvalidSettings("same", lacking[0], f"fields that every trial has; trial {index} lacks this one")
        alike.setdefault(canonical_json([trial[name] for name in same]), []).append(index)
    packs = []
    for members in alike.values():
        number = -(-len(members) // size)
        edges = [len(members) * i // number for i in range(number + 1)]
        packs += [tuple(members[a:b]) for a, b in itertools.pairwise(edges)]
    return tuple(sorted(packs))


def check_pack(trials: Sequence[Any], same: Sequence[str]) -> None:
    """Raises InvalidSettings for a pack without trials, or one in which two differ in a setting named by `same`."""
    if not trials:
        raise InvalidSettings("trials", (), "one or more")
    for trial in trials:
        for name in same:
            if getattr(trial, name) != getattr(trials[0], name):
                allowed = f"{getattr(trials[0], name)!r}, as its pack's first"
                raise InvalidSettings(name, getattr(trial, name), allowed)
