"""Metrics, traces, logs and status of a real graph: what crosses its processes, and its nodes' agents."""

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from actors import meters
from serve.telemetry.gathering import CONTENT_TYPE
from tests.requests import BACKBONE
from tests.serving import EXAMPLES, INPUTS, Served
from tests.spans import CLIENT, OTHER_CLIENT, Read, read

SOON_S = 20.0
"""Metrics are as old as Ray's report interval, spans as old as a flush."""


def soon(told: Callable[[], Any]) -> Any:
    """The first that is not false, within SOON_S."""
    give_up = time.monotonic() + SOON_S
    while not (found := told()) and time.monotonic() < give_up:
        time.sleep(0.3)
    return found


def page(served: Served) -> dict[str, list[Any]]:
    """The samples of each family."""
    response = served.get("/metrics")
    assert response.status_code == 200 and response.headers["content-type"] == CONTENT_TYPE
    return {one.name: one.samples for one in text_string_to_metric_families(response.text)}


def count(served: Served, name: str, **labels: str) -> float:
    samples = page(served).get(name.removesuffix("_total"), [])
    return sum(one.value for one in samples if one.name == name and labels.items() <= one.labels.items())


def spans(served: Served) -> list[Read]:
    return read(served.home / "spans.jsonl")


def test_the_page_has_what_every_process_recorded(served: Served):
    asked = {"route": "/v1/classify", "status": "200"}
    before = count(served, "metasepia_requests_total", **asked)
    body = {"examples": EXAMPLES, "inputs": INPUTS}
    assert [served.post("/v1/classify", body).status_code for _ in range(3)] == [200] * 3
    chat = {"model": BACKBONE, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
    assert served.post("/v1/chat/completions", chat).status_code == 200
    assert soon(lambda: count(served, "metasepia_requests_total", **asked) == before + 3)
    assert soon(lambda: count(served, "metasepia_rows_total", backbone=BACKBONE))
    found = page(served)
    recorded = {
        "gateway": meters.DURATION,
        "scheduler": meters.ROW_PREFILL,
        "backbone": meters.FIRST_TOKEN,
        "encoder": meters.ENCODER_FORWARD,
        "pool": meters.POOL_FORWARD,
        "registry": meters.REGISTRY_TIME,
        "parts": meters.PART_READY,
        "queue": meters.QUEUED,
        "an inference gateway": meters.ADAPTER_INFO,
    }
    assert [who for who, meter in recorded.items() if meter.name not in found] == []
    assert count(served, "metasepia_metrics_nodes", state="answered") == 1
    assert count(served, "metasepia_metrics_nodes", state="silent") == 0
    begin = time.monotonic()
    page(served)
    assert time.monotonic() - begin < 1.0


def test_two_requests_are_two_traces_over_the_processes_and_share_a_batch(served: Served):
    chat = {"model": BACKBONE, "messages": [{"role": "user", "content": "Tell me a story"}], "max_tokens": 24}

    def ask(header: str) -> None:
        response = httpx.post(
            f"{served.url}/v1/chat/completions", json=chat, headers={"traceparent": header}, timeout=60
        )
        assert response.headers["traceresponse"].split("-")[1] == header.split("-")[1]

    threads = [threading.Thread(target=ask, args=(header,)) for header in (CLIENT, OTHER_CLIENT)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    trace, other = (header.split("-")[1] for header in (CLIENT, OTHER_CLIENT))

    def shared() -> list[Read]:
        return [one for one in spans(served) if {trace, other} <= {linked for linked, _ in one.links}]

    assert soon(shared), "no batch had both"
    assert soon(
        lambda: {"POST /v1/chat/completions", "backbone", "queued", "prefill", "decode"} <= names(served, trace)
    )
    own = [one for one in spans(served) if one.trace_id == trace]
    root = next(one for one in own if one.name.startswith("POST"))
    assert root.parent_id == CLIENT.split("-")[2]
    assert all(one.parent_id == root.span_id for one in own if one is not root)
    assert len({one.process for one in own}) >= 3  # gateway, replica, rank
    batches = {(one.trace_id, one.span_id) for one in shared()}
    assert any(batches & set(one.links) for one in own)


def test_a_classification_is_followed_into_encoder_and_pool(served: Served):
    header = CLIENT.replace("0af7", "77f7")
    body = {"examples": EXAMPLES, "inputs": ["Never seen before by any cache"]}
    response = httpx.post(f"{served.url}/v1/classify", json=body, headers={"traceparent": header}, timeout=60)
    assert response.status_code == 200
    trace = header.split("-")[1]
    wanted = {"POST /v1/classify", "encoder queue", "encoder", "reasoning queue", "reasoning"}
    assert soon(lambda: wanted <= names(served, trace)), names(served, trace)


def names(served: Served, trace: str) -> set[str]:
    return {one.name for one in spans(served) if one.trace_id == trace}


def test_the_log_has_the_request_by_its_id_and_none_of_its_texts(served: Served):
    body = {"examples": EXAMPLES, "inputs": ["an unmistakable sentence"]}
    response = httpx.post(f"{served.url}/v1/classify", json=body, headers={"x-request-id": "telemetry-1"}, timeout=60)
    receipt = response.json()["receipt"]

    def line() -> dict[str, Any] | None:
        lines = [json.loads(one) for one in Path(served.home / "log.jsonl").read_text().splitlines()]
        return next((one for one in lines if one.get("request_id") == "telemetry-1"), None)

    told = soon(line)
    assert (told["route"], told["status"], told["context"]) == ("/v1/classify", 200, receipt["context"])
    assert told["module"] == receipt["module"] and told["encoder"] == receipt["encoder"]
    text = Path(served.home / "log.jsonl").read_text()
    assert "unmistakable" not in text and EXAMPLES[0]["text"] not in text


def test_status_tells_of_every_part_and_its_replicas(served: Served):
    def ready() -> bool:
        return served.get("/v1/status").json()["ready"]

    assert soon(ready)
    told = served.get("/v1/status").json()
    replicas = {one["name"]: one["replicas"] for one in told["parts"]}
    assert replicas[f"backbone {BACKBONE}"] == {"status": "healthy", "running": 1}
    assert all(one["running"] >= 1 for one in replicas.values())
    assert told["backbones"][BACKBONE]["steps"] > 0 and told["admission"]["queued_requests"] == 0
    assert soon(lambda: BACKBONE in served.get("/v1/status").json()["all_replicas"].get("backbones", {}))
    begin = time.monotonic()
    for _ in range(10):
        served.get("/v1/status")
    assert time.monotonic() - begin < 5  # kept for a second
