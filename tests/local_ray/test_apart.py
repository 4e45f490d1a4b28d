"""Requests that Ray cancels take none of their process's other calls along."""

import asyncio
import random
import threading
import time
from typing import Any

import pytest
import ray

from actors.apart import apart

NUM_TURNS = 20


class Rank:
    """Executes in order, with a group beside, as ranks and the registry do."""

    def __init__(self) -> None:
        self._rows: set[str] = set()

    @ray.method(concurrency_group="pulse")
    def num_rows(self) -> int:
        return len(self._rows)

    @ray.method(concurrency_group="door")
    def submit(self, key: str) -> None:
        time.sleep(0.01)
        self._rows.add(key)

    @ray.method(concurrency_group="door")
    def cancel(self, key: str) -> None:
        self._rows.discard(key)


class Owner:
    """Serves requests on a loop in a thread of its own, as Serve's replicas do."""

    def __init__(self, rank: Any) -> None:
        self._rank = rank
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()

    async def serve(self, key: str) -> None:
        serving = asyncio.run_coroutine_threadsafe(self._serve(key), self._loop)
        try:
            await asyncio.wrap_future(serving)
        finally:
            serving.cancel()

    async def _serve(self, key: str) -> None:
        try:
            await apart(self._rank.submit, key)
            await asyncio.sleep(60)
        finally:
            apart(self._rank.cancel, key)

    async def num_rows(self) -> int:
        return await self._rank.num_rows.remote()


@pytest.mark.usefixtures("cluster")
def test_a_storm_of_cancelled_requests_leaves_no_row_and_no_gap_in_the_order_of_calls() -> None:
    groups = {"pulse": 1, "door": 1}
    rank: Any = ray.remote(concurrency_groups=groups)(Rank).options(num_cpus=0.01).remote()  # pyright: ignore[reportCallIssue]
    owner: Any = ray.remote(Owner).options(num_cpus=0.01).remote(rank)
    ray.get(owner.num_rows.remote(), timeout=30)
    draw = random.Random(0)
    for turn in range(NUM_TURNS):
        asked = [owner.serve.remote(f"{turn}-{index}") for index in range(4)]
        time.sleep(draw.uniform(0.0, 0.06))
        for one in (*asked, *asked[:2]):  # Serve cancels some twice
            ray.cancel(one)
        ray.get(owner.num_rows.remote(), timeout=10)  # behind a gap it would take 30 s
    give_up = time.monotonic() + 5.0
    while ray.get(owner.num_rows.remote(), timeout=10) and time.monotonic() < give_up:
        time.sleep(0.1)
    assert ray.get(owner.num_rows.remote(), timeout=10) == 0
