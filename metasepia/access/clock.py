"""A clock that never goes back, so that a wrong one cannot bring an expired key to life again."""

import time
from collections.abc import Callable


class SteadyClock:
    """Unix seconds: the machine's clock, but never earlier than what was said before, or than `since`.

    Where the machine's clock jumps back, this one goes on at its own pace from where it was. It then stays ahead, which
    ends keys early and never late; windows of quotas go on to end.
    """

    def __init__(
        self,
        since_unix_s: float = 0.0,
        wall: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._wall, self._monotonic = wall, monotonic
        self._said_unix_s, self._said_at_s = since_unix_s, monotonic()

    def now(self) -> float:
        at_s = self._monotonic()
        self._said_unix_s = max(self._wall(), self._said_unix_s + (at_s - self._said_at_s))
        self._said_at_s = at_s
        return self._said_unix_s
