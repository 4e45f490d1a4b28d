"""Prometheus metrics of one gateway: requests by route and status, their latency, tokens, queues of the parts."""

import asyncio
import time
from collections.abc import Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from metasepia.centroids import CentroidFacts
from metasepia.digests import short
from metasepia.experts.mixing import BASE
from serve.observing import Centroids
from serve.parts import Backbone, Reasoning
from serve.task_part import TaskPart

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SCRAPE_TIMEOUT_S = 1.0
_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Metrics:
    """The gateway's own registry of metrics, so that several gateways in one process (tests) do not mix."""

    def __init__(self) -> None:
        disable_created_metrics()  # a second series for each, of use to nobody here
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "metasepia_requests", "Requests answered.", ("route", "status"), registry=self._registry
        )
        self._latency = Histogram(
            "metasepia_request_duration_seconds",
            "From a request's arrival at the gateway to the end of its answer.",
            ("route",),
            buckets=_BUCKETS,
            registry=self._registry,
        )
        self._running = Gauge("metasepia_requests_running", "Requests inside the gateway now.", registry=self._registry)
        self._tokens = Counter("metasepia_tokens", "Tokens read and written.", ("kind",), registry=self._registry)
        self._queue = Gauge(
            "metasepia_backbone_queue", "A backbone's scheduler, now.", ("backbone", "what"), registry=self._registry
        )
        self._reasoning = Gauge(
            "metasepia_reasoning",
            "A replica of the reasoning pool: contexts compiled, fetched and kept, queries and audits that wait.",
            ("what",),
            registry=self._registry,
        )

        self._tasks = Gauge(
            "metasepia_task_embedding",
            "The part that embeds tasks: tasks and batches so far, those that wait, jobs, vectors kept at hand.",
            ("what",),
            registry=self._registry,
        )

        labels = ("backbone", "task", "expert", "layer", "pooling")
        self._drift = Gauge(
            "metasepia_centroid_drift",
            "Distance of a task's recent hidden states from its reference, in spreads of the reference.",
            labels,
            registry=self._registry,
        )
        self._centroid_states = Gauge(
            "metasepia_centroid_states", "Hidden states in a task's centroid.", labels, registry=self._registry
        )
        self._quality = Gauge(
            "metasepia_cluster_quality",
            "Mean separation of the tasks by a layer: 1 - (spread of a task / distance to the nearest other one).",
            ("backbone", "source", "expert", "layer", "pooling"),
            registry=self._registry,
        )

    def begin(self) -> None:
        self._running.inc()

    def end(self, route: str, status: int, duration_s: float) -> None:
        self._running.dec()
        self._requests.labels(route, str(status)).inc()
        self._latency.labels(route).observe(duration_s)

    def add_tokens(self, prompt: int, answer: int) -> None:
        self._tokens.labels("prompt").inc(prompt)
        self._tokens.labels("answer").inc(answer)

    async def text(
        self, backbones: Sequence[Backbone], reasoning: Reasoning, centroids: Centroids, tasks: TaskPart
    ) -> bytes:
        """Prometheus text. A part that does not answer within a second keeps no gauges."""
        for gauge in (self._queue, self._reasoning, self._tasks, self._drift, self._centroid_states, self._quality):
            gauge.clear()
        about_tasks = asyncio.create_task(asyncio.wait_for(centroids.facts(), _SCRAPE_TIMEOUT_S))
        about_part = asyncio.create_task(asyncio.wait_for(tasks.statistics(), _SCRAPE_TIMEOUT_S))
        statistics, *loads = await asyncio.gather(
            asyncio.wait_for(reasoning.statistics(), _SCRAPE_TIMEOUT_S),
            *(asyncio.wait_for(one.load(), _SCRAPE_TIMEOUT_S) for one in backbones),
            return_exceptions=True,
        )
        facts, embedded = await asyncio.gather(about_tasks, about_part, return_exceptions=True)
        if not isinstance(statistics, BaseException):
            for what, value in statistics.items():
                self._reasoning.labels(what).set(value)
        if not isinstance(embedded, BaseException):
            for what, value in embedded.items():
                self._tasks.labels(what).set(value)
        if not isinstance(facts, BaseException):
            self._tell_centroids(facts, {one.prepared.digest: one.id for one in backbones})
        for backbone, load in zip(backbones, loads, strict=True):
            if not isinstance(load, BaseException):
                for what, value in load.items():
                    self._queue.labels(backbone.id, what).set(value)
        return generate_latest(self._registry)

    def _tell_centroids(self, facts: Sequence[CentroidFacts], ids: Mapping[str, str]) -> None:
        """Of backbones that are served; as many series as there are centroids, which the settings bound."""
        separations: dict[tuple[str, ...], list[float]] = {}
        for one in facts:
            key = one.key
            if key.backbone not in ids:
                continue
            rest = (short(key.adapter) or BASE, str(key.layer), key.pooling)
            labels = (ids[key.backbone], key.task, *rest)
            self._centroid_states.labels(*labels).set(one.count)
            if one.drift is not None:
                self._drift.labels(*labels).set(one.drift)
            if one.separation is not None:
                source = "auto" if key.is_routed else "requests"
                separations.setdefault((ids[key.backbone], source, *rest), []).append(one.separation)
        for labels, each in separations.items():
            self._quality.labels(*labels).set(sum(each) / len(each))


class Measured:
    """ASGI around the gateway's app: counts and times every request, streams to their end."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, begin = 499, time.perf_counter()  # 499 stays where the client left before an answer

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self._metrics.begin()
        try:
            await self._app(scope, receive, watched)
        finally:
            route = getattr(scope.get("route"), "path", "unmatched")  # its pattern: clients make no new labels
            self._metrics.end(route, status, time.perf_counter() - begin)
