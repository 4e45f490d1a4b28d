"""`python -m serve.dashboards`: Grafana dashboards and Prometheus rules, made from the declarations of the metrics.

Writes `dashboards/metasepia.json` (what to look at first), `dashboards/metasepia-metrics.json` (every metric there is)
and `alerts/metasepia.yaml`. Queries are put together from the metrics' own objects, so a metric that is renamed is
renamed here, and one that goes is an error. A test makes the files anew, compares, and parses every query.

Scrape one gateway's `/metrics`: each has all nodes on it, and two would be counted twice.
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from actors import meters
from actors.recording import Counter, Histogram, Meter

ROOT = Path(__file__).parents[1]
WINDOW = "$__rate_interval"
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
_WIDTH, _HEIGHT = 8, 7
"""Of a panel; Grafana's page is 24 wide."""

Json = dict[str, Any]


# -- queries -----------------------------------------------------------------------------------------------------------


def rate(meter: Counter, *by: str, window: str = WINDOW, **only: str) -> str:
    """A second, summed over all else. `only`: labels and the regular expressions that they match."""
    return f"{_sum(by)}(rate({meter.name}{_only(meter, only)}[{window}]))"


def total(meter: Meter, *by: str, **only: str) -> str:
    """Of a gauge, over all replicas."""
    return f"{_sum(by)}({meter.name}{_only(meter, only)})"


def largest(meter: Meter, *by: str, **only: str) -> str:
    """Of a gauge, over all replicas."""
    return f"max by ({', '.join(by)}) ({meter.name}{_only(meter, only)})"


def quantile(q: float, meter: Histogram, *by: str, window: str = WINDOW, **only: str) -> str:
    inner = f"sum by ({', '.join((*by, 'le'))}) (rate({meter.name}_bucket{_only(meter, only)}[{window}]))"
    return f"histogram_quantile({q}, {inner})"


def share(part: str, of: str) -> str:
    """From 0 to 1; nothing where there is nothing to divide by."""
    return f"{part} / ({of} > 0)"


def _sum(by: Sequence[str]) -> str:
    return f"sum by ({', '.join(by)}) " if by else "sum"


def _only(meter: Meter, only: Mapping[str, str]) -> str:
    for label in only:
        assert label in meter.all_labels, f"{meter.name} has no label {label}"
    return "{" + ",".join(f'{label}=~"{value}"' for label, value in only.items()) + "}" if only else ""


# -- what is looked at first -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Panel:
    """One plot."""

    title: str
    unit: str
    """Grafana's name of it."""
    queries: tuple[tuple[str, str], ...]
    """Each with its legend."""
    description: str = ""


def _plot(title: str, unit: str, *queries: tuple[str, str], description: str = "") -> Panel:
    return Panel(title, unit, queries, description)


def _quantiles(title: str, meter: Histogram, *by: str, unit: str = "s") -> Panel:
    legend = " ".join(f"{{{{{label}}}}}" for label in by)
    queries = [(quantile(q, meter, *by), f"p{q * 100:g} {legend}".strip()) for q in (0.5, 0.99)]
    return Panel(title, unit, tuple(queries), meter.help)


