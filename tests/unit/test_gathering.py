"""The page of all nodes, from what Ray's agents say."""

import asyncio
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from prometheus_client.parser import text_string_to_metric_families

from actors import meters
from serve.telemetry.gathering import TIMEOUT_S, Gathered, Gatherer, Node

COMMON = 'Component="core_worker",NodeAddress="10.0.0.{n}",SessionName="s",Version="2.60.0",otel_scope_name="r"'


def page(n: int, *workers: tuple[str, int]) -> str:
    """As the agent of node `n` writes it: each worker's own series, and much of Ray's."""
    lines = ["# HELP ray_tasks x", "# TYPE ray_tasks gauge", 'ray_tasks{State="RUNNING"} 3.0']
    lines += ["# TYPE ray_metasepia_requests_total counter"]
    common = COMMON.format(n=n)
    for worker, count in workers:
        both = f'{common},WorkerId="{worker}"'
        lines.append(f'ray_metasepia_requests_total{{{both},route="/v1/classify",status="200"}} {count}.0')
        lines.append(f'ray_metasepia_request_duration_seconds_bucket{{{both},le="0.5",route="/x"}} {count}.0')
        lines.append(f'ray_metasepia_request_duration_seconds_bucket{{{both},le="+Inf",route="/x"}} {count + 1}.0')
        lines.append(f'ray_metasepia_request_duration_seconds_sum{{{both},route="/x"}} 1.5')
        lines.append(f'ray_metasepia_request_duration_seconds_count{{{both},route="/x"}} {count + 1}.0')
        lines.append(f'ray_metasepia_queued_requests{{{both},backbone="tiny",replica="{worker}"}} {count}.0')
        for adapter, state, rows in (("law", "running", 2), ("maths", "running", 1), ("art", "waiting", 4)):
            labels = f'adapter="{adapter}",backbone="tiny",replica="{worker}",state="{state}"'
            lines.append(f"ray_metasepia_adapter_requests{{{both},{labels}}} {rows}.0")
    lines += [f'ray_node_mem_used{{{common},ip="10.0.0.{n}"}} 1e+09', "ray_metasepia_unheard_of 3.0", "torn"]
    return "\n".join(lines)


def families(gathered: Gathered) -> dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], float]]:
    text = gathered.text().decode()
    return {
        family.name: {(one.name, tuple(sorted(one.labels.items()))): one.value for one in family.samples}
        for family in text_string_to_metric_families(text)
    }


def test_workers_of_a_node_are_added_up_and_nodes_are_not():
    gathered = Gathered()
    gathered.add("10.0.0.1", page(1, ("w1", 3), ("w2", 4)))
    gathered.add("10.0.0.2", page(2, ("w3", 5)))
    found = families(gathered)
    counted = {dict(labels)["node"]: value for (_, labels), value in found["metasepia_requests"].items()}
    assert counted == {"10.0.0.1": 7, "10.0.0.2": 5}
    gauge = {dict(labels)["replica"]: value for (_, labels), value in found["metasepia_queued_requests"].items()}
    assert gauge == {"w1": 3, "w2": 4, "w3": 5}
    buckets = {
        dict(k[1]).get("le"): v for k, v in found["metasepia_request_duration_seconds"].items() if "10.0.0.1" in str(k)
    }
    assert (buckets["0.5"], buckets["+Inf"]) == (7, 9)
    assert gathered.total(meters.QUEUED, backbone="tiny") == 12
    assert not any("unheard" in name or "tasks" in name for name in found)
    assert next(iter(found["ray_node_mem_used"].values())) == 1e9


def test_labels_that_only_grow_are_left_out():
    gathered = Gathered()
    gathered.add("10.0.0.1", page(1, ("w1", 3)))
    text = gathered.text().decode()
    assert not any(word in text for word in ("WorkerId", "SessionName", "otel_", "Version"))


def test_an_inference_gateway_reads_which_experts_run_and_wait():
    gathered = Gathered()
    gathered.add("10.0.0.1", page(1, ("w1", 3)))
    ((_, labels),) = families(gathered)["metasepia_adapter_requests_info"]
    assert dict(labels)["running_lora_adapters"] == "law,maths"
    assert dict(labels)["waiting_lora_adapters"] == "art"


def test_a_node_that_keeps_silent_costs_its_own_series_and_is_told():
    async def fetch(node: Node) -> str:
        if node.address == "10.0.0.2":
            await asyncio.sleep(60)
        if node.address == "10.0.0.3":
            raise OSError("refused")
        return page(1, ("w1", 3))

    nodes = tuple(Node(f"10.0.0.{n}", 1) for n in (1, 2, 3))
    begin = time.monotonic()
    gathered = asyncio.run(Gatherer(lambda: nodes, fetch).gather())
    assert time.monotonic() - begin < TIMEOUT_S + 0.5
    states = {
        dict(labels)["state"]: value for (_, labels), value in families(gathered)["metasepia_metrics_nodes"].items()
    }
    assert states == {"answered": 1, "silent": 2}
    assert gathered.total(meters.REQUESTS) == 3


def test_the_list_of_nodes_is_asked_for_once_in_a_while():
    clock, asked = [0.0], []

    def nodes() -> tuple[Node, ...]:
        asked.append(clock[0])
        return (Node("10.0.0.1", 1),)

    async def fetch(_: Node) -> str:
        return page(1, ("w1", 3))

    async def main() -> None:
        gatherer = Gatherer(nodes, fetch, lambda: clock[0])
        for clock[0] in (0.0, 1.0, 4.0, 6.0, 7.0):
            await gatherer.gather()

    asyncio.run(main())
    assert asked == [0.0, 6.0]


@pytest.fixture
def agent() -> Iterator[int]:
    """A server that answers as an agent does; its port."""

    class Agent(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/metrics" else 404)
            self.end_headers()
            self.wfile.write(page(1, ("w1", 9)).encode())

        def log_message(self, format: str, *args: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Agent)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()


def test_agents_are_asked_over_http(agent: int):
    nodes = (Node("127.0.0.1", agent), Node("127.0.0.1", 1))
    gathered = asyncio.run(Gatherer(lambda: nodes).gather())
    assert (gathered.num_answered, gathered.num_silent, gathered.total(meters.REQUESTS)) == (1, 1, 9)
