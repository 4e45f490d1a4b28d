"""Dashboards and alerts: made anew they are the committed ones, and their queries ask for what is recorded."""

import json
import re
from collections.abc import Iterator

import promql_parser
import pytest
import yaml

from actors import meters
from actors.recording import Counter, Histogram, Meter
from serve import dashboards

FILES = dashboards.files()
ADDED = {"node"}
"""Labels that every series of the page has beside its metric's own."""


def queries() -> list[tuple[str, str]]:
    """Every one, with where it stands."""
    found = []
    for path, text in FILES.items():
        if path.endswith(".json"):
            for panel in json.loads(text)["panels"]:
                found += [(f"{path}: {panel['title']}", one["expr"]) for one in panel.get("targets", ())]
        else:
            rules = [rule for group in yaml.safe_load(text)["groups"] for rule in group["rules"]]
            found += [(f"{path}: {rule['alert']}", rule["expr"]) for rule in rules]
    return found


def nodes(tree: object) -> Iterator[object]:
    """Of a parsed query, from the top down."""
    yield tree
    inner = [getattr(tree, name, None) for name in ("expr", "lhs", "rhs", "param", "vector_selector")]
    for child in (*inner, *(getattr(tree, "args", None) or ())):
        if child is not None:
            yield from nodes(child)


def metric_of(name: str) -> Meter | None:
    return meters.METRICS.get(name) or meters.METRICS.get(name.removesuffix("_bucket"))


def complaints(query: str) -> list[str]:
    """What is wrong with a query."""
    try:
        tree = promql_parser.parse(query.replace("$__rate_interval", "5m"))
    except ValueError as error:
        return [str(error)]
    found, selected, grouped = [], [], set()
    for node in nodes(tree):
        if isinstance(node, promql_parser.VectorSelector):
            meter = metric_of(node.name or "")
            if meter is None:
                found.append(f"no metric {node.name}")
                continue
            selected.append(meter)
            if isinstance(meter, Histogram) != (node.name or "").endswith("_bucket"):
                found.append(f"{node.name} is no series of {meter.name}")
            known = {*meter.all_labels, *ADDED}
            found += [
                f"{meter.name} has no label {one.name}" for one in node.matchers.matchers if one.name not in known
            ]
        if isinstance(node, promql_parser.AggregateExpr) and node.modifier is not None:
            grouped |= set(node.modifier.labels)
        if isinstance(node, promql_parser.Call) and node.func.name in ("rate", "increase"):
            name = node.args[0].vector_selector.name
            if not isinstance(metric_of(name), Counter | Histogram):
                found.append(f"{node.func.name} of {name}, which is a gauge")
    for label in grouped:
        if not any(
            label in (*meter.all_labels, *ADDED, *(("le",) if isinstance(meter, Histogram) else ()))
            for meter in selected
        ):
            found.append(f"grouped by {label}, which none of the metrics has")
    return found if selected else [*found, "asks for no metric"]


@pytest.mark.parametrize("path", list(FILES))
def test_the_committed_file_is_what_the_metrics_make(path: str):
    assert (dashboards.ROOT / path).read_text() == FILES[path], "run python -m serve.dashboards"


@pytest.mark.parametrize(("where", "query"), queries())
def test_a_query_asks_for_metrics_and_labels_that_exist(where: str, query: str):
    assert complaints(query) == [], f"{where}: {query}"


@pytest.mark.parametrize(
    ("query", "complaint"),
    [
        ("sum(rate(metasepia_request_total[5m]))", "no metric metasepia_request_total"),
        ("sum by (path) (rate(metasepia_requests_total[5m]))", "grouped by path"),
        ('metasepia_requests_total{tenant="a"}', "no label tenant"),
        ("rate(metasepia_queued_requests[5m])", "is a gauge"),
        ("metasepia_step_seconds", "is no series"),
        ("sum(rate(metasepia_requests_total[5m])", "unclosed"),
        ("1 + 1", "no metric"),
    ],
)
def test_a_wrong_query_is_told(query: str, complaint: str):
    assert any(complaint in one for one in complaints(query)), complaints(query)


def test_every_metric_has_its_panel():
    panels = json.loads(FILES["dashboards/metasepia-metrics.json"])["panels"]
    asked = " ".join(target["expr"] for panel in panels for target in panel.get("targets", ()))
    missing = [name for name in meters.METRICS if not re.search(rf"\b{name}(_bucket)?\b", asked)]
    assert missing == []


def test_panels_have_their_own_ids_and_places():
    for path in FILES:
        if path.endswith(".json"):
            panels = json.loads(FILES[path])["panels"]
            assert len({panel["id"] for panel in panels}) == len(panels)
            cells = [
                (x, y)
                for panel in panels
                for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
                for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
            ]
            assert len(set(cells)) == len(cells) and max(x for x, _ in cells) < 24


def test_alerts_say_how_bad_and_what():
    rules = yaml.safe_load(FILES["alerts/metasepia.yaml"])["groups"][0]["rules"]
    assert len({rule["alert"] for rule in rules}) == len(rules)
    for rule in rules:
        assert rule["labels"]["severity"] in ("warning", "critical") and rule["annotations"]["summary"]
        assert re.fullmatch(r"\d+[mh]", rule["for"])
