"""One call for all who ask at once, in no request's name."""

import asyncio
import contextvars

import pytest

from metasepia.errors import Unavailable
from serve.shared import Shared

ASKING: contextvars.ContextVar[str] = contextvars.ContextVar("asking", default="nobody")


def test_all_who_ask_while_a_call_runs_get_its_one_error():
    calls: list[str] = []

    async def away() -> None:
        calls.append(ASKING.get())
        await asyncio.sleep(0)
        raise Unavailable("it", 1.0)

    async def main() -> list[BaseException | None]:
        ASKING.set("the first")
        shared = Shared(away)
        return await asyncio.gather(*(shared() for _ in range(20)), return_exceptions=True)

    assert [type(one) for one in asyncio.run(main())] == [Unavailable] * 20
    assert calls == ["nobody"]  # and not in the name of whoever came first


def test_a_call_goes_on_when_whoever_began_it_leaves():
    async def main() -> str:
        told = asyncio.Event()

        async def call() -> str:
            await told.wait()
            return "told"

        shared = Shared(call)
        first, second = asyncio.create_task(shared()), asyncio.create_task(shared())
        await asyncio.sleep(0)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        told.set()
        return await second

    assert asyncio.run(main()) == "told"


def test_the_next_one_asks_anew():
    calls: list[int] = []

    async def call() -> int:
        calls.append(1)
        return len(calls)

    async def main() -> tuple[int, int]:
        shared = Shared(call)
        return await shared(), await shared()

    assert asyncio.run(main()) == (1, 2)
