"""`GET /metrics`: what every Ray node tells of our metrics, on one page in Prometheus' text format 0.0.4.

The agent on each node, which runs with and without Ray's dashboard, tells what the node's processes recorded, each with
their worker's id, beside some hundred metrics of Ray's own. We keep the metrics of `actors/meters.py`, without Ray's
prefix and without the labels that only grow (worker, session); and those of `OF_RAY`. Counters and histograms of
a node's workers are added up: they go on where a worker ends. Nodes keep their label, so that one that is silent takes
its own series with it and no sum seems to fall.

Without Ray, in a test, the page is what this process recorded.
"""

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import ray
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from actors import meters
from actors.recording import REPLICA, Distribution, Meter, replica
from serve.shared import Shared

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
TIMEOUT_S = 0.8
"""A node that does not answer by then is silent on this page."""
TOTALS_FRESH_S = 5.0
"""How long sums over replicas are told again."""
NODES_FRESH_S = 5.0
"""How long the list of nodes is believed."""
OF_RAY = {
    "ray_node_cpu_utilization": "gauge",
    "ray_node_mem_used": "gauge",
    "ray_node_mem_total": "gauge",
    "ray_node_gpus_utilization": "gauge",
    "ray_node_gram_used": "gauge",
    "ray_object_store_memory": "gauge",
    "ray_serve_deployment_replica_starts_total": "counter",
    "ray_serve_deployment_replica_healthy": "gauge",
}
"""Ray's own that the page has too, by their kind; they keep their names."""

_RAYS = "ray_"
_DROPPED = frozenset({"WorkerId", "SessionName", "Version", "Component", "NodeAddress", "JobId", "Pid"})
_SAMPLE = re.compile(r"(\w+)(?:\{(.*)\})? (\S+)$")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
_SUFFIXES = ("_bucket", "_sum", "_count")

Labels = tuple[tuple[str, str], ...]
"""Values as they are escaped in the text."""


@dataclass(frozen=True)
class Node:
    """Where a node's agent answers."""

    address: str
    port: int

    @property
    def url(self) -> str:
        host = f"[{self.address}]" if ":" in self.address else self.address
        return f"http://{host}:{self.port}/metrics"


def alive_nodes() -> tuple[Node, ...]:
    """Of the cluster that this process belongs to; asks Ray's control store, so call it in a thread."""
    return tuple(
        Node(one["NodeManagerAddress"], int(one["MetricsExportPort"]))
        for one in ray.nodes()
        if one["Alive"] and one["MetricsExportPort"]
    )


class Gathered:
    """Samples of all nodes, by metric."""

    def __init__(self) -> None:
        self._samples: dict[str, dict[tuple[str, Labels], float]] = {}
        self.num_answered = self.num_silent = 0

    def add(self, node: str, text: str) -> None:
        """What one node said."""
        for line in text.splitlines():
            if not line.startswith(_RAYS):
                continue
            name = line[: line.find("{")] if "{" in line else line.partition(" ")[0]
            if (family := _family(name)) is None or (found := _SAMPLE.match(line)) is None:
                continue
            labels = [pair for pair in _LABEL.findall(found[2] or "") if not _is_dropped(pair[0])]
            key = (name.removeprefix(_RAYS) if family in meters.METRICS else name, (*labels, ("node", node)))
            samples = self._samples.setdefault(family, {})
            value = float(found[3])
            samples[key] = value if _kind(family) == "gauge" else samples.get(key, 0.0) + value

    def total(self, meter: Meter, **labels: str) -> float:
        """Of all series of a counter or gauge that have these labels; 0 where there are none."""
        wanted = set(labels.items())
        samples = self._samples.get(meter.name, {})
        return sum(value for (_, found), value in samples.items() if wanted <= set(found))

    def values_of(self, meter: Meter, label: str) -> list[str]:
        """Of one label, over all series."""
        return sorted({dict(labels)[label] for _, labels in self._samples.get(meter.name, {})})

    def text(self) -> bytes:
        """The page."""
        self._compose()
        lines = []
        for family in (*meters.METRICS, *OF_RAY):
            if samples := self._samples.get(family):
                help = meters.METRICS[family].help if family in meters.METRICS else "Ray's own."
                lines += [f"# HELP {family} {help}", f"# TYPE {family} {_kind(family)}"]
                lines += [f"{name}{_braces(labels)} {value!r}" for (name, labels), value in samples.items()]
        return ("\n".join(lines) + "\n").encode()

    def _compose(self) -> None:
        """What the page itself says: of the nodes, and of adapters as an inference gateway reads them."""
        for state, count in (("answered", self.num_answered), ("silent", self.num_silent)):
            self._put(meters.NODES, {"state": state}, count)
        for backbone in self.values_of(meters.QUEUED, "backbone"):
            names = {state: self._adapters(backbone, state) for state in ("running", "waiting")}
            labels = {"backbone": backbone, "running_lora_adapters": names["running"]}
            labels |= {"waiting_lora_adapters": names["waiting"]}
            labels |= {"max_lora": f"{self.total(meters.EXPERT_ROOM, backbone=backbone):.0f}"}
            self._put(meters.ADAPTER_INFO, labels, round(time.time(), 3))

    def _adapters(self, backbone: str, state: str) -> str:
        samples = self._samples.get(meters.ADAPTER_ROWS.name, {})
        found = [dict(labels) for (_, labels), value in samples.items() if value > 0]
        return ",".join(
            sorted({one["adapter"] for one in found if (one["backbone"], one["state"]) == (backbone, state)})
        )

    def _put(self, meter: Meter, labels: Mapping[str, str], value: float) -> None:
        self._samples.setdefault(meter.name, {})[meter.name, tuple(labels.items())] = float(value)


