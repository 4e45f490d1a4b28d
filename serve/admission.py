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
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from actors import meters, tracing
from cluster.door_settings import AdmissionSettings
from cluster.settings import Settings
from metasepia.errors import MetasepiaError, Overloaded, Unavailable
from serve.deadlines import Deadline
from serve.principal import current

MEMORY_S = 20.0
"""How far back the drain rate looks: what is older than this weighs less than 1/e."""
MAX_RETRY_S = 60.0
POOL = "reasoning pool"
CHARS_A_TOKEN = 4
"""About, in English: the gateway does not tokenise for encoders."""
ENCODER_BATCHES = 8
"""Forwards of an encoder that are under way at once: tokenised, run, and on their way back."""
FILE_TOKENS = 256
"""What an image or a sound costs its encoder, about."""
LEVELS_KEPT = 1024
"""Counters of tenants who have nothing here; beyond it those go that the others have passed."""


@dataclass(frozen=True, kw_only=True)
class Width:
    """What one lane lets through at once. A request that is wider goes alone."""

    tokens: int = 32_768
    rows: int = 64


class Admission:
    """Of one gateway, and of one event loop. A gateway beside it has its own: each lets as much through."""

    def __init__(
        self,
        settings: AdmissionSettings,
        widths: Mapping[str, Width] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`widths` by the part's name; a part without one has the default's."""
        self._settings, self._clock = settings, clock
        self._lanes = {name: _Lane(name, width, clock) for name, width in (widths or {}).items()}
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

    def widen(self, part: str, width: Width) -> None:
        """For a part that has more replicas now, or fewer."""
        lane = self._lane(part)
        lane.width = width
        self._let_in(lane)

    def _lane(self, part: str) -> "_Lane":
        if (lane := self._lanes.get(part)) is None:  # parts are named by the settings: there are few
            lane = self._lanes[part] = _Lane(part, Width(), self._clock)
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
        name = current().tenant
        wait_s = lane.wait_s(name, place.tokens)
        left_s = place.deadline.unix_s - time.time()
        if wait_s is not None and wait_s + lane.service_s > left_s:
            self._refused["deadline"] += 1
            raise Overloaded(
                f"the queue of {lane.name}, for a request of {place.deadline.timeout_s:g} s,",
                _retry_s(wait_s + lane.service_s - left_s),
            )
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

    def _make_room(self, lane: "_Lane", name: str, place: "Place") -> None:
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

    def _full(self, lane: "_Lane") -> Overloaded:
        per_s = lane.rate.per_s()
        return Overloaded(f"the queue of {lane.name}", _retry_s(lane.queued_tokens / per_s if per_s else 1.0))

    def _refuse(self, lane: "_Lane", place: "Place", reason: str, error: MetasepiaError) -> None:
        self._refused[reason] += 1
        self._take_out(lane, place)
        if place.turn is not None and not place.turn.done():
            place.turn.set_exception(error)

    def _take_out(self, lane: "_Lane", place: "Place") -> None:
        lane.leave(place)
        self._count(place, -1)

    def _count(self, place: "Place", sign: int) -> None:
        self._tokens += sign * place.tokens
        self._bytes += sign * place.num_bytes
        self._requests += sign

    def _let_in(self, lane: "_Lane") -> None:
        while lane.waiting:
            tenant = min(lane.waiting.values(), key=lambda one: (one.level, one.tokens))
            place = tenant.queue[0]
            if not lane.has_room(place):
                return
            self._take_out(lane, place)
            if place.turn is None or place.turn.done():  # cancelled a moment ago
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
        self, admission: Admission, lane: "_Lane", tokens: int, rows: int, num_bytes: int, deadline: Deadline
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


@dataclass(eq=False)
class _Tenant:
    """Those of one tenant who wait in one lane, in order of arrival."""

    name: str
    level: float
    """Its virtual counter: tokens that it was given, from a common zero."""
    queue: "deque[Place]"
    tokens: int = 0


class _Lane:
    """One part's queue, and what of it runs."""

    def __init__(self, name: str, width: Width, clock: Callable[[], float]) -> None:
        self.name, self.width, self._clock = name, width, clock
        self.tokens = self.rows = self.num_running = self.queued_tokens = 0
        self.waiting: dict[str, _Tenant] = {}
        self.rate, self.service_s = _Rate(clock), 0.0
        self._levels: dict[str, float] = {}
        self._floor = 0.0
        """The level of who was let in last: where those begin who come when nobody waits."""

    def has_room(self, place: Place) -> bool:
        return self.num_running == 0 or (
            self.tokens + place.tokens <= self.width.tokens and self.rows + place.rows <= self.width.rows
        )

    def join(self, name: str, place: Place) -> _Tenant:
        tenant = self.waiting.get(name)
        if tenant is None:
            tenant = _Tenant(name, self.level(name), deque())
            self.rate.saturated(True)
            self.waiting[name] = tenant
        tenant.queue.append(place)
        tenant.tokens += place.tokens
        self.queued_tokens += place.tokens
        return tenant

    def level(self, name: str) -> float:
        """A tenant's counter, lifted to that of those who wait: what it did not ask for is not owed to it."""
        lowest = min((one.level for one in self.waiting.values()), default=self._floor)
        return max(self._levels.get(name, 0.0), lowest)

    def leave(self, place: Place) -> None:
        tenant = self.waiting[place.tenant]
        tenant.queue.remove(place)  # the first or the last, nearly always
        tenant.tokens -= place.tokens
        self.queued_tokens -= place.tokens
        if not tenant.queue:
            del self.waiting[place.tenant]
            self._levels[place.tenant] = tenant.level
            self.rate.saturated(bool(self.waiting))

    def begin(self, place: Place, level: float) -> None:
        place.began_s = self._clock()
        self.tokens += place.tokens
        self.rows += place.rows
        self.num_running += 1
        self._floor = max(self._floor, level)
        self._charge(place.tenant, level + place.tokens)

    def end(self, place: Place) -> None:
        self.tokens -= place.tokens
        self.rows -= place.rows
        self.num_running -= 1
        self.rate.done(place.tokens, self.num_running)
        if place.used is not None:
            tenant = self.waiting.get(place.tenant)
            level = tenant.level if tenant is not None else self._levels.get(place.tenant, 0.0)
            self._charge(place.tenant, level - (place.tokens - place.used))
        place.began_s = None

    def _charge(self, name: str, level: float) -> None:
        if name in self.waiting:
            self.waiting[name].level = level
        self._levels[name] = level
        if len(self._levels) > LEVELS_KEPT:
            self._levels = {who: at for who, at in self._levels.items() if at > self._floor or who in self.waiting}

    def observe_service(self, place: Place) -> None:
        if place.began_s is not None:
            seconds = self._clock() - place.began_s
            self.service_s = seconds if self.service_s == 0 else 0.9 * self.service_s + 0.1 * seconds

    def wait_s(self, name: str, tokens: int) -> float | None:
        """Until the turn of a request of `name` that comes now; None while the rate is unknown.

        Before it go its tenant's earlier ones, and of each other tenant what brings that one to the same level.
        """
        per_s = self.rate.per_s()
        if per_s is None:
            return None
        mine = self.waiting.get(name)
        until = (mine.level + mine.tokens) if mine else self.level(name)
        ahead = sum(
            min(one.tokens, max(0.0, until - one.level)) for one in self.waiting.values() if one.name != name
        )  # fmt: skip
        over = max(0, self.tokens + tokens - self.width.tokens)
        return (ahead + (mine.tokens if mine else 0) + min(over, self.tokens)) / per_s


class _Rate:
    """Tokens that end a second while others wait, of late: how fast a queue drains."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._saturated = False
        self._since_s = clock()
        self._tokens = self._seconds = 0.0
        self._unseen: int | None = None
        """Requests that must end before the rate is believed: as many as ran when it first was measured."""

    def saturated(self, now: bool) -> None:
        self._go_on()
        self._saturated = now

    def done(self, tokens: int, num_running: int) -> None:
        if not self._saturated:
            return
        self._go_on()
        self._tokens += tokens
        self._unseen = num_running if self._unseen is None else max(0, self._unseen - 1)

    def per_s(self) -> float | None:
        """None until as many requests as run at once have ended while others waited."""
        self._go_on()
        if self._unseen != 0 or self._seconds <= 0:
            return None
        return max(self._tokens / self._seconds, 1e-3)

    def _go_on(self) -> None:
        now = self._clock()
        if self._saturated and now > self._since_s:
            kept = math.exp(-(now - self._since_s) / MEMORY_S)
            self._tokens *= kept
            self._seconds = self._seconds * kept + (now - self._since_s)
        self._since_s = now


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


def _retry_s(seconds: float) -> float:
    return min(MAX_RETRY_S, max(1.0, seconds))


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
