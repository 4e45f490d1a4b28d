"""The Serve replica that owns one gang: it streams, scores and embeds; all behaviour is in `actors.backbone`."""

import asyncio
import dataclasses
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

import ray

from actors import logs
from actors.backbone import BackboneGroup
from actors.registry import RegistryClient
from cluster.settings import Settings
from metasepia.errors import Unavailable
from metasepia.registry.entries import LOCAL
from metasepia.rows import HiddenStates, Row, Scores, TokenChunk
from serve import prepare, shipped
from serve.load.autoscaling import QUEUED, WAITING, waiting_tokens


class BackboneReplica:
    """A `BackboneGroup` in the replica's own placement group: bundle 0 is the replica, then one a rank."""

    async def __init__(self, settings: Settings, id_: str, registry: RegistryClient) -> None:
        logs.begin()
        group = ray.util.get_current_placement_group()
        assert group is not None  # graph.py gives every backbone one
        one = self._settings = next(one for one in settings.backbones if one.id == id_)
        ready = asyncio.to_thread(prepare.ready, dataclasses.replace(settings, backbones=(one,)))
        prepared = (await ready)[id_]
        # Whoever starts the graph, the registry has what comes with the package before the first request for it.
        await registry.check_home()
        await shipped.import_all(registry)

        async def resolve(name: str) -> str:
            return (await registry.resolve("expert", name, LOCAL)).digest

        self._group = await BackboneGroup.start(
            one, prepared, settings.home, group, first_bundle=1, fetch=registry.get, resolve=resolve
        )
        self._served_unix_s = time.time()

    async def __del__(self) -> None:
        # Serve awaits this when it takes the replica down.
        if hasattr(self, "_group"):
            await self._group.stop()

    async def generate(self, row: Row) -> AsyncGenerator[TokenChunk]:
        async with aclosing(self._group.generate(row)) as chunks:  # pyright: ignore[reportArgumentType]
            async for chunk in chunks:
                yield chunk

    async def drop(self, request_id: str) -> None:
        """The caller has gone: Serve's own cancellation is a best effort, and a row runs for minutes."""
        self._group.drop(request_id)

    async def score(self, rows: Sequence[Row]) -> list[Scores]:
        return await self._each(rows, self._group.score)

    async def hidden_states(self, rows: Sequence[Row]) -> list[HiddenStates]:
        return await self._each(rows, self._group.hidden_states)

    async def load(self) -> dict[str, float]:
        """The scheduler's gauges by name. Raises Unavailable while the gang is being rebuilt."""
        return {name: float(value) for name, value in dataclasses.asdict(await self._group.load()).items()}

    async def info(self) -> dict[str, Any]:
        return dataclasses.asdict(self._group.info)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """For Serve's autoscaler (`serve.load.autoscaling`)."""
        return {QUEUED: float(self._group.queued_tokens), WAITING: await waiting_tokens(self._settings.id)}

    async def check_health(self) -> None:
        """For Serve. A gang that is being rebuilt is no reason to replace the replica: the group does that itself."""
        try:
            _ = self._group.info
            self._served_unix_s = time.time()
        except Unavailable:
            if time.time() - self._served_unix_s > self._settings.start_timeout_s:
                raise

    async def _each(self, rows: Sequence[Row], ask: Any) -> list[Any]:
        """Every row's answer, in order. Few at a time: one request must not fill the queue that all share."""
        longest = max((len(row.token_ids) for row in rows), default=1)
        at_once = max(1, min(2 * self._settings.max_rows, self._settings.max_queued_tokens // 4 // longest))
        turn = asyncio.Semaphore(at_once)

        async def one(row: Row) -> Any:
            async with turn:
                return await ask(row)

        tasks = [asyncio.create_task(one(row)) for row in rows]
        try:
            return await asyncio.gather(*tasks)
        except BaseException:
            for task in tasks:
                task.cancel()
            raise
