"""A gateway's copy of the keys and of what they have used: a request is judged here, without a call.

Quotas. A key's requests are counted in UTC minutes and its tokens in UTC days, by the registry's clock.

- A request is let in while fewer than `requests_per_minute` of the key's were begun in the minute. One that is answered
  429 or 503 gives its place back.
- A request is let in while fewer than `tokens_per_day` of the key's tokens were charged in the day. What is let in is
  answered whole, so a day may end beyond the limit by what runs at once. Tokens are charged as they are answered.
- One gateway is exact. Several know each other's counts as of their last exchange with the registry, so each may let in
  what the others did since: at R gateways a window may end beyond the limit by R - 1 times what comes between two
  exchanges (`keys.sync_every_s`).
- Counts are the registry's: they survive its restart and gateways'. A gateway that is killed takes with it what it had
  not told, at most one exchange's worth.
"""

import hmac
import secrets
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from metasepia.access.keys import Changes, HeldKey, Key, Report, Spent, hash_of, parse
from metasepia.access.store import DAY_S, MINUTE_S, MINUTES_A_DAY
from metasepia.errors import QuotaExceeded, Unauthenticated

_NOBODY = bytes(32)
"""What the secret of an unknown id is compared with, so that it takes as long as a known one."""


@dataclass(frozen=True)
class Limits:
    """A key's quotas and what is left of them; None: no limit."""

    requests: int | None
    remaining_requests: int
    reset_requests_s: float
    tokens: int | None
    remaining_tokens: int
    reset_tokens_s: float


class _Counted:
    """What a key has used in its windows, as far as this gateway knows."""

    __slots__ = ("day", "minute", "requests", "tokens")

    def __init__(self) -> None:
        self.minute = self.requests = self.day = self.tokens = 0

    def roll(self, minute: int) -> None:
        if minute > self.minute:
            self.minute, self.requests = minute, 0
        if minute // MINUTES_A_DAY > self.day:
            self.day, self.tokens = minute // MINUTES_A_DAY, 0


class Keyring:
    """Belongs to one event loop; costs no call and does not wait."""

    def __init__(
        self,
        requests_per_minute: int = 0,
        tokens_per_day: int = 0,
        *,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """The limits are those of keys that have none of their own; 0: no limit."""
        self._requests_per_minute, self._tokens_per_day = requests_per_minute, tokens_per_day
        self._monotonic = monotonic
        self._gateway, self._number = secrets.token_hex(8), 0
        self._keys: dict[str, HeldKey] = {}
        self._counted: defaultdict[str, _Counted] = defaultdict(_Counted)
        self._untold: dict[tuple[str, int], list[int]] = {}
        self._telling: Report | None = None
        self._clock_unix_s = self._clock_at_s = 0.0
        self.revision: tuple[int, int, int] | None = None
        """None: nothing has been learnt yet."""

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def silence_s(self) -> float:
        """How long ago the registry was heard."""
        return self._monotonic() - self._clock_at_s

    def now(self) -> float:
        """The registry's clock, carried on by this process's own."""
        return self._clock_unix_s + self._monotonic() - self._clock_at_s

    # -- requests ------------------------------------------------------------------------------------------------------

    def identify(self, text: str) -> Key:
        """The key whose secret this is. Raises Unauthenticated, in the same time and words for a wrong secret and an
        unknown id.
        """
        found = parse(text)
        id_, secret = found or ("", "")
        held = self._keys.get(id_)
        is_it = hmac.compare_digest(hash_of(secret), _NOBODY if held is None else held.sha256)
        if not is_it or held is None or found is None:
            raise Unauthenticated("this key is not known here")
        status = held.key.status(self.now())
        if status != "active":
            raise Unauthenticated(f"this key {'was revoked' if status == 'revoked' else 'has expired'}")
        return held.key

    def admit(self, key: Key) -> Callable[[], None]:
        """Counts a request; calling what is returned gives its place back. Raises QuotaExceeded."""
        limits = self.limits(key)
        if limits.requests is not None and limits.remaining_requests <= 0:
            raise QuotaExceeded(f"{limits.requests} requests of this minute", limits.reset_requests_s)
        if limits.tokens is not None and limits.remaining_tokens <= 0:
            raise QuotaExceeded(f"{limits.tokens} tokens of this day", limits.reset_tokens_s)
        minute = int(self.now()) // MINUTE_S
        self._count(key.id, minute, requests=1)
        return lambda: self._count(key.id, minute, requests=-1)

    def charge(self, key: Key, prompt_tokens: int, completion_tokens: int) -> None:
        self._count(key.id, int(self.now()) // MINUTE_S, 0, prompt_tokens, completion_tokens)

    def limits(self, key: Key) -> Limits:
        now = self.now()
        counted = self._counted[key.id]
        counted.roll(int(now) // MINUTE_S)
        requests = self._requests_per_minute if key.requests_per_minute is None else key.requests_per_minute
        tokens = self._tokens_per_day if key.tokens_per_day is None else key.tokens_per_day
        return Limits(
            requests=requests or None,
            remaining_requests=max(0, requests - counted.requests),
            reset_requests_s=MINUTE_S - now % MINUTE_S,
            tokens=tokens or None,
            remaining_tokens=max(0, tokens - counted.tokens),
            reset_tokens_s=DAY_S - now % DAY_S,
        )

    def _count(
        self, key: str, minute: int, requests: int = 0, prompt_tokens: int = 0, completion_tokens: int = 0
    ) -> None:
        counted = self._counted[key]
        counted.roll(minute)
        if minute == counted.minute:
            counted.requests += requests
        if minute // MINUTES_A_DAY == counted.day:
            counted.tokens += prompt_tokens + completion_tokens
        untold = self._untold.setdefault((key, minute), [0, 0, 0])
        for place, number in enumerate((requests, prompt_tokens, completion_tokens)):
            untold[place] += number

    # -- the registry --------------------------------------------------------------------------------------------------

    def report(self) -> Report:
        """What is to be told now: what was not told yet, or what was told before and not acknowledged."""
        if self._telling is None:
            spent = tuple(
                Spent(key=key, minute=minute, requests=r, prompt_tokens=p, completion_tokens=c)
                for (key, minute), (r, p, c) in self._untold.items()
                if r or p or c
            )
            self._number += 1
            self._telling, self._untold = Report(gateway=self._gateway, number=self._number, spent=spent), {}
        return self._telling

    def take(self, changes: Changes) -> None:
        """What the registry answered to the last report."""
        self._telling = None
        self._clock_unix_s = max(changes.now_unix_s, self.now())  # answers overtake one another: never back
        self._clock_at_s = self._monotonic()
        new: Mapping[str, HeldKey] = {one.key.id: one for one in changes.keys}
        self._keys = dict(new) if changes.whole else self._keys | new
        untold: dict[str, list[tuple[int, list[int]]]] = {}
        for (key, minute), spent in self._untold.items():
            untold.setdefault(key, []).append((minute, spent))
        for total in changes.totals:
            counted = self._counted[total.key] = _Counted()
            counted.minute, counted.requests = total.minute, total.requests
            counted.day, counted.tokens = total.day, total.tokens
            for minute, (requests, prompt_tokens, completion_tokens) in untold.get(total.key, ()):
                counted.roll(minute)
                counted.requests += requests * (minute == counted.minute)
                counted.tokens += (prompt_tokens + completion_tokens) * (minute // MINUTES_A_DAY == counted.day)
        self.revision = changes.revision
