"""One call for all who want its answer at the same time."""

import asyncio
import contextvars
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Shared(Generic[T]):
    """Whoever asks while a call runs waits for that one: what is slow or away is asked once, however many wait.

    The call is no part of the request that happened to come first (see `actors.apart`): it goes on when that one's
    client leaves, and neither its principal nor its trace nor its id is this request's.
    """

    def __init__(self, call: Callable[[], Awaitable[T]]) -> None:
        self._call = call
        self._running: asyncio.Task[T] | None = None

    @property
    def is_running(self) -> bool:
        return self._running is not None and not self._running.done()

    def begin(self) -> "asyncio.Task[T]":
        """The call that runs, or a new one."""
        if self._running is None or self._running.done():
            self._running = asyncio.get_running_loop().create_task(self._asked(), context=contextvars.Context())
            self._running.add_done_callback(_seen)
        return self._running

    async def __call__(self) -> T:
        """The answer, or the error, that all get. Who leaves does not end the call."""
        return await asyncio.shield(self.begin())

    async def _asked(self) -> T:
        return await self._call()


def _seen(task: "asyncio.Task[T]") -> None:
    """An error that nobody waits for any more is not told as one that was forgotten."""
    if not task.cancelled():
        task.exception()
