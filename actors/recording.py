"""How a metric is kept and told: in this process, and where it is one of Ray's, through `ray.util.metrics` too.

Ray's agent on each node gives what its processes recorded, and `GET /metrics` gathers every node
(`serve/telemetry/gathering.py`). What this process recorded itself can be read here at once: `GET /v1/status` and
tests do.

A label value is a series for as long as the process lives, so each label takes a bounded number of values, those that
come first; any other one is recorded as `other`.
"""

import bisect
import functools
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import ray
from ray.util import metrics as ray_metrics

logger = logging.getLogger(__name__)

Kind = Literal["counter", "gauge", "histogram"]

OTHER = "other"
MAX_VALUES = 64
"""Of each label, unless its metric says otherwise."""
MAX_CHARS = 100
"""Of a label value; the rest is cut."""
SAMPLE_S = 1.0
"""How often gauges are asked for and told again."""
REPLICA = "replica"
"""Label of every gauge: which process says so. Gauges of several processes are added up by the reader; Ray would keep
one of them."""


@dataclass
class Distribution:
    """What a histogram has seen."""

    bounds: Sequence[float]
    counts: list[int]
    """Of each bucket, one more than there are bounds; not cumulative."""
    total: float = 0.0

    @property
    def count(self) -> int:
        return sum(self.counts)

    def quantile(self, q: float) -> float | None:
        """Linear within a bucket, as Prometheus' histogram_quantile: the last bound for what lies beyond it. None where
        nothing was seen.
        """
        count = self.count
        if count == 0:
            return None
        rank, before = q * count, 0
        for index, here in enumerate(self.counts[:-1]):
            if before + here >= rank and here:
                low = self.bounds[index - 1] if index else 0.0
                return low + (self.bounds[index] - low) * (rank - before) / here
            before += here
        return self.bounds[-1]


@dataclass(eq=False)
class Meter:
    """One metric: its declaration, and the values that this process recorded."""

    name: str
    """As Prometheus knows it, with its unit, and `_total` of counters."""
    help: str
    labels: tuple[str, ...]
    """Without `replica`, which gauges have of themselves."""
    max_values: int = MAX_VALUES
    kind: Kind = field(init=False)
    _values: dict[tuple[str, ...], Any] = field(default_factory=dict, init=False)
    _seen: tuple[set[str], ...] = field(default=(), init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)
    _remote: Any = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._seen = tuple(set() for _ in self.labels)

    @property
    def all_labels(self) -> tuple[str, ...]:
        """As they are told."""
        return self.labels

    def items(self) -> Iterator[tuple[dict[str, str], Any]]:
        """What this process recorded, series by series."""
        with self._lock:
            found = list(self._values.items())
        return ((dict(zip(self.labels, key, strict=True)), value) for key, value in found)

    def clear(self) -> None:
        """For tests: as if nothing had been recorded in this process."""
        with self._lock:
            self._values.clear()
            for seen in self._seen:
                seen.clear()

    def _key(self, labels: dict[str, str]) -> tuple[str, ...]:
        """The series, within the bounds. KeyError for a label that is missing."""
        assert len(labels) == len(self.labels), f"{self.name} has the labels {self.labels}, not {tuple(labels)}"
        key = tuple([labels[name] for name in self.labels])
        return key if key in self._values else self._admitted(key)

    def _admitted(self, key: tuple[str, ...]) -> tuple[str, ...]:
        admitted = []
        for seen, value in zip(self._seen, key, strict=True):
            value = value[:MAX_CHARS]
            if value not in seen:
                if len(seen) >= self.max_values:
                    value = OTHER
                else:
                    seen.add(value)
            admitted.append(value)
        return tuple(admitted)

    def _told(self) -> Any:
        """Ray's metric, where this process is one of Ray's."""
        if self._remote is None and ray.is_initialized():
            self._remote = self._make()
        return self._remote

    def _make(self) -> Any:
        raise NotImplementedError


class Counter(Meter):
    """Only grows."""

    kind = "counter"

    def inc(self, amount: float = 1.0, /, **labels: str) -> None:
        if amount <= 0:  # nothing happened; Ray refuses it
            return
        with self._lock:
            key = self._key(labels)
            self._values[key] = self._values.get(key, 0.0) + amount
        if (told := self._told()) is not None:
            told.inc(amount, dict(zip(self.labels, key, strict=True)))

    def value(self, **labels: str) -> float:
        """Of this process."""
        return self._values.get(self._key(labels), 0.0)

    def total(self) -> float:
        """Of all series of this process."""
        return sum(value for _, value in self.items())

    def _make(self) -> Any:
        return ray_metrics.Counter(self.name, self.help, self.all_labels)


