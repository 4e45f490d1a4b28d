"""The rank processes of one gang: started, asked whether they live, and killed, together.

A gang dies as one. DeepSpeed's state belongs to its process, and a peer that lost a rank may be inside a collective, so
survivors are never reused. Killing goes by pid: `ray.kill` takes five seconds over a process that is stopped.
"""

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.backbone_shard import BackboneShardActor
from actors.processes import Identity, Joined, Pulse, process_state
from cluster import connect
from cluster.settings import BackboneSettings
from metasepia.decoding.inflight import Limits
from metasepia.models.prepared import PreparedBackbone

logger = logging.getLogger("metasepia.gang")

PULSE_INTERVAL_S = 0.25
STARVED_FACTOR = 4
"""A rank that the kernel runs, but that does not answer, is given this many heartbeats: the machine may be busy."""
STARTING_FACTOR = 30
"""The same while it starts: imports hold Python's lock, and on a busy machine for long."""
STALL_FACTOR = 4
"""A step that passes no transformer block for this many collective deadlines is taken to hang."""
GONE_TIMEOUT_S = 5.0


class Fault(Exception):
    """A gang can run no more steps. `by_itself`: a step raised, rather than a process that died or froze."""

    def __init__(self, reason: str, by_itself: bool) -> None:
        super().__init__(reason, by_itself)
        self.reason, self.by_itself = reason, by_itself

    def __str__(self) -> str:
        return self.reason


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where a gang's processes go: one bundle a rank, by explicit index."""

    group: PlacementGroup
    first_bundle: int


@dataclass(frozen=True, kw_only=True)
class GangParts:
    """All that a gang is started from."""

    settings: BackboneSettings
    prepared: PreparedBackbone
    home: Path
    placement: Placement
    limits: Limits


@dataclass(frozen=True)
class Pinned:
    """An expert that every rank holds for good, on rebuilt weights."""

    digest: str
    blob: bytes


class PinRefused(Exception):
    """The ranks are well, and cannot serve the expert that is to be pinned."""


@dataclass(eq=False)
class RankProcess:
    """One process that is, or can become, a rank."""

    handle: Any
    identity: Identity
    warming: "asyncio.Task[None]"

    @classmethod
    async def start(cls, parts: GangParts, bundle: int, *, spare_for: Identity | None = None) -> "RankProcess":
        """Starts a process and its warming. A spare takes no share of its bundle: the rank that it backs holds it."""
        spare = spare_for is not None
        settings = parts.settings
        env = {
            **connect.worker_env(settings.threads),
            "DS_ACCELERATOR": settings.device,
            "LOCAL_SIZE": str(settings.tp_size),
        }
        if spare_for is not None and settings.device == "cuda":
            # Without a share Ray hides every GPU; the spare must see the one of its rank.
            env |= {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "CUDA_VISIBLE_DEVICES": spare_for.visible_gpus}
        handle: Any = BackboneShardActor.options(
            num_cpus=0 if spare else settings.rank_cpus,
            num_gpus=0 if spare else settings.rank_gpus,
            max_restarts=0,
            runtime_env={"env_vars": env},
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                parts.placement.group, placement_group_bundle_index=parts.placement.first_bundle + bundle
            ),
        ).remote(settings, parts.prepared, str(parts.home), Identity.mine())
        try:
            identity: Identity = await asyncio.wait_for(handle.identity.remote(), settings.start_timeout_s)
        except BaseException:
            ray.kill(handle, no_restart=True)
            raise

        async def warm() -> None:
            await asyncio.wait_for(handle.warm.remote(), settings.start_timeout_s)

        return cls(handle, identity, asyncio.create_task(warm()))

    @property
    def is_local(self) -> bool:
        return self.identity.node == ray.get_runtime_context().get_node_id()

    def runs(self) -> bool:
        """Whether the kernel would run it: there, not stopped, not a zombie. False for another machine's: unknown."""
        if not self.is_local:
            return False
        state, ticks = process_state(self.identity.pid)
        return ticks == self.identity.start_ticks and state not in "XZTt"

    def is_gone(self) -> bool:
        state, ticks = process_state(self.identity.pid)
        return not self.is_local or ticks != self.identity.start_ticks or state in "XZ"

    def kill(self) -> None:
        self.warming.cancel()
        if self.is_local and not self.is_gone():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.identity.pid, signal.SIGKILL)
        ray.kill(self.handle, no_restart=True)


async def first_of(*waits: Coroutine[Any, Any, None]) -> None:
    """Returns or raises as the first of them does; the others are cancelled."""
    tasks = [asyncio.create_task(wait) for wait in waits]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()


async def kill_all(processes: Sequence[RankProcess]) -> None:
    """Kills processes and waits until they are gone: their memory is wanted by those that come after."""
    for process in processes:
        process.kill()
    until = time.monotonic() + GONE_TIMEOUT_S
    while not all(process.is_gone() for process in processes) and time.monotonic() < until:
        await asyncio.sleep(0.01)


