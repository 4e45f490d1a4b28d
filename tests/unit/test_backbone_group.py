"""What the owner of a gang tells rank 0 of rows whose caller has gone; the rank is a fake."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from actors.apart import apart
from actors.backbone import BackboneGroup
from actors.gang import Fault, GangParts, Placement
from actors.messages import News
from cluster.settings import BackboneSettings
from metasepia.decoding.inflight import Answer, Limits
from metasepia.errors import Unavailable
from metasepia.models.prepared import PreparedBackbone
from metasepia.rows import Row, TokenChunk

request: ContextVar[str | None] = ContextVar("request", default=None)
"""As Ray names the task that is running."""


class Method:
    def __init__(self, does: Callable[..., Any]) -> None:
        self._does = does

    def remote(self, *args: Any) -> Awaitable[Any]:
        found = self._does(*args)
        done = asyncio.get_running_loop().create_future()
        done.set_exception(found) if isinstance(found, Exception) else done.set_result(found)
        return done


class Rank:
    """Rank 0: what it was told, in order, and in whose name."""

    def __init__(self, news: list[News] | None = None) -> None:
        self.told: list[tuple[str, Any]] = []
        self.names: set[str | None] = set()
        told = iter(news or [])
        self.submit = Method(lambda row: self._tell("submit", row.request_id))
        self.cancel = Method(lambda key: self._tell("cancel", key))
        self.news = Method(lambda _: next(told, Fault("enough", by_itself=False)))

    def _tell(self, what: str, key: str) -> None:
        self.told.append((what, key))
        self.names.add(request.get())


def group_with(rank: Rank) -> tuple[BackboneGroup, Any]:
    limits = Limits(max_rows=4, max_batch_tokens=1000, max_queued_tokens=1000)
    prepared: PreparedBackbone = SimpleNamespace(digest="b" * 64)  # pyright: ignore[reportAssignmentType]
    place = Placement(group=None, first_bundle=0)  # pyright: ignore[reportArgumentType]
    settings = BackboneSettings(id="tiny", source="nowhere")
    parts = GangParts(settings=settings, prepared=prepared, home=Path(), placement=place, limits=limits)
    group = BackboneGroup(parts, None, None)
    gang = group._gang = SimpleNamespace(rank0=rank)  # pyright: ignore[reportAttributeAccessIssue]
    return group, gang


def row(name: str) -> Row:
    return Row(request_id=name, backbone="b" * 64, token_ids=(1, 2), deadline_unix_s=time.time() + 30)


def chunk(key: str) -> Answer:
    return TokenChunk(request_id=key, token_ids=(7,), logprobs=(0.0,), finish=None)


def test_a_call_made_apart_is_made_in_nobodys_name() -> None:
    seen = SimpleNamespace(remote=lambda *args: (request.get(), args))
    token = request.set("r")
    try:
        assert apart(seen, 1, 2) == (None, (1, 2))
    finally:
        request.reset(token)


def test_a_row_that_is_dropped_ends_here_and_in_the_rank_and_no_other_does() -> None:
    async def talk() -> None:
        rank = Rank()
        group, _ = group_with(rank)
        request.set("a request that Ray may cancel")
        asked = [asyncio.ensure_future(anext(group.generate(row(name)))) for name in ("left", "stays")]
        await asyncio.sleep(0.01)
        group.drop("left")
        await asyncio.sleep(0.01)
        with pytest.raises(Unavailable, match="who asked for left"):
            asked[0].result()
        assert not asked[1].done()
        assert rank.told == [("submit", "0"), ("submit", "1"), ("cancel", "0")]
        assert rank.names == {None}
        asked[1].cancel()
        await asyncio.gather(*asked, return_exceptions=True)
        assert rank.told[3:] == [("cancel", "1")]

    asyncio.run(talk())


def test_a_row_that_comes_after_it_was_dropped_does_not_begin() -> None:
    async def talk() -> None:
        rank = Rank()
        group, _ = group_with(rank)
        group.drop("late")
        with pytest.raises(Unavailable):
            await anext(group.generate(row("late")))
        assert rank.told == []

    asyncio.run(talk())


def test_a_row_that_answers_and_that_nobody_holds_is_cancelled_once() -> None:
    async def talk() -> None:
        rank = Rank([News(answers=(("5", chunk("5")), ("5", chunk("5"))), moves=())])
        group, gang = group_with(rank)
        with pytest.raises(Fault):
            await group._drain(gang)
        assert rank.told == [("cancel", "5")]

    asyncio.run(talk())
