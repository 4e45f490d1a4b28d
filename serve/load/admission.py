"""Who waits at the gateway, and whose turn it is: the one queue before everything that costs.

Each part of the graph has a lane, through which as much work goes at once as keeps the part full; the rest waits here,
bounded in tokens, bytes and requests over all lanes. The queues behind keep their own bounds, for safety only.

Turns are fair between tenants, by virtual token counters (VTC: Sheng et al., "Fairness in Serving Large Language
Models", arXiv:2401.00588): the next request is one of the tenant that has been given the fewest tokens. A tenant that
comes back from idleness begins at the level of those who wait, so nobody saves turns up. Unlike the paper, a request is
charged for its longest answer when its turn comes, and what it did not use is given back when it ends. Between two
tenants that wait all the while, tokens given differ by at most those of two requests and of what a lane lets through at
once (a test holds this). Where the queue is full, the newest request of the tenant with the longest one makes way.
"""

import asyncio
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

from actors import meters, tracing
from cluster.door_settings import AdmissionSettings
from cluster.settings import Settings
from metasepia.errors import MetasepiaError, Overloaded, Unavailable
from serve.access.principal import current
from serve.load.lanes import Lane, Width
from serve.requests.deadlines import Deadline
from serve.shared import Shared

logger = logging.getLogger("ray.serve")

MAX_RETRY_S = 60.0
SAFETY = 1.15
"""Expected times are stretched by this much before they are compared with a deadline."""
LOOK_S = 5.0
"""Between two looks at how many replicas a part has, while requests wait."""
POOL = "reasoning pool"
CHARS_A_TOKEN = 4
"""About, in English: the gateway does not tokenise for encoders."""
ENCODER_BATCHES = 8
"""Forwards of an encoder that are under way at once: tokenised, run, and on their way back."""
FILE_TOKENS = 256
"""What an image or a sound costs its encoder, about."""


