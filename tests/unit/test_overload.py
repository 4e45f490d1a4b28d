"""Four times what a part can do, for a simulated minute: what is answered, when, and what the others are told."""

import asyncio
import heapq
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest

from cluster.door_settings import AdmissionSettings
from metasepia.errors import DeadlineExceeded, Overloaded
from serve.access.principal import Principal, asking
from serve.load.admission import Admission
from serve.load.lanes import Width
from serve.requests.deadlines import Deadline

ROWS, STEP_S, TOKENS, PROMPT = 16, 0.1, 32, 20
CAPACITY = ROWS / (TOKENS * STEP_S)
"""Requests a second of the part below: 5."""
DEADLINE_S = 15.0


class VirtualLoop(asyncio.SelectorEventLoop):
    """Time stands still while something can run, and then goes on to the next timer at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1e6  # so small that a nanosecond still counts

    def time(self) -> float:
        return self.now

    def _run_once(self) -> None:
        scheduled = self._scheduled  # pyright: ignore[reportAttributeAccessIssue]
        while scheduled and scheduled[0]._cancelled:
            heapq.heappop(scheduled)._scheduled = False
        if not self._ready and scheduled:  # pyright: ignore[reportAttributeAccessIssue]
            self.now = max(self.now, scheduled[0]._when)
        super()._run_once()  # pyright: ignore[reportAttributeAccessIssue]


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> Iterator[VirtualLoop]:
    made = VirtualLoop()
    monkeypatch.setattr(time, "time", made.time)
    yield made
    made.close()


@dataclass
class Backbone:
    """Rows decode together, a token each a step, at most ROWS at once; the others wait in order of arrival."""

    slow: tuple[float, float] = (0.0, 0.0)
    """Between these times a step takes half as long again: something else uses the machine."""
    free: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(ROWS))

    async def answer(self, deadline: Deadline) -> None:
        async with deadline.limit("the row"), self.free:
            begin, end = self.slow
            slower = 1.5 if begin <= asyncio.get_running_loop().time() < end else 1.0
            await asyncio.sleep(slower * TOKENS * STEP_S)


@dataclass
class Told:
    answered_s: list[float] = field(default_factory=list)
    """Latencies."""
    retry_after_s: list[float] = field(default_factory=list)
    late: int = 0


async def offered(
    times: float, seconds: float, tenants: dict[str, float], slow: tuple[float, float] = (0.0, 0.0)
) -> dict[str, Told]:
    """Poisson arrivals at `times` the capacity, divided between tenants by their shares."""
    loop, draw = asyncio.get_running_loop(), np.random.default_rng(0)
    width = Width(tokens=2 * ROWS * 1024, rows=2 * ROWS)
    begin = loop.time()
    admission = Admission(AdmissionSettings(), {"b": width}, loop.time)
    backbone = Backbone((begin + slow[0], begin + slow[1]))
    found = {name: Told() for name in tenants}

    async def one(name: str) -> None:
        begin = loop.time()
        deadline = Deadline(DEADLINE_S, time.time() + DEADLINE_S)
        try:
            with asking(Principal(name, frozenset())):
                async with admission.admitted(PROMPT + TOKENS, 100, deadline, part="b", rows=1):
                    await backbone.answer(deadline)
            found[name].answered_s.append(loop.time() - begin)
        except Overloaded as error:
            found[name].retry_after_s.append(error.retry_after_s)
        except DeadlineExceeded:
            found[name].late += 1

    async with asyncio.TaskGroup() as group:
        end = loop.time() + seconds
        while loop.time() < end:
            name = draw.choice(list(tenants), p=list(tenants.values()))
            group.create_task(one(str(name)))
            await asyncio.sleep(draw.exponential(1 / (times * CAPACITY)))
    return found


def test_at_four_times_the_capacity_nine_tenths_of_it_are_answered_in_time_and_the_rest_is_told_when(
    loop: VirtualLoop,
) -> None:
    told = loop.run_until_complete(offered(4, 60, {"all": 1.0}))["all"]
    assert len(told.answered_s) / 60 >= 0.9 * CAPACITY
    assert max(told.answered_s) <= DEADLINE_S
    assert told.late <= 0.05 * len(told.answered_s)  # taken in and then cut off: work for nothing
    assert len(told.retry_after_s) > 2.5 * CAPACITY * 60 and all(1 <= one <= 60 for one in told.retry_after_s)


def test_a_part_that_becomes_slower_for_a_while_is_given_less(loop: VirtualLoop) -> None:
    told = loop.run_until_complete(offered(4, 90, {"all": 1.0}, slow=(30, 60)))["all"]
    able = (60 + 30 / 1.5) * CAPACITY
    assert len(told.answered_s) >= 0.85 * able
    assert told.late <= 0.1 * len(told.answered_s) and max(told.answered_s) <= DEADLINE_S


def test_a_modest_tenant_is_answered_as_if_the_flood_were_not_there(loop: VirtualLoop) -> None:
    told = loop.run_until_complete(offered(4, 60, {"flood": 0.9, "modest": 0.1}))  # 0.4 of the capacity: below a half
    flood, modest = told["flood"], told["modest"]
    assert not modest.retry_after_s and not modest.late
    assert np.median(modest.answered_s) < 0.6 * np.median(flood.answered_s)
    assert (len(flood.answered_s) + len(modest.answered_s)) / 60 >= 0.9 * CAPACITY
