"""Clients that go all at once, at the running graph: nothing runs on, and the gang lives."""

import asyncio
import random
import time

import httpx

from tests.requests import BACKBONE
from tests.serving import Served

STREAM = {"model": BACKBONE, "prompt": "Once upon a time", "max_tokens": 1500, "stream": True}
NUM_CLIENTS = 80


def ranks(served: Served) -> set[int]:
    return {process.pid for process in served.living() if "BackboneShard" in " ".join(process.cmdline())}


async def running(client: httpx.AsyncClient) -> dict[str, float]:
    """Rows and requests that run or wait anywhere."""
    status = (await client.get("/v1/status")).raise_for_status().json()
    found = status["backbones"][BACKBONE] | status["admission"]
    names = ("num_live", "num_reading", "num_waiting", "queued_requests", "running_requests")
    return {name: found.get(name, -1) for name in names if found.get(name, -1)}


def test_after_a_storm_of_clients_that_go_nothing_runs_on_and_the_gang_lives(served: Served) -> None:
    before = ranks(served)

    async def leave(client: httpx.AsyncClient, after_s: float) -> None:
        try:
            async with asyncio.timeout(after_s), client.stream("POST", "/v1/completions", json=STREAM) as answer:
                async for _ in answer.aiter_lines():
                    pass
        except (TimeoutError, httpx.HTTPError):
            pass

    async def talk() -> None:
        draw = random.Random(0)
        async with httpx.AsyncClient(base_url=served.url, timeout=30) as client:
            for _ in range(NUM_CLIENTS // 8):
                await asyncio.gather(*(leave(client, draw.uniform(0.0, 0.3)) for _ in range(8)))
            until = time.monotonic() + 10  # 1,500 tokens take longer
            while left := await running(client):
                assert time.monotonic() < until, left
                await asyncio.sleep(0.2)

    asyncio.run(talk())
    assert ranks(served) == before and before
    answer = served.post("/v1/completions", {"model": BACKBONE, "prompt": "Once", "max_tokens": 2})
    assert answer.status_code == 200
