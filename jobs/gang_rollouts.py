"""Rollouts of training by a gang on Ray, started for the run: the trained vectors go there as an expert each step."""

import asyncio
import concurrent.futures
import threading
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

from actors.backbone import BackboneGroup
from cluster import placement
from cluster.connect import connect
from cluster.resources import gang_bundles
from cluster.settings import BackboneSettings, RaySettings
from metasepia.experts.lora import LoraAdapter
from metasepia.experts.vectors import ExpertVectors
from metasepia.models.prepared import PreparedBackbone
from metasepia.rows import Row
from metasepia.training.rollouts import Rolled

T = TypeVar("T")
START_TIMEOUT_S = 900.0
MAX_EXPERT_MIB = 64.0
"""Held by a rank at once: the last few steps' vectors."""


class Loop(Protocol):
    """Runs coroutines in the event loop that a group belongs to."""

    def run(self, work: Coroutine[Any, Any, Any], timeout_s: float | None = None) -> Any: ...


class GangRollouts:
    """Rows over a `BackboneGroup`, whose event loop is a thread here."""

    def __init__(self, group: BackboneGroup, loop: "Loop", blobs: dict[str, bytes]) -> None:
        """`blobs` is what the group fetches experts from."""
        self._group, self._loop, self._blobs = group, loop, blobs

    def put(self, adapter: ExpertVectors | LoraAdapter) -> str:
        """The ranks fetch it with the first row that names it, and forget the longest unused."""
        if adapter.digest not in self._blobs:
            self._blobs.clear()
            self._blobs[adapter.digest] = adapter.to_bytes()
        return adapter.digest

    def generate(self, rows: Sequence[Row]) -> list[Rolled]:
        return self._loop.run(self._gathered(rows))

    async def _gathered(self, rows: Sequence[Row]) -> list[Rolled]:
        return await asyncio.gather(*(self._whole(row) for row in rows))

    async def _whole(self, row: Row) -> Rolled:
        rolled = Rolled()
        async for chunk in self._group.generate(row):
            rolled.add(chunk)
        return rolled

    def close(self) -> None:
        self._loop.run(self._group.stop())


def settings_of(prepared: PreparedBackbone, layers: Sequence[str], tp_size: int) -> BackboneSettings:
    """A gang that answers many rows at once in fp32, with experts on these layers."""
    return BackboneSettings(
        id="rollouts",
        source=prepared.source,
        tp_size=tp_size,
        expert_layers=tuple(layers),
        max_rows=32,
        max_batch_tokens=1 << 15,
        max_queued_tokens=10**8,
        max_expert_mib=MAX_EXPERT_MIB,
    )


@contextmanager
def gang_rollouts(
    prepared: PreparedBackbone, home: Path, layers: Sequence[str], *, tp_size: int = 1
) -> Iterator[GangRollouts]:
    """A gang of `tp_size` ranks in fp32 with experts on these layers, on a Ray of its own; all gone afterwards."""
    import ray
    from ray.util.placement_group import remove_placement_group

    settings = settings_of(prepared, layers, tp_size)
    connect(RaySettings(num_cpus=1.0 + settings.rank_cpus * tp_size, object_store_gib=0.2))
    place = placement.place(gang_bundles(settings)[1:], name=settings.id)
    try:
        blobs: dict[str, bytes] = {}
        with _Loop() as loop:
            start = BackboneGroup.start(settings, prepared, home, place, first_bundle=0, fetch=blobs.__getitem__)
            rollouts = GangRollouts(loop.run(start, START_TIMEOUT_S), loop, blobs)
            try:
                yield rollouts
            finally:
                rollouts.close()
    finally:
        remove_placement_group(place)
        ray.shutdown()


class _Loop:
    """An event loop in a thread of its own."""

    def __enter__(self) -> "_Loop":
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rollouts", daemon=True)
        self._thread.start()
        return self

    def run(self, work: Coroutine[Any, Any, T], timeout_s: float | None = None) -> T:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(timeout_s)
        except (TimeoutError, concurrent.futures.CancelledError, KeyboardInterrupt):
            future.cancel()
            raise

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._loop.close()
