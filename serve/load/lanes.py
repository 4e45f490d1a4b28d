"""One part's queue in front of it (`serve.load.admission`): turns by virtual token counters, and how fast it drains."""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from serve.load.admission import Place

MEMORY_S = 20.0
"""How far back the drain rate looks: what is older than this weighs less than 1/e."""
LEVELS_KEPT = 1024
"""Counters of tenants who have nothing here; beyond it those go that the others have passed."""


@dataclass(frozen=True, kw_only=True)
class Width:
    """What one lane lets through at once. A request that is wider goes alone."""

    tokens: int = 32_768
    rows: int = 64

    def times(self, replicas: int) -> "Width":
        return Width(tokens=replicas * self.tokens, rows=replicas * self.rows)


@dataclass(eq=False)
class Tenant:
    """Those of one tenant who wait in one lane, in order of arrival."""

    name: str
    level: float
    """Its virtual counter: tokens that it was given, from a common zero."""
    queue: "deque[Place]"
    tokens: int = 0


class Lane:
    """One part's queue, and what of it runs."""

    def __init__(self, name: str, width: Width, clock: Callable[[], float]) -> None:
        self.name, self.width, self._clock = name, width, clock
        self.tokens = self.rows = self.num_running = self.queued_tokens = 0
        self.waiting: dict[str, Tenant] = {}
        self.rate = Rate(clock)
        self._service_s = self._service_tokens = 0.0
        """Running means of those that ended well: from their turn to their end, and what they cost."""
        self._levels: dict[str, float] = {}
        self._floor = 0.0
        """The level of who was let in last: where those begin who come when nobody waits."""

    def has_room(self, place: "Place") -> bool:
        return self.num_running == 0 or (
            self.tokens + place.tokens <= self.width.tokens and self.rows + place.rows <= self.width.rows
        )

    def join(self, name: str, place: "Place") -> Tenant:
        tenant = self.waiting.get(name)
        if tenant is None:
            tenant = Tenant(name, self.level(name), deque())
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

    def leave(self, place: "Place") -> None:
        tenant = self.waiting[place.tenant]
        tenant.queue.remove(place)  # the first or the last, nearly always
        tenant.tokens -= place.tokens
        self.queued_tokens -= place.tokens
        if not tenant.queue:
            del self.waiting[place.tenant]
            self._levels[place.tenant] = tenant.level
            self.rate.saturated(bool(self.waiting))

    def begin(self, place: "Place", level: float) -> None:
        place.began_s = self._clock()
        self.tokens += place.tokens
        self.rows += place.rows
        self.num_running += 1
        self._floor = max(self._floor, level)
        self._charge(place.tenant, level + place.tokens)

    def end(self, place: "Place") -> None:
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

    def observe_service(self, place: "Place") -> None:
        if place.began_s is not None:
            seconds = self._clock() - place.began_s
            new = 0.1 if self._service_s else 1.0
            self._service_s += new * (seconds - self._service_s)
            self._service_tokens += new * (place.tokens - self._service_tokens)

    def takes_s(self, tokens: int) -> float:
        """From its turn to its end, about; 0 while nothing is known. Less where it costs less than others."""
        if not self._service_s:
            return 0.0
        return self._service_s * min(1.0, tokens / self._service_tokens)

    def per_s(self) -> float | None:
        """Tokens a second, as the queue drains; before that was seen, as many as run in the time that each takes."""
        measured = self.rate.per_s()
        if measured is None and self._service_s and self.tokens:
            return self.tokens / self._service_s
        return measured

    def wait_s(self, name: str, tokens: int) -> float | None:
        """Until the turn of a request of `name` that comes now; None while the rate is unknown.

        Before it go its tenant's earlier ones, and of each other tenant what brings that one to the same level.
        """
        per_s = self.per_s()
        if per_s is None:
            return None
        mine = self.waiting.get(name)
        until = (mine.level + mine.tokens) if mine else self.level(name)
        ahead = sum(
            min(one.tokens, max(0.0, until - one.level)) for one in self.waiting.values() if one.name != name
        )  # fmt: skip
        over = max(0, self.tokens + tokens - self.width.tokens)
        return (ahead + (mine.tokens if mine else 0) + min(over, self.tokens)) / per_s


class Rate:
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
