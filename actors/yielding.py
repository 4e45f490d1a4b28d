"""Background rows that give way: asked for a few at a time, together, and again while a backbone is full or away."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Generic, Protocol, TypeVar

from metasepia.errors import DeadlineExceeded, Overloaded, Unavailable
from metasepia.rows import HiddenStates, Row, Scores, TokenChunk

T = TypeVar("T")

ROWS_A_CALL = 32
CALLS_AT_ONCE = 4
ROW_TIMEOUT_S = 120.0
"""A row that waits longer in the backbone's queue is taken out and asked for again."""
PATIENCE_S = 900.0
"""A backbone that refuses everything for so long ends what asked; asking for the same again goes on."""


class Rows(Protocol):
    """A backbone as it is reached from an actor."""

    def generate(self, row: Row) -> AsyncIterator[TokenChunk]: ...
    async def score(self, rows: Sequence[Row]) -> list[Scores]: ...
    async def hidden_states(self, rows: Sequence[Row]) -> list[HiddenStates]: ...


class Yielding:
    """A backbone for background work: rows that come at the same time are asked for together, a few at a time, and
    wait as long as the backbone is full or away.
    """

    def __init__(self, digest: str, rows: Rows, *, patience_s: float = PATIENCE_S) -> None:
        self.digest, self._rows, self._patience_s = digest, rows, patience_s
        calls = asyncio.Semaphore(CALLS_AT_ONCE)
        self._scores = _Together[Scores](lambda asked: rows.score(asked), self._again, calls)
        self._states = _Together[HiddenStates](lambda asked: rows.hidden_states(asked), self._again, calls)
        self._streams = asyncio.Semaphore(ROWS_A_CALL)

    async def score(self, row: Row) -> Scores:
        return await self._scores.ask(row)

    async def hidden_states(self, row: Row) -> HiddenStates:
        return await self._states.ask(row)

    async def generate(self, row: Row) -> AsyncIterator[TokenChunk]:
        """All chunks at its end: an answer that broke off is asked for anew."""
        async with self._streams:
            for chunk in await self._again(lambda: self._whole(row)):
                yield chunk

    async def _whole(self, row: Row) -> list[TokenChunk]:
        async with aclosing(self._rows.generate(_dated(row))) as chunks:  # pyright: ignore[reportArgumentType]
            return [chunk async for chunk in chunks]

    async def _again(self, ask: Callable[[], Coroutine[None, None, T]]) -> T:
        give_up = time.monotonic() + self._patience_s
        while True:
            try:
                return await ask()
            except (Overloaded, Unavailable, DeadlineExceeded) as error:
                if time.monotonic() > give_up:
                    raise
                await asyncio.sleep(min(getattr(error, "retry_after_s", 1.0), 5.0))


class _Together(Generic[T]):
    """Rows of one question, gathered until the event loop comes round, then asked for in calls of `ROWS_A_CALL`."""

    def __init__(
        self,
        ask: Callable[[Sequence[Row]], Coroutine[None, None, list[T]]],
        again: "Callable[[Callable[[], Coroutine[None, None, list[T]]]], Awaitable[list[T]]]",
        calls: asyncio.Semaphore,
    ) -> None:
        self._ask, self._again, self._calls = ask, again, calls
        self._waiting: list[tuple[Row, asyncio.Future[T]]] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def ask(self, row: Row) -> T:
        answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        if not self._waiting:
            asyncio.get_running_loop().call_soon(self._flush)
        self._waiting.append((row, answer))
        return await answer

    def _flush(self) -> None:
        waiting, self._waiting = self._waiting, []
        for begin in range(0, len(waiting), ROWS_A_CALL):
            part = waiting[begin : begin + ROWS_A_CALL]
            task = asyncio.create_task(self._call(part))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            for _, answer in part:
                answer.add_done_callback(partial(self._drop_unwanted, task, part))

    async def _call(self, part: "Sequence[tuple[Row, asyncio.Future[T]]]") -> None:
        try:
            async with self._calls:
                answers = await self._again(lambda: self._ask([_dated(row) for row, _ in part]))
        except Exception as error:
            for _, answer in part:
                if not answer.done():
                    answer.set_exception(error)
            return
        for (_, answer), found in zip(part, answers, strict=True):
            if not answer.done():
                answer.set_result(found)

    def _drop_unwanted(
        self, task: "asyncio.Task[None]", part: "Sequence[tuple[Row, asyncio.Future[T]]]", _: object
    ) -> None:
        if all(answer.cancelled() for _, answer in part):
            task.cancel()


def _dated(row: Row) -> Row:
    return replace(row, deadline_unix_s=time.time() + ROW_TIMEOUT_S)