class Gatherer:
    """Asks all nodes at once, for whoever wants to know."""

    def __init__(
        self,
        nodes: Callable[[], Sequence[Node]] = alive_nodes,
        fetch: Callable[[Node], Awaitable[str]] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`fetch` None: over HTTP."""
        self._list, self._fetch, self._clock = nodes, fetch or self._get, clock
        self._nodes: Sequence[Node] = ()
        self._listed_s = float("-inf")
        self._client: httpx.AsyncClient | None = None
        self._totals: tuple[float, Gathered] | None = None
        self._page = Shared(self._text)

    async def text(self) -> bytes:
        """The page: of all nodes, or of this process where there is no Ray."""
        return await self._page() if ray.is_initialized() else local_text()

    async def _text(self) -> bytes:
        gathered = await self.gather()
        return await asyncio.to_thread(gathered.text)

    async def totals(self) -> dict[str, dict[str, dict[str, float]]]:
        """Of each backbone over all its replicas, at most TOTALS_FRESH_S older than the page; empty without Ray."""
        if not ray.is_initialized():
            return {}
        if self._totals is None or self._clock() - self._totals[0] > TOTALS_FRESH_S:
            self._totals = self._clock(), await self.gather()
        gathered = self._totals[1]
        gauges = {"queued_requests": meters.QUEUED, "running_requests": meters.RUNNING_ROWS}
        gauges |= {"queued_tokens": meters.QUEUED_TOKENS, "experts_resident": meters.EXPERTS}
        return {
            "backbones": {
                id_: {name: gathered.total(one, backbone=id_) for name, one in gauges.items()}
                for id_ in gathered.values_of(meters.QUEUED, "backbone")
            }
        }

    async def gather(self) -> Gathered:
        """In about TIMEOUT_S at most."""
        gathered = Gathered()
        if self._clock() - self._listed_s > NODES_FRESH_S:
            self._nodes, self._listed_s = await asyncio.to_thread(self._list), self._clock()
        answers = await asyncio.gather(*(self._ask(one) for one in self._nodes))
        for node, text in zip(self._nodes, answers, strict=True):
            if text is None:
                gathered.num_silent += 1
            else:
                gathered.num_answered += 1
                await asyncio.to_thread(gathered.add, node.address, text)  # a megabyte where a node has many workers
        return gathered

    async def _ask(self, node: Node) -> str | None:
        try:
            async with asyncio.timeout(TIMEOUT_S):
                return await self._fetch(node)
        except (TimeoutError, httpx.HTTPError, OSError):
            return None

    async def _get(self, node: Node) -> str:
        if self._client is None:
            self._client = httpx.AsyncClient(trust_env=False)  # a proxy of the environment is not for our own nodes
        answer = await self._client.get(node.url)
        answer.raise_for_status()
        return answer.text


def local_text() -> bytes:
    """What this process recorded."""
    registry = CollectorRegistry()
    registry.register(_Local())
    return generate_latest(registry)


class _Local(Collector):
    def collect(self) -> Iterable[Metric]:
        for meter in meters.METRICS.values():
            rest = [replica()] if REPLICA in meter.all_labels else []
            family = _FAMILIES[meter.kind](meter.name, meter.help, labels=meter.all_labels)
            for labels, value in meter.items():
                values = [*labels.values(), *rest]
                if isinstance(value, Distribution):
                    family.add_metric(values, buckets=_cumulative(value), sum_value=value.total)
                else:
                    family.add_metric(values, value)
            if family.samples:
                yield family


_FAMILIES: dict[str, Any] = {
    "counter": CounterMetricFamily,
    "gauge": GaugeMetricFamily,
    "histogram": HistogramMetricFamily,
}


def _cumulative(seen: Distribution) -> list[tuple[str, float]]:
    so_far, found = 0, []
    for bound, count in zip([*map(str, seen.bounds), "+Inf"], seen.counts, strict=True):
        so_far += count
        found.append((bound, float(so_far)))
    return found


def _family(name: str) -> str | None:
    """The metric that a sample of Ray's page belongs to; None where it is not on ours."""
    if name in OF_RAY:
        return name
    ours = name.removeprefix(_RAYS)
    if ours in meters.METRICS:
        return ours
    for suffix in _SUFFIXES:
        if (base := ours.removesuffix(suffix)) in meters.METRICS and base != ours:
            return base
    return None


def _kind(family: str) -> str:
    return meters.METRICS[family].kind if family in meters.METRICS else OF_RAY[family]


def _is_dropped(label: str) -> bool:
    return label in _DROPPED or label.startswith("otel_")


def _braces(labels: Labels) -> str:
    return "{" + ",".join(f'{name}="{value}"' for name, value in labels) + "}" if labels else ""
