"""`GET /v1/status`: the graph at a glance, for the console and `metasepia status`, which ask again every few seconds.

However many ask, the parts are asked once in `FRESH_S`; a real forward through each part is run at most once in
`CHECK_S`, and only while somebody asks. Rates, latencies and their history are of this gateway: where several serve,
`gateway` tells them apart.
"""

import asyncio
import contextlib
import contextvars
import importlib.metadata
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import ray
from ray import serve

from actors.recording import replica
from serve.shared import Shared
from serve.telemetry.health import Health, Report

FRESH_S = 1.0
CHECK_S = 15.0
ASK_TIMEOUT_S = 1.0
"""A part that does not tell by then is told as silent."""
STEP_S = 5.0
"""Of the history."""
NUM_STEPS = 120
"""Of the history: ten minutes."""
MAX_DURATIONS = 1024
"""Of each route, the newest, from which its percentiles are taken."""

Ask = Callable[[], Awaitable[Mapping[str, Any]]]
Json = dict[str, Any]

SERIES = ("requests_per_s", "failures_per_s", "tokens_per_s", "running", "queued_tokens", "p50_ms", "p99_ms")


class Recent:
    """Requests of the last ten minutes, as this gateway saw them. Methods are cheap: each request calls them."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._durations: dict[str, deque[tuple[float, float]]] = {}
        self.num_requests = self.num_failures = self.num_tokens = self.running = 0

    def end(self, route: str, failed: bool, duration_s: float) -> None:
        self.num_requests += 1
        self.num_failures += failed
        kept = self._durations.setdefault(route, deque(maxlen=MAX_DURATIONS))
        kept.append((self._clock(), duration_s))

    def latency(self) -> dict[str, Json]:
        """By route: percentiles and how many requests they are of."""
        since = self._clock() - STEP_S * NUM_STEPS
        found = {}
        for route, kept in self._durations.items():
            if durations := sorted(seconds for when, seconds in kept if when >= since):
                found[route] = {**_percentiles(durations), "count": len(durations)}
        return found

    def since(self, begin_s: float) -> list[float]:
        """Durations of all requests that ended after this moment of the clock, ascending."""
        found: list[float] = []
        for kept in self._durations.values():
            for when, seconds in reversed(kept):
                if when < begin_s:
                    break
                found.append(seconds)
        return sorted(found)


class Status:
    """What the page shows, kept fresh while it is asked for."""

    def __init__(
        self,
        recent: Recent,
        health: Health,
        asks: Mapping[str, Mapping[str, Ask]],
        replicas: Callable[[], Mapping[str, Json]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`asks`: by group (backbones, encoders), then by id, what tells of one part; a group with the one id "" is
        told without it. `replicas` is called in a thread: by part, how many there are.
        """
        self._recent, self._health, self._asks, self._replicas, self._clock = recent, health, asks, replicas, clock
        self._begin = clock()
        self._told: tuple[float, Json] | None = None
        self._telling, self._checking = Shared(self._tell), Shared(self._health.report)
        self._counted: Mapping[str, Json] = {}
        self._series: dict[str, deque[float | None]] = {name: deque(maxlen=NUM_STEPS) for name in SERIES}
        self._sampling: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """Starts the history, in the loop of whoever calls. Calling it again does nothing."""
        if self._sampling is None:
            # In a context of its own: it is no part of the request that happened to come first.
            self._sampling = asyncio.create_task(self._sample(), context=contextvars.Context())

    async def json(self) -> Json:
        """At most FRESH_S old."""
        if self._told is None or self._clock() - self._told[0] >= FRESH_S:
            return await self._telling()
        return self._told[1]

    async def _tell(self) -> Json:
        groups, counted = await asyncio.gather(
            asyncio.gather(*(self._ask_all(asks) for asks in self._asks.values())), self._count()
        )
        report, checked_ago_s = self._report()
        parts = [
            {"name": name, "ready": one["ready"], "reason": one.get("reason"), "replicas": counted.get(name)}
            for name, one in report.parts.items()
        ]
        now = self._clock()
        told = {
            "object": "status",
            "version": importlib.metadata.version("metasepia"),
            "ready": report.ready,
            "gateway": replica(),
            "unix_s": round(time.time(), 3),
            "uptime_s": round(now - self._begin, 1),
            "checked_ago_s": checked_ago_s,
            "parts": parts,
            **dict(zip(self._asks, groups, strict=True)),
            "running": self._recent.running,
            "rates": {name: _newest(self._series[name]) for name in SERIES if name.endswith("_per_s")},
            "latency": self._recent.latency(),
            "history": {"step_s": STEP_S, "series": {name: list(kept) for name, kept in self._series.items()}},
        }
        self._told = (now, told)
        return told

    def _report(self) -> tuple[Report, float | None]:
        """The last check of the parts, and its age. Where it is old another one is begun, for who asks next."""
        last, age_s = self._health.last(), self._health.age_s()
        if age_s is None or age_s > CHECK_S:
            self._checking.begin()
        return last, None if age_s is None else round(age_s, 1)

    async def _ask_all(self, asks: Mapping[str, Ask]) -> Json:
        told = await asyncio.gather(*(_ask(one) for one in asks.values()))
        return told[0] if list(asks) == [""] else dict(zip(asks, told, strict=True))

    async def _count(self) -> Mapping[str, Json]:
        """From Serve's controller; what it said last where it does not answer in time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ASK_TIMEOUT_S):
                self._counted = await asyncio.to_thread(self._replicas)
        return self._counted

    async def _sample(self) -> None:
        """A step of the history each STEP_S."""
        recent = self._recent
        before = (recent.num_requests, recent.num_failures, recent.num_tokens)
        begin = self._clock()
        while True:
            await asyncio.sleep(STEP_S)
            now = self._clock()
            after = (recent.num_requests, recent.num_failures, recent.num_tokens)
            rates = [round((new - old) / (now - begin), 2) for new, old in zip(after, before, strict=True)]
            percentiles = _percentiles(recent.since(begin))
            waiting = await self._ask_all(self._asks.get("backbones", {}))
            queued = sum(one.get("num_waiting_tokens", 0) for one in waiting.values())
            values = (*rates, recent.running, queued, percentiles["p50_ms"], percentiles["p99_ms"])
            for name, value in zip(SERIES, values, strict=True):
                self._series[name].append(value)
            before, begin = after, now


def served_replicas() -> dict[str, Json]:
    """By part, how many of Serve's replicas are in which state. Asks its controller, so call it in a thread."""
    if not ray.is_initialized():
        return {}
    found = {}
    for application in serve.status().applications.values():
        for name, one in application.deployments.items():
            states = {str(state).lower(): count for state, count in one.replica_states.items()}
            found[name.replace("-", " ", 1)] = {"status": one.status.value.lower(), **states}
    return found


async def _ask(one: Ask) -> Json:
    try:
        async with asyncio.timeout(ASK_TIMEOUT_S):
            return dict(await one())
    except Exception as error:  # whatever keeps a part from telling, the others are told
        return {"reason": "no answer in time" if isinstance(error, TimeoutError) else str(error)}


def _percentiles(ascending: list[float]) -> dict[str, float | None]:
    """In milliseconds: the smallest value that no fewer than this share of them does not exceed."""
    if not ascending:
        return {"p50_ms": None, "p99_ms": None}
    last = len(ascending) - 1
    return {f"p{q}_ms": round(1000 * ascending[min(last, len(ascending) * q // 100)], 2) for q in (50, 99)}


def _newest(series: deque[float | None]) -> float:
    return (series[-1] or 0.0) if series else 0.0
