"""Running centroids of hidden states: where the prompts of a task lie, whether they move, how far tasks lie apart.

A causal model's hidden states fall into clusters by task (Wu and Varshney, arXiv:2402.12151), so a task that is sent
other texts than before is seen in its centroid. For each task, adapter, layer and pooling are kept

    total       count, mean and scatter of all states; parts are joined as in Chan, Golub and LeVeque (1983), which for
                parts of one state is Welford's recurrence
    reference   the same of the first states, at least `reference_count`
    recent      the exponentially weighted mean of the last states, worth `window` of equal weight

*Drift* is the distance from the reference's mean (or from a registered centroid) to the recent mean, in units of the
reference's spread, which is the root mean square distance of its states to their mean. *Separation* of a task from the
others is the simplified silhouette (Vendramin, Campello and Hruschka, 2010) on root mean square distances, which needs
no stored states: 1 - a / b, a of the task's states to their own mean, b to the nearest mean of another task. *Quality*
of a layer is its tasks' mean separation. numpy only; a centroid takes 24 bytes for each number of the hidden size.
"""

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from metasepia.errors import CorruptArtefact, InvalidRequest
from metasepia.experts.mixing import mixture_digest
from metasepia.rows import Adapter

Pooling = Literal["mean", "last"]

ROUTED = "auto:"
"""Begins the tasks that `auto` feeds, `auto:<expert>`; no client can spell one, since task names have no colon."""
_FORMAT = "metasepia online centroids 1"
_TINY = 1e-6
"""Least spread, as a share of the reference's norm: constant states (layer 0 at a fixed token) have none."""


@dataclass(frozen=True, kw_only=True)
class CentroidLimits:
    """How much is kept, and of how many states each part is made. Defaults are in `cluster.settings`."""

    max_tasks: int
    max_centroids: int
    """Of all tasks, adapters, layers and poolings together."""
    reference_count: int
    window: int

    @property
    def decay(self) -> float:
        """By which a state's weight falls with each later one: (1 + decay) / (1 - decay) is `window`."""
        return (self.window - 1) / (self.window + 1)


@dataclass(frozen=True, order=True, kw_only=True)
class CentroidKey:
    """Which states belong together."""

    backbone: str
    """Digest."""
    task: str
    adapter: str
    """Digest of the expert or mixture that the states were computed with; empty for the base weights."""
    layer: int
    """From 0, the embedding, to the number of blocks; never negative, so that a layer has one spelling."""
    pooling: Pooling

    @property
    def is_routed(self) -> bool:
        """Fed by `auto`, not by a client that named the task."""
        return self.task.startswith(ROUTED)


Group = tuple[str, str, int, Pooling, bool]
"""(backbone, adapter, layer, pooling, is_routed): tasks whose centroids are compared with each other."""


def group_of(key: CentroidKey) -> Group:
    return key.backbone, key.adapter, key.layer, key.pooling, key.is_routed


def adapter_digest(adapter: Adapter) -> str:
    """Of what a row was executed with: the expert's digest, the mixture's, or empty for the base weights."""
    if not adapter:
        return ""
    return adapter[0][0] if len(adapter) == 1 and adapter[0][1] == 1.0 else mixture_digest(adapter)


