"""Answers that leave piece by piece."""

from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from serve.load.admission import Place

T = TypeVar("T")


class Stream(StreamingResponse):
    """Closes `source` however it ends: a client that goes before the first piece leaves a generator that has begun, on
    which a place in the queue and rows hang, and another that never will.
    """

    def __init__(
        self,
        pieces: AsyncIterator[str | bytes],
        source: AsyncGenerator[Any],
        media_type: str,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(pieces, media_type=media_type, headers={"cache-control": "no-store", **(headers or {})})
        self._source = source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._source):
            await super().__call__(scope, receive, send)


async def in_turn(place: Place, source: AsyncGenerator[T]) -> AsyncGenerator[T]:
    """The source's items once it is its turn; the place is held until the source is closed."""
    async with aclosing(source), place:
        async for item in source:
            yield item