class Gauge(Meter):
    """A value now, which stays until another is set or it is removed."""

    kind = "gauge"

    @property
    def all_labels(self) -> tuple[str, ...]:
        return (*self.labels, REPLICA)

    def set(self, value: float, /, **labels: str) -> None:
        with self._lock:
            key = self._key(labels)
            self._values[key] = float(value)
        if (told := self._told()) is not None:
            told.set(value, dict(zip(self.labels, key, strict=True)) | {REPLICA: replica()})

    def value(self, **labels: str) -> float | None:
        """Of this process; None where it was not set."""
        return self._values.get(self._key(labels))

    def keep_only(self, series: Collection[tuple[str, ...]], **labels: str) -> None:
        """Removes those with these labels whose other values, in the order of `self.labels`, are not in `series`."""
        with self._lock:
            for key in list(self._values):
                told = dict(zip(self.labels, key, strict=True))
                rest = tuple(value for name, value in told.items() if name not in labels)
                if labels.items() <= told.items() and rest not in series:
                    del self._values[key]
                    for seen, value in zip(self._seen, key, strict=True):
                        if not any(value in other for other in self._values):
                            seen.discard(value)

    def tell_again(self) -> None:
        """Ray forgets a gauge that is not told for two of its intervals."""
        if (told := self._told()) is not None:
            for labels, value in self.items():
                told.set(value, labels | {REPLICA: replica()})

    def _make(self) -> Any:
        return ray_metrics.Gauge(self.name, self.help, self.all_labels)


class Composed(Meter):
    """A gauge that nobody records: the page of all nodes says it (`serve/telemetry/gathering.py`)."""

    kind = "gauge"


@dataclass(eq=False)
class Histogram(Meter):
    """How often a value fell into each bucket. Ray tells buckets exactly and their sum by the buckets' midpoints."""

    bounds: tuple[float, ...] = ()
    """Upper ones, ascending, above 0; the last bucket is beyond them all."""
    kind = "histogram"

    def observe(self, value: float, /, **labels: str) -> None:
        with self._lock:
            key = self._key(labels)
            seen = self._values.get(key)
            if seen is None:
                seen = self._values[key] = Distribution(self.bounds, [0] * (len(self.bounds) + 1))
            seen.counts[bisect.bisect_left(self.bounds, value)] += 1
            seen.total += value
        if (told := self._told()) is not None:
            told.observe(value, dict(zip(self.labels, key, strict=True)))

    def value(self, **labels: str) -> Distribution | None:
        """Of this process; None where nothing was seen."""
        return self._values.get(self._key(labels))

    def _make(self) -> Any:
        return ray_metrics.Histogram(self.name, self.help, list(self.bounds), self.all_labels)


class Sampling:
    """Gauges that follow what an object holds: asked every SAMPLE_S, as long as the object lives.

    Nothing runs where there is no Ray: tests call the method themselves.
    """

    def __init__(self, gauges: Callable[[], Iterable[Gauge]]) -> None:
        self._gauges = gauges
        self._asked: list[weakref.WeakMethod[Callable[[], None]]] = []
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def follow(self, tell: Callable[[], None]) -> None:
        """Calls a bound method again and again; it sets gauges, and must not block."""
        with self._lock:
            self._asked.append(weakref.WeakMethod(tell))
            if self._thread is None and ray.is_initialized():
                self._thread = threading.Thread(target=self._forever, name="meters", daemon=True)
                self._thread.start()

    def _forever(self) -> None:
        while True:
            time.sleep(SAMPLE_S)
            self.sample()

    def sample(self) -> None:
        """Once, now."""
        with self._lock:
            self._asked = [one for one in self._asked if one() is not None]
            asked = [one() for one in self._asked]
        for tell in asked:
            try:
                if tell is not None:
                    tell()
            except Exception:  # a part that is ending, most likely; the others go on
                logger.debug("a gauge was not told", exc_info=True)
        for gauge in self._gauges():
            gauge.tell_again()


@functools.cache
def replica() -> str:
    """Names this process in gauges: Serve's name of the replica, or the actor's id, or the process."""
    if not ray.is_initialized():
        return f"pid-{os.getpid()}"
    from ray import serve

    try:
        return serve.get_replica_context().replica_tag.rpartition("#")[2]
    except Exception:  # no replica: a rank, the registry or a job
        return (ray.get_runtime_context().get_actor_id() or f"pid-{os.getpid()}")[:12]
