"""A gang of ranks as one backbone: rows go in, answers come out, and a dead rank costs time but no row.

`BackboneGroup` lives in its owner's event loop (a Serve replica or a job). It holds every row until its last answer
has been delivered. When a rank dies or freezes, the whole gang is killed and replaced, and the rows are run again: a
row is a pure function of its message, and `Row.sent` tells the new gang what the caller already has.
"""

import asyncio
import contextlib
import dataclasses
import itertools
import json
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import PlacementGroup

from actors import meters, tracing
from actors.apart import apart
from actors.gang import Fault, Gang, GangParts, PinRefused, Placement, RankProcess, first_of, kill_all
from actors.gang_experts import Fetch, GangExperts, Resolve, cause
from actors.messages import News
from actors.processes import Identity, Joined
from actors.row_meters import Pace
from cluster.settings import BackboneSettings
from metasepia.decoding.asking import AsksRows
from metasepia.decoding.inflight import Answer, Limits, Load
from metasepia.errors import DeadlineExceeded, MetasepiaError, Overloaded, Unavailable
from metasepia.models import families
from metasepia.models.prepared import PreparedBackbone
from metasepia.rows import Executed, HiddenStates, Row, Scores, TokenChunk, Want

logger = logging.getLogger("metasepia.gang")

POLL_S = 5.0
"""Longest wait of one call for answers."""
LATE_S = 1.0
"""The scheduler answers a late row by itself; the owner does, this much later, when the scheduler is not there."""
MAX_FAILED_STEPS = 2
"""Gangs whose step raised with this row in it; then the row is refused, and the others go on."""
REBUILD_S = 20.0
CHECK_TIMEOUT_S = 10.0
MAX_PAUSE_S = 30.0
MAX_DROPPED = 4096


@dataclass(frozen=True, kw_only=True)
class Rebuild:
    """One replacement of a gang."""

    reason: str
    noticed_unix_s: float
    seconds: float
    """From noticed to serving."""
    from_spares: bool


@dataclass(frozen=True, kw_only=True)
class GroupInfo:
    """What runs now, as the ranks found it."""

    prepared: PreparedBackbone
    factors: str | None
    dtype: str
    device: str
    tp_size: int
    all_reduce: str
    pids: tuple[int, ...]
    spare_pids: tuple[int, ...]
    """Warm spares only."""
    pinned: str | None
    """Digest of the expert whose weights are rebuilt."""
    start_seconds: dict[str, float]
    """Parts of rank 0's start."""
    rebuilds: tuple[Rebuild, ...]


@dataclass(eq=False)
class _Held:
    """A row that is not answered to its end."""

    row: Row
    asked: str
    """The caller's name for it."""
    inbox: "asyncio.Queue[Answer]" = field(default_factory=asyncio.Queue)
    sent: list[int] = field(default_factory=list)
    gang: Gang | None = None
    failed_steps: int = 0

    @property
    def num_tokens(self) -> int:
        return len(self.row.token_ids) + (self.row.sampling.max_tokens if self.row.want == "tokens" else 0)

    @property
    def remaining_tokens(self) -> int:
        """Still to be read or, at most, sent."""
        return self.row.sampling.max_tokens - len(self.sent) if self.sent else self.num_tokens


