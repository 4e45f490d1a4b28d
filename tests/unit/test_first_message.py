"""The first part of a body beside the request's head: nothing lost, nothing twice, nobody waited for."""

import asyncio
import copy
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from serve.proxy import first_message
from serve.proxy.first_message import Given, with_first_message

HEAD: Scope = {"type": "http", "path": "/v1/classify", "headers": [(b"content-length", b"3")]}


def part(body: bytes, *, more: bool = False) -> Message:
    return {"type": "http.request", "body": body, "more_body": more}


LEFT: Message = {"type": "http.disconnect"}


def sends(messages: Sequence[Message], asked: list[int]) -> Receive:
    """The messages in turn, counting; then nothing, for ever."""

    async def receive() -> Message:
        asked.append(1)
        if len(asked) > len(messages):
            await asyncio.Event().wait()
        return messages[len(asked) - 1]

    return receive


async def through(scope: Scope, receive: Receive, count: int) -> list[Message]:
    """What the application behind both ends reads, the scope copied in between."""
    read: list[Message] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert first_message.KEY not in scope
        read.extend([await receive() for _ in range(count)])

    async def no_send(message: Message) -> None:
        raise AssertionError(message)

    scope, receive = await with_first_message(scope, receive)
    await Given(app)(copy.deepcopy(scope), receive, no_send)
    return read


def run(main: Callable[[], Awaitable[Any]]) -> Any:
    return asyncio.run(asyncio.wait_for(main(), 10))


@pytest.mark.parametrize(
    "messages",
    [
        [part(b"{}"), LEFT],
        [part(b"{", more=True), part(b"}"), LEFT],
        [part(b""), LEFT],
        [LEFT],
        [part(b"x" * (first_message.MAX_BYTES + 1), more=True), part(b"y"), LEFT],
    ],
    ids=["whole", "parts", "empty", "left", "large"],
)
def test_every_message_comes_once_and_in_order(messages: list[Message]):
    asked: list[int] = []
    read = run(lambda: through(HEAD, sends(messages, asked), len(messages)))
    assert read == messages
    assert len(asked) == len(messages)


def test_only_the_first_part_travels_and_only_a_small_one():
    async def scope_of(body: bytes) -> Scope:
        return (await with_first_message(HEAD, sends([part(body)], [])))[0]

    assert run(lambda: scope_of(b"abc"))[first_message.KEY] == part(b"abc")
    assert first_message.KEY not in run(lambda: scope_of(b"x" * (first_message.MAX_BYTES + 1)))


def test_without_a_body_nothing_is_received():
    asked: list[int] = []
    scope, _ = run(lambda: with_first_message({**HEAD, "headers": []}, sends([], asked)))
    assert scope == {**HEAD, "headers": []} and not asked


def test_a_body_that_does_not_come_is_not_waited_for_and_not_lost():
    async def main() -> list[Message]:
        late = asyncio.Event()

        async def receive() -> Message:
            await late.wait()
            return part(b"abc")

        scope, rest = await with_first_message(HEAD, receive)
        late.set()
        return await through({**scope, "headers": []}, rest, 1)

    assert run(main) == [part(b"abc")]
