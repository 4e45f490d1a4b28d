"""Parts whose replica is gone are asked again, and only they."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentResponseGenerator

from metasepia.errors import Overloaded, Unavailable
from metasepia.rows import Row, TokenChunk
from serve.load.retries import persistently
from serve.parts import ServedBackbone


class Chunks(DeploymentResponseGenerator[Any]):
    """What a handle gives for a stream: tokens, and then an error or the end."""

    def __init__(self, row: Row, tokens: list[int], error: Exception | None) -> None:
        self.row, self._tokens, self._error, self.cancelled_times = row, tokens, error, 0
        self.taken = asyncio.Event()
        self.taken.set()

    async def _fetch_future_result_async(self) -> Any:
        await self.taken.wait()

    def __aiter__(self) -> AsyncIterator[Any]:
        return self._chunks()

    async def _chunks(self) -> AsyncIterator[TokenChunk]:
        for at, token in enumerate(self._tokens):
            last = self._error is None and at == len(self._tokens) - 1
            finish = "length" if last else None
            yield TokenChunk(request_id=self.row.request_id, token_ids=(token,), logprobs=(0.0,), finish=finish)
        if self._error is not None:
            raise self._error

    def cancel(self) -> None:
        self.cancelled_times += 1


class Handle:
    """Of a backbone whose replicas do one after another what they are told."""

    def __init__(self, *replicas: tuple[list[int], Exception | None]) -> None:
        self._replicas = list(replicas)
        self.given: list[Chunks] = []
        self.dropped: list[str] = []

    def broadcast(self, method: str, request_id: str) -> "Handle":
        assert method == "drop"
        self.dropped.append(request_id)
        return self

    async def results_async(self, *, timeout_s: float) -> None: ...

    def options(self, **_: Any) -> "Handle":
        return self

    @property
    def generate(self) -> Any:
        return self

    def remote(self, row: Row) -> Chunks:
        self.given.append(Chunks(row, *self._replicas.pop(0)))
        return self.given[-1]


def row(timeout_s: float = 30.0) -> Row:
    return Row(request_id="r", backbone="b" * 64, token_ids=(1, 2), deadline_unix_s=time.time() + timeout_s)


def tokens_of(handle: Handle, asked: Row) -> list[int]:
    async def talk() -> list[int]:
        backbone = ServedBackbone("tiny", None, handle)  # pyright: ignore[reportArgumentType]
        return [token async for chunk in backbone.generate(asked) for token in chunk.token_ids]

    return asyncio.run(talk())


def test_a_row_goes_on_behind_the_tokens_that_it_has_sent_when_its_replica_dies_or_is_taken_down() -> None:
    stopped = Unavailable("backbone tiny", 20.0)
    handle = Handle(([7, 8], ActorDiedError()), ([], DeploymentUnavailableError(None)), ([9], stopped), ([5, 6], None))  # pyright: ignore[reportArgumentType]
    assert tokens_of(handle, row()) == [7, 8, 9, 5, 6]
    assert [one.row.sent for one in handle.given] == [(), (7, 8), (7, 8), (7, 8, 9)]
    assert all(one.cancelled_times == 1 for one in handle.given)


@pytest.mark.parametrize(
    "error",
    [
        Overloaded("the queue", 2.0),
        Unavailable("backbone tiny for this row (step 3: it fails)", 1.0),  # would take the next gang down as well
        ValueError("a bug"),
    ],
)
def test_what_the_request_itself_is_refused_for_is_not_asked_again(error: Exception) -> None:
    handle = Handle(([7], error), ([8], None))
    with pytest.raises(type(error)):
        tokens_of(handle, row())
    assert len(handle.given) == 1


def test_a_row_whose_caller_leaves_while_it_is_assigned_is_cancelled_when_a_replica_has_it() -> None:
    async def talk() -> None:
        handle = Handle(([7], None))
        backbone = ServedBackbone("tiny", None, handle)  # pyright: ignore[reportArgumentType]
        remote, taken = handle.remote, asyncio.Event()

        def slowly(asked: Row) -> Chunks:
            chunks = remote(asked)
            chunks.taken = taken
            return chunks

        handle.remote = slowly  # pyright: ignore[reportAttributeAccessIssue]
        waiting = asyncio.ensure_future(anext(backbone.generate(row())))
        await asyncio.sleep(0.01)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        (chunks,) = handle.given
        assert chunks.cancelled_times == 0  # Serve would lose it
        assert handle.dropped == ["r"]
        taken.set()
        await asyncio.sleep(0.01)
        assert chunks.cancelled_times == 1

    asyncio.run(talk())


def test_replicas_are_told_of_a_row_whose_caller_has_gone_and_of_no_other() -> None:
    async def talk() -> None:
        handle = Handle(([7, 8, 9], None), ([7, 8], None))
        backbone = ServedBackbone("tiny", None, handle)  # pyright: ignore[reportArgumentType]
        left = backbone.generate(row())
        await anext(left)
        await left.aclose()
        await asyncio.sleep(0.01)
        assert handle.dropped == ["r"]
        assert len([chunk async for chunk in backbone.generate(row())]) == 2
        await asyncio.sleep(0.01)
        assert handle.dropped == ["r"]

    asyncio.run(talk())


def test_past_the_deadline_nothing_is_asked_again() -> None:
    handle = Handle(([7], ActorDiedError()), ([8], None))
    with pytest.raises(ActorDiedError):
        tokens_of(handle, row(timeout_s=-1))


def test_calls_that_are_answered_once_are_asked_again_too() -> None:
    answers: list[Callable[[], str]] = []

    def died() -> str:
        raise ActorUnavailableError("away", b"0" * 16)

    answers += [died, died, lambda: "there"]

    async def ask() -> str:
        return answers.pop(0)()

    assert asyncio.run(persistently("encoder e", time.time() + 30, ask)) == "there"