class Admission:
    """Of one gateway, and of one event loop. A gateway beside it has its own: each lets as much through."""

    def __init__(
        self,
        settings: AdmissionSettings,
        widths: Mapping[str, Width] | None = None,
        clock: Callable[[], float] = time.monotonic,
        replicas: Callable[[], Mapping[str, int]] | None = None,
    ) -> None:
        """`widths` of one replica by the part's name; a part without one has the default's. `replicas` tells how many a
        part has; it is called in a thread, while requests wait. None: one each.
        """
        self._settings, self._clock, self._replicas = settings, clock, replicas
        self._widths = dict(widths or {})
        self._looked_s, self._looking = -math.inf, Shared(self._widen)
        self._lanes = {name: Lane(name, width, clock) for name, width in (widths or {}).items()}
        self._max_bytes = int(settings.max_queued_mib * 2**20)
        self._tokens = self._bytes = self._requests = 0
        """That wait."""
        self._draining = False
        self._refused: dict[str, int] = {"full": 0, "deadline": 0, "evicted": 0, "draining": 0}
        self._told = dict(self._refused)
        meters.SAMPLING.follow(self._tell)

    def _tell(self) -> None:
        meters.ADMISSION_WAITING.set(self._requests)
        meters.ADMISSION_TOKENS.set(sum(lane.tokens for lane in self._lanes.values()))
        for reason, number in self._refused.items():
            meters.ADMISSION_REFUSED.inc(number - self._told[reason], reason=reason)
            self._told[reason] = number

    def admitted(self, tokens: int, num_bytes: int, deadline: Deadline, *, part: str, rows: int = 0) -> "Place":
        """`async with`: the body runs when the request's turn has come.

        `tokens` and `rows` (those that decode) are what it costs `part` at most, `num_bytes` what its body holds in
        memory. Entering raises Overloaded with the measured seconds to wait, where the queue is full or the wait would
        outlast the deadline; DeadlineExceeded where it does; Unavailable while draining.
        """
        return Place(self, self._lane(part), max(1, tokens), rows, num_bytes, deadline)

    def _look(self) -> None:
        now = self._clock()
        if self._replicas is not None and now - self._looked_s >= LOOK_S:
            self._looked_s = now
            self._looking.begin()

    async def _widen(self) -> None:
        assert self._replicas is not None
        try:
            counted = await asyncio.to_thread(self._replicas)
        except Exception as error:  # Serve's controller is away: what is wide stays so
            logger.warning("replicas are not counted: %s", error)
            return
        for part, width in self._widths.items():
            self.widen(part, width.times(max(1, counted.get(part, 1))))

    def widen(self, part: str, width: Width) -> None:
        """For a part that has more replicas now, or fewer."""
        lane = self._lane(part)
        lane.width = width
        self._let_in(lane)

    def _lane(self, part: str) -> Lane:
        if (lane := self._lanes.get(part)) is None:  # parts are named by the settings: there are few
            lane = self._lanes[part] = Lane(part, Width(), self._clock)
        return lane

    def waiting_tokens(self, part: str) -> float:
        """Of requests for a part that have not been let through yet."""
        return float(self._lanes[part].queued_tokens) if part in self._lanes else 0.0

    def drain(self) -> None:
        """Refuses all that wait, and all that come, with Unavailable; what runs goes on."""
        self._draining = True
        for lane in self._lanes.values():
            for tenant in list(lane.waiting.values()):
                while tenant.queue:
                    self._refuse(lane, tenant.queue[-1], "draining", Unavailable("the server, which is ending,", 2.0))

    async def told(self) -> dict[str, float]:
        """`statistics`, as other parts are asked for theirs."""
        return self.statistics()

    def statistics(self) -> dict[str, float]:
        """What waits and runs now, refusals so far by reason, and each lane's drain rate once it is known."""
        found: dict[str, float] = {
            "queued_requests": self._requests,
            "queued_tokens": self._tokens,
            "queued_bytes": self._bytes,
            "waiting_tenants": len({name for lane in self._lanes.values() for name in lane.waiting}),
            "running_requests": sum(lane.num_running for lane in self._lanes.values()),
            "running_tokens": sum(lane.tokens for lane in self._lanes.values()),
        }
        found |= {f"refused_{reason}": number for reason, number in self._refused.items()}
        for name, lane in self._lanes.items():
            if (per_s := lane.rate.per_s()) is not None:
                found[f"drained_tokens_per_s {name}"] = per_s
        return found

    # -- of places -----------------------------------------------------------------------------------------------------

    async def _wait(self, place: "Place") -> None:
        lane, width = place.lane, self._settings
        if self._draining:
            self._refused["draining"] += 1
            raise Unavailable("the server, which is ending,", 2.0)
        self._look()
        name = current().tenant
        wait_s = lane.wait_s(name, place.tokens)
        left_s = place.deadline.unix_s - time.time()
        if wait_s is not None and SAFETY * (wait_s + lane.takes_s(place.tokens)) > left_s:
            self._refused["deadline"] += 1
            raise self._too_late(lane, place)
        while not (
            self._tokens + place.tokens <= width.max_queued_tokens
            and self._bytes + place.num_bytes <= self._max_bytes
            and self._requests < width.max_queued_requests
        ):
            self._make_room(lane, name, place)
        tenant = lane.join(name, place)
        place.turn = asyncio.get_running_loop().create_future()
        self._count(place, +1)
        try:
            async with place.deadline.limit(f"waiting for {lane.name}"):
                await place.turn
        except BaseException:
            if place.began_s is not None:
                self._end(place)  # its turn came at the same moment
            elif place in tenant.queue:
                self._take_out(lane, place)
                self._let_in(lane)  # those behind it may be narrower
            raise

    def _make_room(self, lane: Lane, name: str, place: "Place") -> None:
        """Refuses the newest request of whoever holds most of the queue, or, where that is `name` itself, this one."""
        mine = sum(one.waiting[name].tokens for one in self._lanes.values() if name in one.waiting)
        held: dict[str, int] = {}
        for one in self._lanes.values():
            for tenant in one.waiting.values():
                held[tenant.name] = held.get(tenant.name, 0) + tenant.tokens
        greediest = max(held, key=lambda who: held[who], default=name)
        if greediest == name or held[greediest] <= mine + place.tokens:
            self._refused["full"] += 1
            raise self._full(lane)
        widest = max(
            (one for one in self._lanes.values() if greediest in one.waiting),
            key=lambda one: one.waiting[greediest].tokens,
        )
        self._refuse(widest, widest.waiting[greediest].queue[-1], "evicted", self._full(widest))

    def _full(self, lane: Lane) -> Overloaded:
        return Overloaded(f"the queue of {lane.name}", _drained_s(lane))

    def _too_late(self, lane: Lane, place: "Place") -> Overloaded:
        what = f"the queue of {lane.name}, for a request of {place.deadline.timeout_s:g} s,"
        return Overloaded(what, _drained_s(lane))

    def _refuse(self, lane: Lane, place: "Place", reason: str, error: MetasepiaError) -> None:
        self._refused[reason] += 1
        self._take_out(lane, place)
        if place.turn is not None and not place.turn.done():
            place.turn.set_exception(error)

    def _take_out(self, lane: Lane, place: "Place") -> None:
        lane.leave(place)
        self._count(place, -1)

    def _count(self, place: "Place", sign: int) -> None:
        self._tokens += sign * place.tokens
        self._bytes += sign * place.num_bytes
        self._requests += sign

    def _let_in(self, lane: Lane) -> None:
        while lane.waiting:
            tenant = min(lane.waiting.values(), key=lambda one: (one.level, one.tokens))
            place = tenant.queue[0]
            if not lane.has_room(place):
                return
            self._take_out(lane, place)
            if place.turn is None or place.turn.done():  # cancelled a moment ago
                continue
            if (
                time.time() + lane.takes_s(place.tokens) > place.deadline.unix_s
            ):  # it would be cut off: work for nothing
                self._refused["deadline"] += 1
                place.turn.set_exception(self._too_late(lane, place))
                continue
            lane.begin(place, tenant.level)
            place.turn.set_result(None)

    def _end(self, place: "Place") -> None:
        place.lane.end(place)
        self._let_in(place.lane)