def overview() -> dict[str, tuple[Panel, ...]]:
    """Rows of panels."""
    m = meters
    padding = share(rate(m.BATCH_TOKENS, "model", what="padding"), rate(m.BATCH_TOKENS, "model"))
    failing = rate(m.REQUESTS, status="5..")
    hits = share(rate(m.ENCODER_ITEMS, "encoder", source="cache"), rate(m.ENCODER_ITEMS, "encoder"))
    drift = m.DRIFT.help
    return {
        "Requests": (
            _plot("Requests", "reqps", (rate(m.REQUESTS, "route"), "{{route}}"), description=m.REQUESTS.help),
            _plot("Failures", "reqps", (rate(m.FAILURES, "reason"), "{{reason}}"), description=m.FAILURES.help),
            _plot("Share answered with 5xx", "percentunit", (share(failing, rate(m.REQUESTS)), "5xx")),
            _quantiles("Latency", m.DURATION, "route"),
            _plot("In the gateway", "short", (total(m.RUNNING), "all"), (total(m.ADMISSION_WAITING), "waiting")),
            _plot("Tokens", "short", (rate(m.TOKENS_DONE, "kind"), "{{kind}}"), description=m.TOKENS_DONE.help),
            _quantiles("Wait at the gateway", m.ADMISSION_WAIT),
            _plot("Not let in", "reqps", (rate(m.ADMISSION_REFUSED, "reason"), "{{reason}}")),
            _plot(
                "Keys and replays",
                "reqps",
                (rate(m.KEYS_REFUSED, "reason"), "key: {{reason}}"),
                (rate(m.REPLAYS, "outcome"), "idempotency: {{outcome}}"),
            ),
        ),
        "Backbones": (
            _quantiles("Time to first token", m.FIRST_TOKEN, "backbone"),
            _quantiles("Time per output token", m.PER_TOKEN, "backbone"),
            _plot(
                "Rows",
                "short",
                (total(m.QUEUED, "backbone"), "{{backbone}} queued"),
                (total(m.RUNNING_ROWS, "backbone"), "{{backbone}} running"),
            ),
            _quantiles("Row: wait in the scheduler", m.ROW_QUEUE, "backbone"),
            _quantiles("Row: prompt read in", m.ROW_PREFILL, "backbone"),
            _plot("Key/value cache", "percentunit", (largest(m.CACHE, "backbone"), "{{backbone}}")),
            _quantiles("Step", m.STEP, "backbone"),
            _quantiles("Rows in a step", m.STEP_ROWS, "backbone", unit="short"),
            _plot("Padding", "percentunit", (padding, "{{model}}"), description="Share of computed tokens."),
            _plot("Rows by how they ended", "short", (rate(m.ROWS, "backbone", "outcome"), "{{backbone}} {{outcome}}")),
            _plot("Prompt tokens taken from prefixes", "short", (rate(m.REUSED_TOKENS, "backbone"), "{{backbone}}")),
            _plot(
                "Gangs",
                "short",
                (largest(m.REBUILDING, "backbone"), "{{backbone}} rebuilding"),
                (rate(m.REBUILDS, "backbone", window="1h") + " * 3600", "{{backbone}} rebuilt in an hour"),
            ),
        ),
        "Experts": (
            _plot("Experts held by a rank", "short", (largest(m.EXPERTS, "backbone"), "{{backbone}}")),
            _plot("Experts moved", "short", (rate(m.EXPERTS_MOVED, "backbone", "way"), "{{backbone}} {{way}}")),
            _plot("Rows by expert", "short", (total(m.ADAPTER_ROWS, "adapter", "state"), "{{adapter}} {{state}}")),
            _plot("auto: stage that chose", "reqps", (rate(m.ROUTED, "stage"), "{{stage}}"), description=m.ROUTED.help),
            _plot("Drift", "short", (largest(m.DRIFT, "task", "expert"), "{{task}} {{expert}}"), description=drift),
            _plot("Separation of tasks", "short", (largest(m.QUALITY, "backbone", "layer"), "{{backbone}} {{layer}}")),
        ),
        "Encoders and reasoning": (
            _quantiles("Encoder: wait", m.ENCODER_QUEUE, "encoder"),
            _quantiles("Encoder: forward", m.ENCODER_FORWARD, "encoder"),
            _plot("Encoder: items from the cache", "percentunit", (hits, "{{encoder}}")),
            _quantiles("Reasoning: wait", m.POOL_QUEUE),
            _quantiles("Reasoning: forward", m.POOL_FORWARD),
            _plot("Contexts", "short", (rate(m.POOL_CONTEXTS, "how"), "{{how}}"), description=m.POOL_CONTEXTS.help),
        ),
        "Ground": (
            _plot("Parts", "short", (largest(m.PART_READY, "part"), "{{part}}"), description=m.PART_READY.help),
            _plot("Registry calls", "reqps", (rate(m.REGISTRY_CALLS, "call", "outcome"), "{{call}} {{outcome}}")),
            _plot("Nodes", "short", (total(m.NODES, "state"), "{{state}}"), description=m.NODES.help),
        ),
    }  # fmt: skip


def everything() -> dict[str, tuple[Panel, ...]]:
    """A panel a metric, in the order of their declaration."""
    panels = []
    for meter in meters.METRICS.values():
        legend = " ".join(f"{{{{{label}}}}}" for label in meter.labels) or meter.name
        title = meter.name.removeprefix(meters.PREFIX)
        if isinstance(meter, Histogram):
            panels.append(_quantiles(title, meter, *meter.labels, unit="s" if "seconds" in meter.name else "short"))
        elif isinstance(meter, Counter):
            panels.append(
                _plot(f"{title}, a second", "short", (rate(meter, *meter.labels), legend), description=meter.help)
            )
        else:
            panels.append(_plot(title, "short", (total(meter, *meter.labels), legend), description=meter.help))
    return {"Every metric": tuple(panels)}


def grafana(uid: str, title: str, rows: Mapping[str, Sequence[Panel]]) -> Json:
    """A dashboard for provisioning; the data source is chosen on the page."""
    return {
        "uid": uid,
        "title": title,
        "tags": ["metasepia"],
        "schemaVersion": 39,
        "editable": False,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {
            "list": [{"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Data source"}]
        },
        "panels": list(_panels(rows)),
    }


