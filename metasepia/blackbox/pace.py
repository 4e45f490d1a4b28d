"""How fast an endpoint may be asked: requests and tokens a minute, and the pauses that it asks for itself.

A token bucket of depth one, kept as the times at which the next request may start (GCRA): requests are spread evenly,
which providers that count by the second want too. No more than `requests_per_minute` start within any 60 s, and no
more tokens than `tokens_per_minute` and those of one request. Thread-safe; belongs to no event loop.
"""

import threading
import time
from collections.abc import Callable

MINUTE_S = 60.0


class Pace:
    """When the next request may start."""

    def __init__(
        self,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._between_s = 0.0 if requests_per_minute is None else MINUTE_S / requests_per_minute
        self._token_s = 0.0 if tokens_per_minute is None else MINUTE_S / tokens_per_minute
        self._clock, self._lock = clock, threading.Lock()
        self._request_at = self._tokens_at = self._held_until = float("-inf")

    def turn(self, num_tokens: int) -> float:
        """Takes the next free start for a request of about `num_tokens`; returns the seconds until then."""
        with self._lock:
            now = self._clock()
            at = max(now, self._request_at, self._tokens_at, self._held_until)
            self._request_at = at + self._between_s
            self._tokens_at = at + num_tokens * self._token_s
            return at - now

    def correct(self, more_tokens: int) -> None:
        """A request took this many tokens more than was thought; negative: fewer."""
        with self._lock:
            if self._token_s:
                self._tokens_at += more_tokens * self._token_s

    def hold(self, seconds: float) -> None:
        """Nothing starts before that: the endpoint asked for a pause, and it meant everybody."""
        with self._lock:
            self._held_until = max(self._held_until, self._clock() + seconds)

    def held_s(self) -> float:
        """How much longer `hold` lasts; whoever had a turn within it waits so much longer."""
        with self._lock:
            return max(0.0, self._held_until - self._clock())