class BackboneGroup(AsksRows):
    """One frozen backbone on a tensor-parallel gang. All methods belong to the event loop that started it."""

    def __init__(self, parts: GangParts, fetch: Fetch | None, resolve: Resolve | None) -> None:
        self._parts, self._settings = parts, parts.settings
        self._experts = GangExperts(parts.settings, fetch, resolve)
        self._gang: Gang | None = None
        self._spares: list[RankProcess] = []
        self._held: dict[str, _Held] = {}
        self._dropped: OrderedDict[str, None] = OrderedDict()
        """Requests that nobody waits for, the last of them."""
        self._keys = itertools.count()
        self._rebuilds: list[Rebuild] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._supervisor: asyncio.Task[None] | None = None
        self._problem: str | None = None

    # -- life ----------------------------------------------------------------------------------------------------------

    @classmethod
    async def start(
        cls,
        settings: BackboneSettings,
        prepared: PreparedBackbone,
        home: Path,
        placement_group: PlacementGroup,
        first_bundle: int = 1,
        fetch: Fetch | None = None,
        resolve: Resolve | None = None,
    ) -> "BackboneGroup":
        """A serving group, its ranks in the bundles from `first_bundle` on.

        `fetch` is asked for experts that the ranks do not hold, `resolve` for what the setting `pinned` names. Raises
        NotSupported or InvalidSettings for a model that cannot be cut into `tp_size`, and InvalidSettings for a pin
        that is unknown, before any process is started; InvalidSettings for one that cannot be served, and whatever
        keeps a rank from starting.
        """
        families.check(json.loads((Path(prepared.path) / "config.json").read_text()), settings.tp_size)
        limits = Limits(
            max_rows=settings.max_rows,
            max_batch_tokens=settings.max_batch_tokens,
            max_queued_tokens=settings.max_queued_tokens,
            max_prefix_tokens=settings.max_prefix_tokens,
        )
        placement = Placement(group=placement_group, first_bundle=first_bundle)
        parts = GangParts(settings=settings, prepared=prepared, home=home, placement=placement, limits=limits)
        group = cls(parts, fetch, resolve)
        pinned = await group._experts.pinned()
        try:
            group._gang = await Gang.launch(parts, pinned=pinned)
        except PinRefused as error:
            raise group._experts.bad_pin(error) from error
        except RayTaskError as error:
            raise cause(error) from None
        group._experts.served = pinned
        meters.REBUILDING.set(0, backbone=settings.id)
        group._supervisor = asyncio.create_task(group._supervise())
        group._warm_spares()
        return group

    async def stop(self) -> None:
        """Ends every process; rows that wait are refused with Unavailable."""
        for task in [self._supervisor, *self._tasks]:
            if task is not None:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await task
        await self._experts.stop()
        gang, self._gang = self._gang, None
        self._problem = "stopped"
        spares, self._spares = self._spares, []
        await kill_all([*(gang.processes if gang else ()), *spares])
        for held in self._held.values():
            held.inbox.put_nowait(self._unavailable())

    @property
    def info(self) -> GroupInfo:
        """Raises Unavailable while there is no gang."""
        if self._gang is None:
            raise self._unavailable()
        first = self._gang.joined[0]
        return GroupInfo(
            prepared=self._parts.prepared,
            factors=first.factors,
            dtype=self._settings.dtype,
            device=self._settings.device,
            tp_size=first.tp_world_size,
            all_reduce=first.all_reduce,
            pids=tuple(process.identity.pid for process in self._gang.processes),
            spare_pids=tuple(p.identity.pid for p in self._spares if p.warming.done()),
            pinned=self._gang.pinned,
            start_seconds=first.seconds,
            rebuilds=tuple(self._rebuilds),
        )

    @property
    def digest(self) -> str:
        return self._parts.prepared.digest

    @property
    def queued_tokens(self) -> int:
        """Of all rows that clients wait for, waiting or running: prompts not yet answered, answers still to come."""
        return sum(one.remaining_tokens for one in self._held.values() if one.row.priority >= 0)

    @property
    def ranks(self) -> tuple[Joined, ...]:
        """How the model was cut, as each rank found it. Raises Unavailable while there is no gang."""
        if self._gang is None:
            raise self._unavailable()
        return self._gang.joined

    async def check(self) -> Executed:
        """Runs two tokens through the gang, ahead of all other rows. Raises Unavailable when no answer comes."""
        if self._gang is None:
            raise self._unavailable()
        row = Row(
            request_id="check",
            backbone=self.digest,
            token_ids=(0, 0),
            want="logprobs",
            deadline_unix_s=time.time() + CHECK_TIMEOUT_S,
            priority=2**31,
        )
        try:
            return (await self.score(row)).executed
        except (DeadlineExceeded, Overloaded):
            raise self._unavailable() from None

    async def load(self) -> Load:
        """What the scheduler holds now. Raises Unavailable while there is no gang."""
        if self._gang is None:
            raise self._unavailable()
        try:
            return await apart(self._gang.rank0.load)
        except RayError:
            raise self._unavailable() from None

    # -- rows ----------------------------------------------------------------------------------------------------------

    async def _ask(self, row: Row, want: Want) -> AsyncGenerator[TokenChunk | Scores | HiddenStates]:
        if self._problem is not None:
            raise self._unavailable()
        # Our own name for it: callers may use a request_id twice.
        key = str(next(self._keys))
        if row.request_id in self._dropped:
            raise Unavailable(f"who asked for {row.request_id}", 1.0)
        held = self._held[key] = _Held(dataclasses.replace(row, request_id=key, want=want), row.request_id)
        begin, finished = time.time(), False
        pace = Pace(self._settings.id, begin)
        try:
            await self._submit(held)
            while not finished:
                answer = await self._next(held, begin)
                finished = not isinstance(answer, TokenChunk) or answer.finish is not None
                if isinstance(answer, MetasepiaError):
                    raise answer
                if isinstance(answer, TokenChunk):
                    pace.tokens(len(answer.token_ids), finished)
                yield dataclasses.replace(answer, request_id=row.request_id)
        finally:
            tracing.record("backbone", row.traceparent, begin, time.time(), backbone=self._settings.id, want=want)
            del self._held[key]
            if not finished:
                self._cancel(held)

    async def _next(self, held: _Held, begin: float) -> Answer:
        deadline = held.row.deadline_unix_s
        timeout_s = None if deadline == float("inf") else max(0.0, deadline - time.time()) + LATE_S
        try:
            return await asyncio.wait_for(held.inbox.get(), timeout_s)
        except TimeoutError:
            raise DeadlineExceeded("the request", round(deadline - begin, 3)) from None

    async def _submit(self, held: _Held) -> None:
        """Hands a row to the gang; without one it waits for the next. Raises the refusal."""
        gang = self._gang
        if gang is None:
            # Nobody else bounds what waits for a new gang; background rows are no reason to refuse others here either.
            bound, priority = self._settings.max_queued_tokens + self._settings.max_batch_tokens, held.row.priority
            if sum(one.num_tokens for one in self._held.values() if one.row.priority >= min(priority, 0)) > bound:
                raise Overloaded(f"the queue of {self._settings.id}, which is being rebuilt,", REBUILD_S)
            return
        held.gang = gang
        row = dataclasses.replace(held.row, sent=(*held.row.sent, *held.sent))
        try:
            refusal: MetasepiaError | None = await apart(gang.rank0.submit, row)
        except RayTaskError as error:
            raise cause(error) from None
        except RayError:
            return  # the gang died under us: the supervisor submits every held row to the next
        if refusal is not None:
            raise refusal

    def drop(self, request_id: str) -> None:
        """Ends the rows of a request whose caller has gone, also one that is still on its way here.

        Whoever asks again afterwards takes another name.
        """
        self._dropped[request_id] = None
        if len(self._dropped) > MAX_DROPPED:
            self._dropped.popitem(last=False)
        for held in self._held.values():
            if held.asked == request_id:
                self._cancel(held)
                held.inbox.put_nowait(Unavailable(f"who asked for {request_id}", 1.0))

    def _cancel(self, held: _Held) -> None:
        if held.gang is not None and held.gang is self._gang:
            apart(held.gang.rank0.cancel, held.row.request_id)

    async def _resubmit(self, held: _Held, gang: Gang) -> None:
        while self._gang is gang and held.row.request_id in self._held:
            try:
                await self._submit(held)
                return
            except Overloaded as error:
                # It was admitted once; now rows that decoded before queue again, and the queue may be short of them.
                await asyncio.sleep(min(1.0, error.retry_after_s))
            except MetasepiaError as error:
                held.inbox.put_nowait(error)
                return

    # -- experts -------------------------------------------------------------------------------------------------------

    async def put_expert(self, digest: str, path: Path) -> None:
        """Gives the ranks an expert from a file, now and whenever a row asks for it again. Raises CorruptArtefact."""
        await self._experts.put(self._gang, digest, path)

    # -- faults --------------------------------------------------------------------------------------------------------

    async def _supervise(self) -> None:
        while True:
            gang = self._gang
            assert gang is not None
            try:
                await first_of(gang.watch(), self._drain(gang))
                raise AssertionError("watching ended")
            except Fault as fault:
                # Survivors of a dead rank may fail in the collective before anybody misses the dead one.
                reason, by_itself = str(fault), fault.by_itself and not gang.dead_ranks()
            except Exception as error:  # whatever it is, an unwatched gang must not go on
                reason, by_itself = f"watching failed: {type(error).__name__}: {error}", False
            noticed, begin = time.time(), time.monotonic()
            self._gang = None
            meters.REBUILDING.set(1, backbone=self._settings.id)
            logger.warning("gang %s: %s; replacing it, %d rows held", self._settings.id, reason, len(self._held))
            if by_itself:
                self._blame(gang, reason)
            await gang.kill()
            gang, from_spares = await self._replace()
            seconds = time.monotonic() - begin
            self._rebuilds.append(
                Rebuild(reason=reason, noticed_unix_s=noticed, seconds=seconds, from_spares=from_spares)
            )
            self._gang = gang
            meters.REBUILDING.set(0, backbone=self._settings.id)
            meters.REBUILDS.inc(backbone=self._settings.id, by="spares" if from_spares else "start")
            logger.warning("gang %s: serving again after %.1f s", self._settings.id, seconds)
            for held in list(self._held.values()):
                self._spawn(self._resubmit(held, gang))
            self._warm_spares()

    def _blame(self, gang: Gang, reason: str) -> None:
        """A row that makes every gang fail would take all others down with it for ever."""
        for held in self._held.values():
            if held.gang is gang:
                held.failed_steps += 1
                if held.failed_steps >= MAX_FAILED_STEPS:
                    held.inbox.put_nowait(Unavailable(f"backbone {self._settings.id} for this row ({reason})", 1.0))

    async def _drain(self, gang: Gang) -> None:
        while True:
            try:
                news: News = await gang.rank0.news.remote(POLL_S)
            except RayTaskError as error:
                raise Fault(f"rank 0 failed: {cause(error)}", by_itself=True) from None
            except RayError as error:
                raise Fault(f"rank 0 died: {type(error).__name__}", by_itself=False) from None
            for moves in news.moves:
                self._experts.follow(gang, moves)
            ownerless: set[str] = set()
            for key, answer in news.answers:
                held = self._held.get(key)
                if held is None:
                    if isinstance(answer, TokenChunk) and answer.finish is None:
                        ownerless.add(key)
                    continue
                if isinstance(answer, TokenChunk):
                    held.sent.extend(answer.token_ids)
                held.inbox.put_nowait(answer)
            for key in ownerless:  # whose caller has gone, and whose cancellation was lost or came before the row
                apart(gang.rank0.cancel, key)

    async def _replace(self) -> tuple[Gang, bool]:
        """A new gang, from the spares if they live; tries again until there is one.

        Its pin is what the name stands for now; what served before where that cannot be served.
        """
        pin_refused = False
        for attempt in itertools.count(1):
            spares, self._spares = self._spares, []
            if spares and not await self._alive(spares):
                await kill_all(spares)
                spares = []
            try:
                pinned = self._experts.served if pin_refused else await self._experts.pinned()
                gang = await Gang.launch(self._parts, spares, pinned)
            except Exception as error:  # whatever it is, the rows wait and the next try may do better
                pin_refused = pin_refused or isinstance(error, PinRefused)
                reason = str(cause(error) if isinstance(error, RayTaskError) else error).partition("\n")[0]
                logger.error("gang %s: try %d to replace it failed: %s", self._settings.id, attempt, reason)
                await asyncio.sleep(0 if spares else min(MAX_PAUSE_S, 0.5 * 2**attempt))
                continue
            self._experts.served = pinned
            return gang, bool(spares)
        raise AssertionError

    async def _alive(self, processes: list[RankProcess]) -> bool:
        try:
            asked = asyncio.gather(*(process.handle.pulse.remote() for process in processes))
            await asyncio.wait_for(asked, self._settings.heartbeat_timeout_s)
        except (RayError, TimeoutError):
            return False
        return True

    def _warm_spares(self) -> None:
        if self._settings.spares and not self._spares:
            assert self._gang is not None
            self._spawn(self._start_spares([process.identity for process in self._gang.processes]))

    async def _start_spares(self, ranks: list[Identity]) -> None:
        starting = [RankProcess.start(self._parts, bundle, spare_for=rank) for bundle, rank in enumerate(ranks)]
        results = await asyncio.gather(*starting, return_exceptions=True)
        started = [result for result in results if isinstance(result, RankProcess)]
        if len(started) < len(results):
            logger.error("gang %s: spares did not start: %s", self._settings.id, results)
            await kill_all(started)
        else:
            self._spares = started

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)  # the loop itself keeps no reference
        task.add_done_callback(self._tasks.discard)

    def _unavailable(self) -> Unavailable:
        return Unavailable(f"backbone {self._settings.id}", REBUILD_S)