@dataclass(frozen=True, kw_only=True, eq=False)
class Cloud:
    """Count, mean and scatter of states."""

    count: int
    mean: Float[np.ndarray, " hidden"]
    """float64"""
    scatter: float
    """Sum of the squared distances to the mean."""

    @classmethod
    def of(cls, states: Float[np.ndarray, "states hidden"]) -> "Cloud":
        states = states.astype(np.float64)
        mean = states.mean(0)
        return cls(count=len(states), mean=mean, scatter=float(((states - mean) ** 2).sum()))

    def joined(self, other: "Cloud") -> "Cloud":
        """Of both; the same bits whichever comes first."""
        count = self.count + other.count
        between = float(((other.mean - self.mean) ** 2).sum())
        return Cloud(
            count=count,
            mean=(self.count * self.mean + other.count * other.mean) / count,
            scatter=self.scatter + other.scatter + between * (self.count * other.count / count),
        )

    @property
    def spread(self) -> float:
        """Root mean square distance to the mean, unbiased in its square; 0 for a single state."""
        return math.sqrt(self.scatter / (self.count - 1)) if self.count > 1 else 0.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Recent:
    """An exponentially weighted mean; the last state has weight 1."""

    count: int
    weight: float
    squares: float
    """Sum of the squared weights."""
    mean: Float[np.ndarray, " hidden"]
    """float64"""

    @classmethod
    def of(cls, states: Float[np.ndarray, "states hidden"], decay: float) -> "Recent":
        """Of states in the order of their coming."""
        weights = decay ** np.arange(len(states) - 1, -1, -1, dtype=np.float64)
        total = float(weights.sum())
        mean = weights @ states.astype(np.float64) / total
        return cls(count=len(states), weight=total, squares=float((weights**2).sum()), mean=mean)

    def then(self, later: "Recent", decay: float) -> "Recent":
        """As if `later`'s states had come one by one after these."""
        old = decay**later.count
        weight = old * self.weight + later.weight
        return Recent(
            count=self.count + later.count,
            weight=weight,
            squares=old**2 * self.squares + later.squares,
            mean=(old * self.weight * self.mean + later.weight * later.mean) / weight,
        )

    @property
    def worth(self) -> float:
        """How many states of equal weight tell as much."""
        return self.weight**2 / self.squares


@dataclass(frozen=True, kw_only=True, eq=False)
class Centroid:
    """What is kept for one key."""

    total: Cloud
    recent: Recent
    reference: Cloud | None = None
    """None until enough states have come."""
    registered: Float[np.ndarray, " hidden"] | None = None
    """float32: where the card of the expert that the task is named after says that its prompts lie; drift is then
    counted from there."""

    @classmethod
    def of(
        cls,
        states: Float[np.ndarray, "states hidden"],
        decay: float,
        registered: Float[np.ndarray, " hidden"] | None = None,
    ) -> "Centroid":
        return cls(total=Cloud.of(states), recent=Recent.of(states, decay), registered=registered)

    def then(self, later: "Centroid", decay: float) -> "Centroid":
        """Associative: exactly in the counts, to rounding in the rest."""
        return Centroid(
            total=self.total.joined(later.total),
            recent=self.recent.then(later.recent, decay),
            reference=self.reference or later.reference,
            registered=self.registered if later.registered is None else later.registered,
        )

    def settled(self, reference_count: int) -> "Centroid":
        """With what came so far as the reference, if that is enough and there is none yet."""
        if self.reference is not None or self.total.count < reference_count:
            return self
        return dataclasses.replace(self, reference=self.total)

    @property
    def drift(self) -> float | None:
        """In spreads of the reference; None while there is no reference."""
        if self.reference is None:
            return None
        return self.distance(self.recent.mean)

    @property
    def chance(self) -> float | None:
        """What `drift` is about without any: the recent mean is one of few states, and so is the reference's."""
        if self.reference is None:
            return None
        return math.sqrt(1 / self.recent.worth + (0 if self.registered is not None else 1 / self.reference.count))

    def distance(self, point: Float[np.ndarray, " hidden"]) -> float:
        """From the reference (before there is one, from the mean) to a point, in spreads."""
        known = self.reference or self.total
        origin = known.mean if self.registered is None else self.registered.astype(np.float64)
        away = float(np.linalg.norm(point - origin))
        least = _TINY * float(np.linalg.norm(origin))
        return away / max(known.spread, least) if away > 0 else 0.0


@dataclass(frozen=True, kw_only=True)
class CentroidFacts:
    """What is told of a centroid: in answers, lists and gauges."""

    key: CentroidKey
    count: int
    spread: float
    drift: float | None
    chance: float | None
    separation: float | None
    """None where there is no other task to be told apart from."""


@dataclass(frozen=True, kw_only=True, eq=False)
class KnownMean:
    """A centroid as `auto` may use it."""

    key: CentroidKey
    count: int
    spread: float
    mean: Float[np.ndarray, " hidden"]
    """float32"""


