"""How long a request may take: the settings' time, or what the client asks for in a header."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar

from metasepia.errors import DeadlineExceeded, InvalidRequest

HEADER = "x-request-timeout-seconds"
INNER_HEADER = "x-metasepia-timeout-seconds"
"""The client's value on its way past Serve's proxy; see `serve.proxy.envelope`."""
MAX_TIMEOUT_S = 86_400.0

T = TypeVar("T")


@dataclass(frozen=True)
class Deadline:
    """The moment by which one request is answered, one way or the other."""

    timeout_s: float
    unix_s: float

    @classmethod
    def of(cls, headers: Mapping[str, str], default_s: float) -> "Deadline":
        """Raises InvalidRequest for a header that is no number of seconds above 0 and up to a day."""
        text = headers.get(INNER_HEADER) or headers.get(HEADER)
        try:
            timeout_s = default_s if text is None else float(text)
        except ValueError:
            timeout_s = -1.0
        if not 0 < timeout_s <= MAX_TIMEOUT_S:
            raise InvalidRequest(HEADER, f"must be seconds above 0 and up to {MAX_TIMEOUT_S:g}, got {text!r}")
        return cls(timeout_s, time.time() + timeout_s)

    @asynccontextmanager
    async def limit(self, what: str) -> AsyncIterator[None]:
        """Cancels its body at the deadline and raises DeadlineExceeded."""
        try:
            async with asyncio.timeout(self.unix_s - time.time()):
                yield
        except TimeoutError as error:
            if isinstance(error, DeadlineExceeded):
                raise
            raise DeadlineExceeded(what, self.timeout_s) from None

    async def over(self, items: AsyncGenerator[T], what: str) -> AsyncGenerator[T]:
        """The items, each awaited within the deadline; the source is closed however this ends."""
        async with aclosing(items):
            while True:
                async with self.limit(what):
                    try:
                        item = await anext(items)
                    except StopAsyncIteration:
                        return
                yield item
