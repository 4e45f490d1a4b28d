"""The gateway's side of online centroids."""

import asyncio
from pathlib import Path

import numpy as np
import pytest

from actors.centroids import TenantsCentroids
from cluster.settings import CentroidSettings
from metasepia.centroids import CentroidKey
from metasepia.registry.entries import LOCAL
from serve.states.observing import Observer


def key(task: str) -> CentroidKey:
    return CentroidKey(backbone="b" * 64, task=task, adapter="", layer=1, pooling="last")


def test_routed_states_that_find_no_room_are_told_once_and_cost_nobody_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.states.observing.FLUSH_S", 0.01)
    said: list[str] = []
    monkeypatch.setattr("serve.states.observing.logger.warning", lambda text, *args: said.append(text % args))
    settings = CentroidSettings(max_tasks=1, max_centroids=1)
    part = TenantsCentroids(settings, tmp_path)
    observer = Observer(part, settings)

    async def route() -> None:
        for _ in range(5):
            observer.routed(key("auto:maths"), np.ones(3, np.float32), None)
            await asyncio.sleep(0.03)

    async def work() -> None:
        seen = observer.adding_up()
        seen.observe(key("mail"), np.ones((1, 3), np.float32))
        await part.absorb(LOCAL, tuple(seen))
        await route()
        assert [one.key.task for one in await part.facts(LOCAL)] == ["mail"]
        assert [one[:38] for one in said] == ["auto's own centroids find no room for "]
        assert await part.forget(LOCAL, "mail") == 1
        await route()
        assert [one.key.task for one in await part.facts(LOCAL)] == ["auto:maths"]
        assert len(said) == 1
        await part.stop()

    asyncio.run(work())