class OnlineCentroids:
    """Centroids by key, bounded in number. Merging is associative, and the same merges give the same bytes."""

    def __init__(self, limits: CentroidLimits) -> None:
        self.limits = limits
        self._kept: dict[CentroidKey, Centroid] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def __iter__(self) -> Iterator[tuple[CentroidKey, Centroid]]:
        """In order of the keys."""
        return iter(sorted(self._kept.items(), key=lambda item: item[0]))

    def __getitem__(self, key: CentroidKey) -> Centroid:
        return self._kept[key]

    def get(self, key: CentroidKey) -> Centroid | None:
        return self._kept.get(key)

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(sorted({key.task for key in self._kept}))

    def observe(
        self,
        key: CentroidKey,
        states: Float[np.ndarray, "states hidden"],
        registered: Float[np.ndarray, " hidden"] | None = None,
    ) -> None:
        """States, in the order of their coming. Raises InvalidRequest where there is no room, for NaN and infinity."""
        if not len(states):
            return
        if not np.isfinite(states).all():
            raise InvalidRequest("states", f"those for the task {key.task} hold NaN or infinity")
        self.check_room((key,))
        self._add(key, Centroid.of(states, self.limits.decay, registered))

    def merge(self, later: Iterable[tuple[CentroidKey, Centroid]]) -> int:
        """Adds what another place has seen, as if it had come after all that is here.

        Returns how many keys were left out because there is no room for them.
        """
        left_out = 0
        for key, centroid in later:
            try:
                self.check_room((key,))
            except InvalidRequest:
                left_out += 1
            else:
                self._add(key, centroid)
        return left_out

    def _add(self, key: CentroidKey, later: Centroid) -> None:
        before = self._kept.get(key)
        both = later if before is None else before.then(later, self.limits.decay)
        self._kept[key] = both.settled(self.limits.reference_count)

    def check_room(self, keys: Sequence[CentroidKey]) -> None:
        """Raises InvalidRequest, naming `task`, unless all the keys are kept already or can be."""
        new = {key for key in keys if key not in self._kept}
        if not new:
            return
        tasks = {key.task for key in self._kept}
        num_tasks, num_kept = len(tasks | {key.task for key in new}), len(self._kept) + len(new)
        way_out = "delete one with DELETE /v1/hidden_states/tasks/{task}, or let the setting be larger"
        if num_tasks > self.limits.max_tasks and not {key.task for key in new} <= tasks:
            limit = f"centroids.max_tasks is {self.limits.max_tasks}"
            raise InvalidRequest("task", f"{len(tasks)} tasks are kept and {limit}; {way_out}")
        if num_kept > self.limits.max_centroids:
            limit = f"centroids.max_centroids is {self.limits.max_centroids}"
            raise InvalidRequest(
                "task", f"{len(self._kept)} centroids are kept, {len(new)} more are needed and {limit}; {way_out}"
            )

    def forget(self, task: str) -> int:
        """Drops all of a task; returns how many centroids it had."""
        gone = [key for key in self._kept if key.task == task]
        for key in gone:
            del self._kept[key]
        return len(gone)

    # -- what is told --------------------------------------------------------------------------------------------------

    def facts(self, keys: Iterable[CentroidKey] | None = None) -> tuple[CentroidFacts, ...]:
        """Of these keys, or of all; in order."""
        wanted = set(self._kept) if keys is None else {key for key in keys if key in self._kept}
        groups: dict[Group, dict[CentroidKey, Cloud]] = {group_of(key): {} for key in wanted}
        for key, kept in self:
            if (members := groups.get(group_of(key))) is not None:
                members[key] = kept.total
        separations = {key: one for members in groups.values() for key, one in separation_of(members).items()}
        return tuple(
            CentroidFacts(
                key=key,
                count=kept.total.count,
                spread=kept.total.spread,
                drift=kept.drift,
                chance=kept.chance,
                separation=separations.get(key),
            )
            for key, kept in self
            if key in wanted
        )

    def known_means(self, backbone: str, min_count: int) -> tuple[KnownMean, ...]:
        """Of what clients named, with the base weights: what `auto` could route by."""
        return tuple(
            KnownMean(key=key, count=one.total.count, spread=one.total.spread, mean=one.total.mean.astype(np.float32))
            for key, one in self
            if key.backbone == backbone and not key.adapter and not key.is_routed and one.total.count >= min_count
        )

    # -- on disk -------------------------------------------------------------------------------------------------------

    def to_bytes(self) -> bytes:
        """safetensors; the same centroids give the same bytes."""
        tensors: dict[str, np.ndarray] = {}
        entries: list[dict[str, Any]] = []
        for number, (key, one) in enumerate(self):
            clouds = {"total": one.total} | ({} if one.reference is None else {"reference": one.reference})
            entry: dict[str, Any] = {"key": dataclasses.asdict(key)}
            for name, cloud in clouds.items():
                tensors[f"{number}/{name}"] = cloud.mean
                entry[name] = [cloud.count, cloud.scatter]
            tensors[f"{number}/recent"] = one.recent.mean
            entry["recent"] = [one.recent.count, one.recent.weight, one.recent.squares]
            if one.registered is not None:
                tensors[f"{number}/registered"] = one.registered.astype(np.float32)
            entries.append(entry)
        return save(tensors, {_FORMAT: json.dumps(entries)})  # one key: safetensors writes several in any order

    @classmethod
    def of_file(cls, path: str, limits: CentroidLimits) -> "OnlineCentroids":
        """What `to_bytes` wrote; beyond the limits, tasks that come last by name are left out.

        Under another `window` than it was written with, recent means fade from now on at the new rate. Raises
        CorruptArtefact, FileNotFoundError.
        """
        kept = cls(limits)
        try:
            with safe_open(path, "numpy") as file:
                header: Mapping[str, str] = file.metadata() or {}
                if _FORMAT not in header:
                    raise CorruptArtefact(path, f"it is no file of {_FORMAT!r}")
                names = set(file.keys())
                kept.merge(
                    _entry(entry, {n: file.get_tensor(f"{number}/{n}") for n in _NAMES if f"{number}/{n}" in names})
                    for number, entry in enumerate(json.loads(header[_FORMAT]))
                )
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, CorruptArtefact):
                raise
            raise CorruptArtefact(path, f"it does not hold centroids ({error!r})") from error
        return kept


