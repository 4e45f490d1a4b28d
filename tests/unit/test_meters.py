"""Metrics as they are declared, recorded and bounded, without Ray."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from actors import meters
from actors.recording import OTHER, Composed, Counter, Distribution, Gauge, Histogram, Sampling
from serve.telemetry.gathering import local_text

ROOT = Path(__file__).parents[2]
UNBOUNDED = {"tenant", "key", "key_id", "request_id", "trace_id", "context", "text", "digest"}


@pytest.fixture
def cleared() -> Iterator[None]:
    """The process's metrics, emptied before and after."""
    for one in meters.METRICS.values():
        one.clear()
    yield
    for one in meters.METRICS.values():
        one.clear()


def test_no_metric_is_divided_by_what_clients_make_up():
    for meter in meters.METRICS.values():
        assert not UNBOUNDED & set(meter.labels), meter.name


def test_names_follow_prometheus_customs():
    for name, meter in meters.METRICS.items():
        assert re.fullmatch(r"metasepia_[a-z_]+", name) and meter.help.endswith((".", "."))
        assert name.endswith("_total") == isinstance(meter, Counter), name
        if isinstance(meter, Histogram):
            assert list(meter.bounds) == sorted(set(meter.bounds)) and meter.bounds[0] > 0


def test_every_metric_that_is_declared_is_recorded_somewhere():
    names = {name: meter for name, meter in vars(meters).items() if meter in meters.METRICS.values()}
    assert len(names) == len(meters.METRICS)
    sources = [one.read_text() for folder in ("actors", "serve") for one in (ROOT / folder).rglob("*.py")]
    text = "\n".join(
        one for one in sources if '"""Every metric, declared once' not in one and "def overview" not in one
    )
    told = {
        name for name in names if re.search(rf"meters\.{name}(\.(inc|set|observe)\(|, (states|drifts|quality)\))", text)
    }
    composed = {name for name in names if f"self._put(meters.{name}" in text}
    assert set(names) - told - composed == set()
    assert [one.name for one in names.values() if isinstance(one, Composed)] == [
        "metasepia_metrics_nodes",
        "metasepia_adapter_requests_info",
    ]


def test_a_label_takes_so_many_values_and_calls_the_rest_other():
    meter = Counter("c_total", "A counter.", ("route", "status"), max_values=3)
    for index in range(10):
        meter.inc(route=f"/{index}", status="200")
    assert {labels["route"]: value for labels, value in meter.items()} == {"/0": 1, "/1": 1, "/2": 1, OTHER: 7}
    meter.inc(route="/1", status="404")
    assert meter.value(route="/1", status="404") == 1


def test_a_long_label_is_cut_to_one_series():
    meter = Gauge("g", "A gauge.", ("task",))
    meter.set(1, task="a" * 100)
    meter.set(2, task="a" * 5000)
    assert list(meter.items()) == [({"task": "a" * 100}, 2.0)]


def test_a_gauge_that_is_removed_makes_room_for_others():
    meter = Gauge("g", "A gauge.", ("backbone", "adapter"), max_values=2)
    for adapter in ("x", "y"):
        meter.set(1, backbone="b", adapter=adapter)
    meter.keep_only({("y",)}, backbone="b")
    meter.set(3, backbone="b", adapter="z")
    assert {labels["adapter"]: value for labels, value in meter.items()} == {"y": 1.0, "z": 3.0}
    meter.keep_only(set(), backbone="another")
    assert len(list(meter.items())) == 2


def test_quantiles_are_those_of_prometheus_on_the_same_buckets():
    seen = Distribution((1.0, 2.0, 4.0), [0, 4, 4, 0], 20.0)
    assert seen.quantile(0.5) == 2.0
    assert seen.quantile(0.75) == 3.0  # half way through the second four, which lie from 2 to 4
    assert Distribution((1.0, 2.0), [0, 0, 5]).quantile(0.99) == 2.0
    assert Distribution((1.0,), [0, 0]).quantile(0.5) is None


def test_a_bound_belongs_to_its_bucket_as_prometheus_has_it(cleared: None):
    for value in (0.001, 0.0011, 1000.0):
        meters.POOL_FORWARD.observe(value)
    seen = meters.POOL_FORWARD.value()
    assert seen is not None and (seen.counts[0], seen.counts[1], seen.counts[-1]) == (1, 1, 1)


def test_the_page_of_one_process_is_prometheus_text(cleared: None):
    meters.REQUESTS.inc(3, route='/v1/"odd"\\path\n', status="200")
    meters.QUEUED.set(2, backbone="tiny")
    for value in (0.004, 0.3, 500.0):
        meters.DURATION.observe(value, route="/x")
    families = {one.name: one for one in text_string_to_metric_families(local_text().decode())}
    (sample,) = families["metasepia_requests"].samples
    assert sample.labels == {"route": '/v1/"odd"\\path\n', "status": "200"} and sample.value == 3
    assert families["metasepia_queued_requests"].samples[0].labels["backbone"] == "tiny"
    buckets = {
        s.labels["le"]: s.value for s in families["metasepia_request_duration_seconds"].samples if "le" in s.labels
    }
    assert (buckets["0.005"], buckets["0.25"], buckets["0.5"], buckets["120.0"], buckets["+Inf"]) == (1, 1, 2, 2, 3)


def test_gauges_follow_objects_for_as_long_as_they_live():
    class Part:
        def __init__(self, fails: bool = False) -> None:
            self.num_asked, self.fails = 0, fails

        def tell(self) -> None:
            self.num_asked += 1
            if self.fails:
                raise RuntimeError

    sampling = Sampling(lambda: [])
    broken, one, other = Part(fails=True), Part(), Part()
    for part in (broken, one, other):
        sampling.follow(part.tell)
    sampling.sample()
    del other, part
    sampling.sample()
    assert (broken.num_asked, one.num_asked, len(sampling._asked)) == (2, 2, 2)
