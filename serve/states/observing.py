"""The gateway's side of online centroids: what it sees is added up here and told to the part that keeps them.

A request that names a task tells it at once, and its answer says how the task stands. What `auto` routes is told once
in `FLUSH_S`, however many requests there were, and a part that is away costs those observations and no request.
"""

import asyncio
import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from ray.serve.handle import DeploymentHandle

from actors.centroids import Seen
from cluster.settings import CentroidSettings
from metasepia.centroids import CentroidFacts, CentroidKey, KnownMean, OnlineCentroids
from metasepia.errors import InvalidRequest
from serve.access.tenants import PerTenant
from serve.parts import answered
from serve.requests.failures import unwrap

logger = logging.getLogger(__name__)

FLUSH_S = 1.0
TIMEOUT_S = 2.0
"""Longest wait for the part that keeps centroids."""
_NEVER = 2**62
"""The reference is the keeper's to choose: a gateway sees a part of a task's states."""


class Centroids(Protocol):
    """The part that keeps centroids, each tenant's apart; `actors.centroids.Centroids` says what each call does."""

    async def check_room(self, owner: str, keys: Sequence[CentroidKey]) -> None: ...
    async def absorb(self, owner: str, seen: Seen) -> tuple[CentroidFacts, ...]: ...
    async def compare(self, owner: str, seen: Seen) -> tuple[tuple[CentroidFacts, float], ...]: ...
    async def facts(self, owner: str) -> tuple[CentroidFacts, ...]: ...
    async def forget(self, owner: str, task: str) -> int: ...
    async def known_means(self, owner: str, backbone: str) -> tuple[KnownMean, ...]: ...


class ServedCentroids:
    """That part behind the handle of the one that mixes experts."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle

    async def check_room(self, owner: str, keys: Sequence[CentroidKey]) -> None:
        await answered(self._handle.centroids_check_room.remote(owner, tuple(keys)))

    async def absorb(self, owner: str, seen: Seen) -> tuple[CentroidFacts, ...]:
        return await answered(self._handle.centroids_absorb.remote(owner, seen))

    async def compare(self, owner: str, seen: Seen) -> tuple[tuple[CentroidFacts, float], ...]:
        return await answered(self._handle.centroids_compare.remote(owner, seen))

    async def facts(self, owner: str) -> tuple[CentroidFacts, ...]:
        return await answered(self._handle.centroids_facts.remote(owner))

    async def forget(self, owner: str, task: str) -> int:
        return await answered(self._handle.centroids_forget.remote(owner, task))

    async def known_means(self, owner: str, backbone: str) -> tuple[KnownMean, ...]:
        return await answered(self._handle.centroids_known_means.remote(owner, backbone))


class Observer:
    """What one gateway sees, each tenant's for itself: what one routes by never moves another's."""

    def __init__(
        self, part: Centroids, settings: CentroidSettings, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.part, self._settings = part, settings
        self._own = PerTenant(lambda owner: _Own(owner, part, settings, clock))

    def adding_up(self) -> OnlineCentroids:
        """Empty: for the states of one request, which bounds them."""
        limits = dataclasses.replace(self._settings.limits, reference_count=_NEVER)
        return OnlineCentroids(dataclasses.replace(limits, max_tasks=_NEVER, max_centroids=_NEVER))

    def routed(self, key: CentroidKey, state: np.ndarray, registered: np.ndarray | None) -> None:
        """Takes the state by which `auto` chose an expert, to be told soon. Costs no call and never fails."""
        self._own.mine().routed(key, state, registered)

    def known_means(self, backbone: str) -> tuple[KnownMean, ...]:
        """What the tenant's tasks look like, as the part that keeps them said when it was asked last.

        The same object until it says otherwise; asked again `FLUSH_S` later, without anybody waiting for it.
        """
        return self._own.mine().known_means(backbone)


class _Own:
    """What one tenant's requests bring."""

    def __init__(self, owner: str, part: Centroids, settings: CentroidSettings, clock: Callable[[], float]) -> None:
        self._owner, self._part, self._settings, self._clock = owner, part, settings, clock
        self._pending = self._bounded()
        self._flushing: asyncio.Task[None] | None = None
        self._num_left_out = 0
        self._known: tuple[KnownMean, ...] = ()
        self._asked_s = float("-inf")
        self._asking: asyncio.Task[None] | None = None

    def _bounded(self) -> OnlineCentroids:
        return OnlineCentroids(dataclasses.replace(self._settings.limits, reference_count=_NEVER))

    def routed(self, key: CentroidKey, state: np.ndarray, registered: np.ndarray | None) -> None:
        try:
            self._pending.observe(key, state[None], registered)
        except InvalidRequest:
            return  # no room until the next flush
        if self._flushing is None or self._flushing.done():
            self._flushing = asyncio.create_task(self._flush())

    async def _flush(self) -> None:
        await asyncio.sleep(FLUSH_S)
        while len(self._pending):
            seen, self._pending = tuple(self._pending), self._bounded()
            try:
                facts = await asyncio.wait_for(self._part.absorb(self._owner, seen), TIMEOUT_S)
            except Exception as error:
                logger.warning("routed requests were not counted in their centroids: %s", unwrap(error))
                return
            self._tell_left_out(len(seen) - len(facts))
            await asyncio.sleep(FLUSH_S)

    def _tell_left_out(self, num_left_out: int) -> None:
        """Clients' tasks may have taken all the room there is; said when it changes, not every second."""
        if num_left_out > self._num_left_out:
            logger.warning(
                "auto's own centroids find no room for %d of its experts; delete tasks, or let centroids.max_tasks and "
                "centroids.max_centroids be larger",
                num_left_out,
            )
        self._num_left_out = num_left_out

    def known_means(self, backbone: str) -> tuple[KnownMean, ...]:
        if self._settings.used_by_auto and self._clock() - self._asked_s > FLUSH_S:
            self._asked_s = self._clock()
            self._asking = asyncio.create_task(self._ask(backbone))
        return self._known

    async def _ask(self, backbone: str) -> None:
        try:
            known = await asyncio.wait_for(self._part.known_means(self._owner, backbone), TIMEOUT_S)
            if [(one.key, one.count) for one in known] != [(one.key, one.count) for one in self._known]:
                self._known = known
        except Exception as error:
            logger.warning("the stage centroid goes on with the online centroids of before: %s", unwrap(error))
