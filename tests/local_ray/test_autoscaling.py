"""One gang becomes two and one again under load, and no row fails."""

import asyncio
import dataclasses
import itertools
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from ray import serve

from actors import registry
from cluster import settings as settings_of
from cluster.scaling_settings import ScalingSettings
from metasepia.rows import Row, Sampling
from serve import graph, prepare

pytestmark = [pytest.mark.timeout(240), pytest.mark.usefixtures("cluster")]


def test_a_gang_scales_from_one_to_two_to_one_and_no_row_fails(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, run: Callable[..., Any]
):
    scaling = ScalingSettings(
        max_replicas=2, queued_per_replica=1500.0, upscale_delay_s=0.5, downscale_delay_s=1.0, look_back_s=1.0
    )
    read = settings_of.read("laptop", {}, {"home": str(tmp_path), "ray": {"num_cpus": 8.0}})
    one = dataclasses.replace(
        read.backbones[0], id="tiny", source=str(tiny_checkpoint("llama")), scaling=scaling, rank_cpus=0.5
    )
    settings = dataclasses.replace(read, backbones=(one,))
    prepared = prepare.ready(settings)["tiny"]
    client = registry.start(settings)
    serve.start(proxy_location="Disabled")
    handle = serve.run(graph.backbone(settings, one, client), name="scaled", route_prefix=None)
    streaming, finished, stop = handle.options(stream=True), list[int](), asyncio.Event()

    async def ask(index: int) -> None:
        row = Row(
            request_id=f"row-{index}",
            backbone=prepared.digest,
            token_ids=(72, 105, 32 + index % 64),
            sampling=Sampling(temperature=0.0, max_tokens=200),
            deadline_unix_s=time.time() + 60,
        )
        chunks: Any = streaming.generate.remote(row)
        num_tokens = 0
        async with aclosing(_each(chunks)) as answers:
            async for chunk in answers:
                num_tokens += len(chunk.token_ids)
        assert num_tokens == 200
        finished.append(index)

    async def busy(first: int, done: asyncio.Event) -> None:
        index = first
        while not done.is_set():
            await ask(index)
            index += 1000

    async def scenario() -> tuple[list[int], int]:
        seen, full = [_replicas()], asyncio.Event()
        workers = [asyncio.create_task(busy(index, full)) for index in range(24)]
        trickle = asyncio.create_task(busy(500, stop))
        try:
            await _until(2, seen, [*workers, trickle])
            await asyncio.sleep(2.0)  # both serve
            full.set()
            await asyncio.gather(*workers)
            await _until(1, seen, [trickle])
            count = len(finished)
            await asyncio.sleep(1.5)
            stop.set()
            await trickle
            return seen, len(finished) - count
        finally:
            for task in (*workers, trickle):
                task.cancel()
            await asyncio.gather(*workers, trickle, return_exceptions=True)

    try:
        seen, after = run(scenario(), 180)
    finally:
        serve.shutdown()
        registry.stop()
    assert [number for number, _ in itertools.groupby(seen)] == [1, 2, 1]
    assert after > 0  # the one that is left goes on


def _replicas() -> int:
    """Of the deployment, running and not about to leave."""
    states: Any = serve.status().applications["scaled"].deployments["backbone-tiny"].replica_states
    return states.get("RUNNING", 0)


async def _until(wanted: int, seen: list[int], tasks: list[asyncio.Task[None]]) -> None:
    give_up_s = time.monotonic() + 80
    while seen[-1] != wanted:
        seen.append(await asyncio.to_thread(_replicas))
        for task in tasks:
            if task.done():
                task.result()
        assert time.monotonic() < give_up_s, f"replicas so far: {seen[-5:]}"
        await asyncio.sleep(0.2)


async def _each(chunks: Any) -> AsyncGenerator[Any]:
    async for chunk in chunks:
        yield chunk