class Place:
    """One request's place in a lane, from its turn to its end."""

    __slots__ = ("_admission", "began_s", "deadline", "lane", "num_bytes", "rows", "tenant", "tokens", "turn", "used")

    def __init__(
        self, admission: Admission, lane: Lane, tokens: int, rows: int, num_bytes: int, deadline: Deadline
    ) -> None:
        self._admission, self.lane, self.deadline = admission, lane, deadline
        self.tokens, self.rows, self.num_bytes = tokens, rows, num_bytes
        self.used: int | None = None
        """Set by the body where it knows better than the estimate: tokens that were computed."""
        self.began_s: float | None = None
        self.tenant = ""
        self.turn: asyncio.Future[None] | None = None

    async def __aenter__(self) -> "Place":
        lane, admission = self.lane, self._admission
        self.tenant = current().tenant
        if lane.waiting or admission._draining or not lane.has_room(self):
            begin = time.monotonic()
            try:
                with tracing.span("admission", part=lane.name, tokens=self.tokens):
                    await admission._wait(self)
            finally:
                meters.ADMISSION_WAIT.observe(time.monotonic() - begin)
        else:
            meters.ADMISSION_WAIT.observe(0.0)
            lane.begin(self, lane.level(self.tenant))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.lane.observe_service(self)
        self._admission._end(self)


def widths(settings: Settings) -> dict[str, Width]:
    """Of each part's lane, with one replica each."""
    ahead = settings.admission.ahead
    found = {
        one.id: Width(tokens=int(ahead * one.max_batch_tokens), rows=int(ahead * one.max_rows))
        for one in settings.backbones
    }
    for one in settings.encoders:  # their forwards are short, and the way there and back is not: more than one each
        found[one.id] = Width(tokens=int(ahead * ENCODER_BATCHES * one.max_batch_tokens))
    return found


def _drained_s(lane: Lane) -> float:
    """Until what waits now has been let in, at the measured rate; from 1 to MAX_RETRY_S."""
    per_s = lane.per_s()
    return min(MAX_RETRY_S, max(1.0, lane.queued_tokens / per_s)) if per_s else 1.0


def estimate(items: Iterable[Any], kind: str = "text") -> tuple[int, int]:
    """About how many tokens an encoder reads in texts, token ids, files or vectors, and how many bytes they hold."""
    tokens = num_bytes = 0
    for item in items:
        size = len(item)
        tokens += 1 if kind == "vector" else FILE_TOKENS if isinstance(item, bytes) else _tokens_of(item)
        num_bytes += size
    return tokens, num_bytes


def _tokens_of(item: str | Sequence[int]) -> int:
    return 2 + len(item) // CHARS_A_TOKEN if isinstance(item, str) else len(item)