def separation_of(members: Mapping[CentroidKey, Cloud]) -> dict[CentroidKey, float]:
    """Of each task from the nearest other one, in [0, 1); empty for fewer than two."""
    if len(members) < 2:
        return {}
    means = np.stack([one.mean for one in members.values()])
    means -= means.mean(0)  # a common offset many times the differences would cost digits
    norms = (means**2).sum(1)
    between = np.maximum(norms[:, None] + norms[None] - 2 * means @ means.T, 0.0)
    np.fill_diagonal(between, np.inf)
    found: dict[CentroidKey, float] = {}
    for (key, one), nearest in zip(members.items(), between.min(1), strict=True):
        own = one.scatter / one.count
        found[key] = 1 - math.sqrt(own / (own + nearest)) if nearest > 0 else 0.0
    return found


_NAMES = ("total", "reference", "recent", "registered")


def _entry(entry: Mapping[str, Any], means: Mapping[str, np.ndarray]) -> tuple[CentroidKey, Centroid]:
    clouds = {
        name: Cloud(count=int(entry[name][0]), mean=means[name], scatter=float(entry[name][1]))
        for name in ("total", "reference")
        if name in entry
    }
    count, weight, squares = entry["recent"]
    if not all(np.isfinite(one).all() and one.ndim == 1 for one in means.values()) or not weight > 0 or not squares > 0:
        raise ValueError("numbers that cannot be a centroid's")
    return CentroidKey(**entry["key"]), Centroid(
        total=clouds["total"],
        reference=clouds.get("reference"),
        recent=Recent(count=int(count), weight=float(weight), squares=float(squares), mean=means["recent"]),
        registered=means.get("registered"),
    )