@dataclass(eq=False)
class Gang:
    """One incarnation: the ranks of one process group."""

    settings: BackboneSettings
    processes: tuple[RankProcess, ...]
    joined: tuple[Joined, ...] = ()
    pinned: str | None = None
    """Digest."""

    @classmethod
    async def launch(
        cls, parts: GangParts, processes: Sequence[RankProcess] = (), pinned: Pinned | None = None
    ) -> "Gang":
        """A running gang, from warm processes if given, else from nothing. Leaves no process behind when it raises.

        Raises PinRefused, from what the rank said, when `pinned` is the reason.
        """
        started = list(processes)
        try:
            if not started:
                size = parts.settings.tp_size
                starting = [RankProcess.start(parts, bundle) for bundle in range(size)]
                results = await asyncio.gather(*starting, return_exceptions=True)
                started = [result for result in results if isinstance(result, RankProcess)]
                for result in results:
                    if isinstance(result, BaseException):
                        raise result
            gang = cls(parts.settings, tuple(started))
            # Watched from now on: a rank that freezes while the gang meets would hold the others until their timeouts.
            await asyncio.wait_for(
                first_of(gang._join(parts.limits, pinned), gang.watch(STARTING_FACTOR)), parts.settings.start_timeout_s
            )
        except BaseException:
            await kill_all(started)
            raise
        return gang

    async def _join(self, limits: Limits, pinned: Pinned | None) -> None:
        # Fail on the first that fails: the others may wait for it in vain.
        await asyncio.gather(*(process.warming for process in self.processes))
        first = self.processes[0]
        one_node = len({process.identity.node for process in self.processes}) == 1
        address = "127.0.0.1" if one_node else first.identity.address
        port = await first.handle.open_store.remote(address) if len(self.processes) > 1 else 0
        peers = [process.handle for process in self.processes[1:]]
        self.joined = tuple(
            await asyncio.gather(
                *(
                    process.handle.join.remote(tp_rank, address, port, peers if tp_rank == 0 else [], limits)
                    for tp_rank, process in enumerate(self.processes)
                )
            )
        )
        if pinned is not None:  # before the first row: no step runs that it could come between
            blob = ray.put(pinned.blob)
            try:
                await asyncio.gather(*(p.handle.pin_expert.remote(pinned.digest, blob) for p in self.processes))
            except RayTaskError as error:
                raise PinRefused(str(error.cause)) from error.cause
            self.pinned = pinned.digest

    @property
    def rank0(self) -> Any:
        return self.processes[0].handle

    async def put_expert(self, digest: str, blob: bytes) -> None:
        """Every rank has the expert aside when this returns; the scheduler's plan takes it in where there is room."""
        reference = ray.put(blob)
        first, *peers = self.processes
        # Rank 0 last: once it has it, its next plan may name it to all.
        await asyncio.gather(*(process.handle.put_expert.remote(digest, reference) for process in peers))
        await first.handle.put_expert.remote(digest, reference)

    async def take_back_expert(self, digest: str) -> None:
        """No rank has it aside when this returns."""
        await asyncio.gather(*(process.handle.take_back_expert.remote(digest) for process in self.processes))

    async def watch(self, patience: int = STARVED_FACTOR) -> None:
        """Never returns; raises Fault once a rank has died, is silent for too long, hangs or says that it failed.

        `patience`: heartbeats that a rank may miss while the kernel runs it. One that is stopped may miss none.
        """
        watchers = [asyncio.create_task(self._watch(rank, p, patience)) for rank, p in enumerate(self.processes)]
        try:
            await asyncio.gather(*watchers)
        finally:
            for watcher in watchers:
                watcher.cancel()

    async def _watch(self, rank: int, process: RankProcess, patience: int) -> None:
        last, since = -1, time.monotonic()
        while True:
            pulse = await self._pulse(rank, process, patience)
            if pulse.failed is not None:
                raise Fault(f"rank {rank} failed: {pulse.failed}", by_itself=True)
            if not pulse.busy or pulse.progress != last:
                last, since = pulse.progress, time.monotonic()
            if time.monotonic() - since > STALL_FACTOR * self.settings.collective_timeout_s:
                raise Fault(f"rank {rank} hangs in a step", by_itself=True)
            await asyncio.sleep(PULSE_INTERVAL_S)

    async def _pulse(self, rank: int, process: RankProcess, patience: int) -> Pulse:
        timeout_s = self.settings.heartbeat_timeout_s

        async def ask() -> Pulse:
            return await process.handle.pulse.remote()

        asking = asyncio.create_task(ask())
        try:
            for _ in range(patience):
                done, _pending = await asyncio.wait({asking}, timeout=timeout_s)
                if done:
                    return asking.result()
                if not process.runs():
                    break
            raise Fault(f"rank {rank} (pid {process.identity.pid}) is silent for {timeout_s:g} s", by_itself=False)
        except RayError as error:
            raise Fault(f"rank {rank} (pid {process.identity.pid}) died: {type(error).__name__}", False) from None
        finally:
            asking.cancel()

    def dead_ranks(self) -> list[int]:
        """Ranks of this machine whose process is gone, a zombie or stopped."""
        return [rank for rank, process in enumerate(self.processes) if process.is_local and not process.runs()]

    async def kill(self) -> None:
        await kill_all(self.processes)