def _panels(rows: Mapping[str, Sequence[Panel]]) -> Iterator[Json]:
    number, y = 0, 0
    for title, panels in rows.items():
        number += 1
        place = {"x": 0, "y": y, "w": 24, "h": 1}
        yield {"id": number, "type": "row", "title": title, "collapsed": False, "gridPos": place, "panels": []}
        y += 1
        for index, panel in enumerate(panels):
            number += 1
            place = {"x": _WIDTH * (index % 3), "y": y + _HEIGHT * (index // 3), "w": _WIDTH, "h": _HEIGHT}
            yield {
                "id": number,
                "type": "timeseries",
                "title": panel.title,
                "description": panel.description,
                "datasource": _SOURCE,
                "gridPos": place,
                "fieldConfig": {"defaults": {"unit": panel.unit}, "overrides": []},
                "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
                "targets": [
                    {"refId": chr(ord("A") + at), "datasource": _SOURCE, "expr": query, "legendFormat": legend}
                    for at, (query, legend) in enumerate(panel.queries)
                ],
            }
        y += _HEIGHT * -(-len(panels) // 3)


# -- alerts ------------------------------------------------------------------------------------------------------------


def alerts() -> Json:
    """Prometheus rules. Thresholds are for a start: what is slow or many is each installation's own to say."""
    m = meters
    some = f"({rate(m.REQUESTS, window='5m')} > 0.1)"
    rules = (
        _alert("Absent", f"absent({m.RUNNING.name})", "5m", "critical", "No gateway tells its metrics."),
        _alert("NodeSilent", f"{total(m.NODES, state='silent')} > 0", "5m", "warning", "A Ray node keeps its metrics."),
        _alert(
            "PartNotReady", f"{largest(m.PART_READY, 'part')} < 1", "2m", "critical",
            "{{ $labels.part }} fails its checks.",
        ),
        _alert(
            "Failing", f"{rate(m.REQUESTS, window='5m', status='5..')} / {some} > 0.01", "10m", "critical",
            "More than 1 % of the requests are answered with 5xx.",
        ),
        _alert(
            "Refusing", f"{rate(m.REQUESTS, window='5m', status='429')} / {some} > 0.05", "10m", "warning",
            "More than 5 % of the requests are refused for load: more replicas, or smaller quotas.",
        ),
        _alert(
            "FirstTokenSlow", f"{quantile(0.99, m.FIRST_TOKEN, 'backbone', window='5m')} > 10", "10m", "warning",
            "{{ $labels.backbone }}: a hundredth of the rows waits longer than 10 s for a first token.",
        ),
        _alert(
            "GangRebuilding", f"{largest(m.REBUILDING, 'backbone')} > 0", "2m", "critical",
            "{{ $labels.backbone }} has had no gang for two minutes; its log says why.",
        ),
        _alert(
            "GangUnstable", f"sum by (backbone) (increase({m.REBUILDS.name}[1h])) > 3", "0m", "warning",
            "{{ $labels.backbone }} was rebuilt more than three times in an hour.",
        ),
        _alert(
            "ExpertsThrash", f"{rate(m.EXPERTS_MOVED, 'backbone', window='5m', way='in')} > 1", "15m", "warning",
            "{{ $labels.backbone }} brings more than one expert a second: raise max_expert_mib.",
        ),
        _alert(
            "Drift", f"{largest(m.DRIFT, 'backbone', 'task')} > 5", "30m", "warning",
            "Texts of {{ $labels.task }} have moved more than five spreads from its reference.",
        ),
        _alert(
            "RegistryAway", f"{rate(m.REGISTRY_CALLS, window='5m', outcome='Unavailable')} > 0", "5m", "critical",
            "The registry does not answer: nothing can be registered, resolved or listed.",
        ),
    )  # fmt: skip
    return {"groups": [{"name": "metasepia", "rules": list(rules)}]}


def _alert(name: str, query: str, lasting: str, severity: str, summary: str) -> Json:
    return {
        "alert": f"Metasepia{name}",
        "expr": query,
        "for": lasting,
        "labels": {"severity": severity},
        "annotations": {"summary": summary},
    }


def files() -> dict[str, str]:
    """Texts by their paths in the repository."""
    made = "# Made by python -m serve.dashboards\n"
    return {
        "dashboards/metasepia.json": _text(grafana("metasepia", "Metasepia", overview())),
        "dashboards/metasepia-metrics.json": _text(
            grafana("metasepia-metrics", "Metasepia: every metric", everything())
        ),
        "alerts/metasepia.yaml": made + yaml.safe_dump(alerts(), sort_keys=False, width=120),
    }


def _text(tree: Json) -> str:
    return json.dumps(tree, indent=1, ensure_ascii=False) + "\n"


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    for path, text in files().items():
        (ROOT / path).parent.mkdir(exist_ok=True)
        (ROOT / path).write_text(text)
        print(path)


if __name__ == "__main__":
    main()
