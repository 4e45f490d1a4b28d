"""The door under more than it can do, with clients that go, and at its end."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from metasepia.errors import Unavailable
from serve.load.lanes import Width
from tests.doors import Bench
from tests.unit.test_prompts import write_byte_tokenizer

BUSY = ("queued_requests", "queued_tokens", "queued_bytes", "running_requests", "running_tokens")
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
STREAM = CHAT | {"stream": True}


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    made = Bench(write_byte_tokenizer(tmp_path))
    made.says("yes")
    return made


def busy(bench: Bench) -> dict[str, float]:
    statistics = bench.door.admission.statistics()
    return {name: statistics[name] for name in BUSY if statistics[name]}


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


def talk(bench: Bench, what: Callable[[httpx.AsyncClient], Awaitable[Any]]) -> Any:
    return bench.run(lambda client: asyncio.wait_for(what(client), 20))


def post(client: httpx.AsyncClient, body: dict[str, Any]) -> "asyncio.Task[httpx.Response]":
    return asyncio.create_task(client.post("/v1/chat/completions", json=body))


async def stream(bench: Bench, leave_at: str) -> None:
    """A client of the application itself, who goes at a message of the answer: none, `start` or `body`."""
    gone = asyncio.Event()
    body = json.dumps(STREAM).encode()
    sent = False

    async def receive() -> dict[str, Any]:
        nonlocal sent
        if not sent:
            sent = True
            if leave_at == "none":
                gone.set()
            return {"type": "http.request", "body": body, "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if message["type"].endswith(leave_at):
            gone.set()
            await asyncio.sleep(0)

    scope = {
        "type": "http", "method": "POST", "path": "/v1/chat/completions", "raw_path": b"", "query_string": b"",
        "headers": [(b"content-type", b"application/json")], "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1", "scheme": "http", "server": ("door", 80), "client": ("me", 1), "root_path": "",
    }  # fmt: skip
    await bench.app(scope, receive, send)


def test_what_is_beyond_the_lane_waits_and_what_is_beyond_the_queue_is_a_429_in_words(bench: Bench) -> None:
    bench.backbone.hang, bench.backbone.answer = True, []
    bench.door.admission.widen("tiny", Width(tokens=10**6, rows=2))

    async def what(client: httpx.AsyncClient) -> httpx.Response:
        waiting = [post(client, CHAT) for _ in range(2 + 512)]
        await until(lambda: bench.door.admission.statistics()["queued_requests"] == 512)
        assert len(bench.backbone.rows) == 2
        refused = await client.post("/v1/chat/completions", json=CHAT)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        return refused

    refused = talk(bench, what)
    assert refused.status_code == 429 and refused.json()["error"]["code"] == "overloaded"
    assert int(refused.headers["retry-after"]) >= 1
    assert busy(bench) == {} and bench.backbone.num_closed == 2


@pytest.mark.parametrize("leave_at", ["none", "start", "body"])
def test_after_a_storm_of_clients_that_go_nothing_runs_and_no_task_is_left(bench: Bench, leave_at: str) -> None:
    bench.door.admission.widen("tiny", Width(tokens=10**6, rows=8))

    async def what(client: httpx.AsyncClient) -> None:
        await client.post("/v1/chat/completions", json=CHAT)  # whatever it starts once, it has started
        bench.backbone.rows.clear()
        bench.backbone.num_closed, before = 0, len(asyncio.all_tasks())
        for _ in range(5):
            await asyncio.gather(*(stream(bench, leave_at) for _ in range(40)))
        await until(lambda: len(asyncio.all_tasks()) <= before)
        assert busy(bench) == {} and bench.door.drain.num_running == 0
        assert bench.backbone.num_closed == len(bench.backbone.rows)
        bench.backbone.rows.clear()
        assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 200

    talk(bench, what)


def test_every_route_that_costs_gives_its_place_back(bench: Bench, tmp_path: Path) -> None:
    bench.with_contexts(tmp_path)
    taken: list[str] = []
    admission = bench.door.admission
    admit = admission.admitted

    def admitted(*cost: Any, part: str, **rest: Any) -> Any:
        taken.append(part)
        return admit(*cost, part=part, **rest)

    admission.admitted = admitted  # pyright: ignore[reportAttributeAccessIssue]
    examples = [{"text": "good one", "label": "a"}, {"text": "a bad one here", "label": "b"}]
    context = bench.post("/v1/contexts", {"examples": examples}).json()["id"]
    for path, body in (
        ("/v1/chat/completions", CHAT),
        ("/v1/completions", {"model": "tiny", "prompt": "hi", "max_tokens": 2}),
        ("/v1/embeddings", {"model": "minilm-fake", "input": "a text"}),
        ("/v1/embeddings", {"model": "tiny", "input": "a text"}),
        ("/v1/classify", {"model": context, "inputs": ["some"]}),
        ("/v1/classify", {"examples": examples, "inputs": ["some"]}),
        (f"/v1/contexts/{context}/examples", {"examples": [{"text": "more", "label": "a"}]}),
        ("/v1/hidden_states", {"model": "tiny", "input": "a text", "layers": [0]}),
        ("/v1/classify", {"examples": [{"vector": [1, 0], "label": "a"}, {"vector": [0, 1], "label": "b"}],
                          "inputs": [{"vector": [1, 1]}]}),
    ):  # fmt: skip
        taken.clear()
        answer = bench.post(path, body)
        assert answer.status_code == 200, answer.text
        assert len(taken) == 1, path
        assert busy(bench) == {}


def test_what_is_under_way_finishes_and_what_comes_is_a_503_while_draining(bench: Bench) -> None:
    bench.backbone.hang = True
    answer, bench.backbone.answer = bench.backbone.answer, []

    async def what(client: httpx.AsyncClient) -> None:
        under_way = [post(client, CHAT), post(client, STREAM)]
        await until(lambda: len(bench.backbone.rows) == 2)
        draining = asyncio.create_task(bench.door.drain.run(10.0))
        await asyncio.sleep(0)
        refused = await client.post("/v1/chat/completions", json=CHAT)
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "unavailable"
        assert refused.headers["connection"] == "close" and int(refused.headers["retry-after"]) >= 1
        health = await client.get("/health")
        assert health.status_code == 503 and health.json()["status"] == "draining"
        assert (await client.get("/version")).status_code == 200
        assert not draining.done()
        for task in under_way:
            task.cancel()
        assert await draining == 0

    talk(bench, what)
    bench.backbone.answer = answer


def test_who_waits_for_a_turn_that_does_not_come_before_the_end_is_told_to_go_elsewhere(bench: Bench) -> None:
    bench.backbone.hang, bench.backbone.answer = True, []
    bench.door.admission.widen("tiny", Width(tokens=10**6, rows=1))

    async def what(client: httpx.AsyncClient) -> None:
        runs, waits = post(client, CHAT), post(client, CHAT)
        await until(lambda: bench.door.admission.statistics()["queued_requests"] == 1)
        assert await bench.door.drain.run(0.2) == 1  # the one that hangs
        refused = await waits
        assert refused.status_code == 503 and refused.json()["error"]["message"] == str(
            Unavailable("the server, which is ending,", 2.0)
        )
        runs.cancel()

    talk(bench, what)
