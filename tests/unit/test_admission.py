"""The one queue: its bounds, its turns, its refusals, and that nothing stays behind when clients go."""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from cluster.door_settings import AdmissionSettings
from metasepia.errors import DeadlineExceeded, Overloaded, Unavailable
from serve.access.principal import Principal, asking
from serve.load.admission import Admission, estimate
from serve.load.lanes import Width
from serve.requests.deadlines import Deadline

NARROW = {"part": Width(tokens=100, rows=10)}


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def within(timeout_s: float = 60.0) -> Deadline:
    return Deadline(timeout_s, time.time() + timeout_s)


def run(talk: Callable[[], Awaitable[Any]]) -> Any:
    return asyncio.run(asyncio.wait_for(talk(), 20))


def as_tenant(name: str) -> Any:
    return asking(Principal(name, frozenset()))


class Part:
    """Something behind a lane: each admitted request runs until it is let go, the oldest first."""

    def __init__(self, admission: Admission) -> None:
        self.admission = admission
        self.given: Counter[str] = Counter()
        self.begun: list[str] = []
        self.running: list[tuple[str, asyncio.Event]] = []

    async def ask(self, tenant: str, tokens: int, used: int | None = None, deadline: Deadline | None = None) -> None:
        with as_tenant(tenant):
            async with self.admission.admitted(tokens, 1, deadline or within(), part="part", rows=1) as place:
                self.given[tenant] += tokens if used is None else used
                self.begun.append(tenant)
                done = asyncio.Event()
                self.running.append((tenant, done))
                await done.wait()
                place.used = used

    def start(self, tenant: str, tokens: int, **rest: Any) -> "asyncio.Task[None]":
        return asyncio.create_task(self.ask(tenant, tokens, **rest))

    async def end_one(self) -> None:
        self.running.pop(0)[1].set()
        await settled()


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_a_lane_lets_through_its_width_in_tokens_and_in_rows_and_a_wider_request_alone() -> None:
    async def talk() -> None:
        part = Part(Admission(AdmissionSettings(), NARROW))
        tasks = [part.start("a", 40) for _ in range(3)]
        await settled()
        assert len(part.running) == 2 and part.admission.statistics()["queued_tokens"] == 40
        await part.end_one()
        assert len(part.running) == 2
        wide = part.start("a", 1000)
        await part.end_one()
        assert len(part.running) == 1  # it waits for an empty lane
        await part.end_one()
        assert (
            part.begun[-1] == "a" and len(part.running) == 1 and part.admission.statistics()["running_tokens"] == 1000
        )
        await part.end_one()
        await asyncio.gather(*tasks, wide)
        rows = [part.start("a", 1) for _ in range(12)]
        await settled()
        assert len(part.running) == 10
        for task in rows:
            task.cancel()

    run(talk)


@pytest.mark.parametrize("used", [None, 5])
def test_the_gap_in_service_between_a_flooding_and_a_modest_tenant_is_bounded(used: int | None) -> None:
    """The flood brings wide requests at once, the modest one narrow ones that always wait: neither gets ahead of the
    other by more than a request each and a lane full, however long it goes on."""

    async def talk() -> None:
        part = Part(Admission(AdmissionSettings(max_queued_tokens=10**6, max_queued_requests=10**4), NARROW))
        flood = [part.start("flood", 30, used=used and 3 * used) for _ in range(400)]
        await settled()
        modest = [part.start("modest", 10, used=used) for _ in range(900)]
        await settled()
        before = part.given.copy()
        worst = 0
        for _ in range(600):
            await part.end_one()
            worst = max(worst, abs((part.given - before)["flood"] - (part.given - before)["modest"]))
        assert part.given["flood"] > 1000 and part.given["modest"] > 1000
        assert worst <= 30 + 10 + 100
        for task in (*flood, *modest):
            task.cancel()

    run(talk)


def test_turns_are_not_saved_up_by_who_was_idle_and_not_taken_from_who_asks_one_at_a_time() -> None:
    async def talk() -> None:
        part = Part(Admission(AdmissionSettings(), {"part": Width(tokens=10)}))
        tasks = [part.start("busy", 10) for _ in range(60)]
        await settled()
        for _ in range(20):
            await part.end_one()
        tasks += [part.start("idle before", 10) for _ in range(20)]
        await settled()
        already = len(part.begun)
        for _ in range(20):
            await part.end_one()
        assert 9 <= part.begun[already:].count("busy") <= 11  # half each, though it had twenty turns before
        while part.running:
            await part.end_one()
        await asyncio.gather(*tasks)

        flood = [part.start("flood", 10) for _ in range(100)]
        await settled()
        already = len(part.begun)
        for _ in range(10):  # one at a time: asked for again when the last is answered
            one = part.start("modest", 10)
            while not one.done():
                await part.end_one()
        assert part.begun[already:].count("flood") <= 2 * 10 + 2
        for task in flood:
            task.cancel()

    run(talk)


def test_a_full_queue_refuses_who_fills_it_and_makes_room_for_another_tenant() -> None:
    settings = AdmissionSettings(max_queued_tokens=256, max_queued_requests=100)

    async def talk() -> None:
        part = Part(Admission(settings, NARROW))
        flood = [part.start("flood", 50) for _ in range(7)]  # two run, five wait
        await settled()
        with pytest.raises(Overloaded) as refused:
            await part.ask("flood", 50)
        assert refused.value.retry_after_s >= 1 and part.admission.statistics()["refused_full"] == 1
        modest = part.start("modest", 50)
        await settled()
        assert [task.done() for task in flood] == [False] * 6 + [True]  # the newest of the flood
        with pytest.raises(Overloaded):
            await flood[-1]
        await part.end_one()
        assert part.begun[-1] == "modest"
        assert part.admission.statistics()["refused_evicted"] == 1
        for task in (*flood, modest):
            task.cancel()

    run(talk)


def test_bodies_and_requests_that_wait_are_bounded_too() -> None:
    async def talk() -> None:
        for settings, num_bytes in (
            (AdmissionSettings(max_queued_mib=0.01), 6000),
            (AdmissionSettings(max_queued_requests=1), 1),
        ):
            admission = Admission(settings, {"part": Width(tokens=1)})

            async def hold(admission: Admission = admission, num_bytes: int = num_bytes) -> None:
                async with admission.admitted(1, num_bytes, within(), part="part"):
                    await asyncio.sleep(60)

            tasks = [asyncio.create_task(hold()) for _ in range(2)]
            await settled()
            with pytest.raises(Overloaded):
                await hold()
            for task in tasks:
                task.cancel()

    run(talk)


def test_retry_after_and_the_refusal_of_what_would_be_late_come_from_the_measured_rate() -> None:
    async def talk() -> None:
        clock = Clock()
        part = Part(Admission(AdmissionSettings(max_queued_tokens=1000), NARROW, clock))
        tasks = [part.start("a", 50) for _ in range(22)]  # the lane and the queue are full
        await settled()
        with pytest.raises(Overloaded) as blind:
            await part.ask("a", 50)
        assert blind.value.retry_after_s == 1.0  # nothing is known yet
        for _ in range(10):  # 50 tokens a second
            clock.now += 1
            await part.end_one()
        waiting = part.admission.statistics()["queued_tokens"]
        assert waiting == 500 and part.admission.statistics()["drained_tokens_per_s part"] == pytest.approx(50)
        with pytest.raises(Overloaded, match="for a request of 5 s") as late:
            await part.ask("a", 50, deadline=within(5))
        assert late.value.retry_after_s == pytest.approx(10)  # 500 tokens wait
        assert part.admission.statistics()["refused_deadline"] == 1
        # Another tenant's turn comes sooner than the queue's end, so the same deadline is kept.
        other = part.start("b", 50, deadline=within(5))
        await settled()
        assert not other.done()
        for task in (*tasks, other):
            task.cancel()

    run(talk)


def test_a_deadline_that_passes_in_the_queue_ends_the_wait_and_leaves_nothing() -> None:
    async def talk() -> None:
        part = Part(Admission(AdmissionSettings(), NARROW))
        first = part.start("a", 100)
        await settled()
        with pytest.raises(DeadlineExceeded):
            await part.ask("a", 100, deadline=within(0.05))
        statistics = part.admission.statistics()
        assert (statistics["queued_requests"], statistics["queued_tokens"], statistics["queued_bytes"]) == (0, 0, 0)
        first.cancel()

    run(talk)


def test_after_a_storm_of_clients_that_go_no_place_is_taken_and_the_next_is_served_at_once() -> None:
    async def talk() -> None:
        part = Part(Admission(AdmissionSettings(), NARROW))
        for _ in range(20):
            tasks = [part.start(f"tenant {i % 7}", 1 + i % 60) for i in range(100)]
            await settled()
            for at, task in enumerate(tasks):
                if at % 3 == 0 and part.running:
                    part.running.pop(0)[1].set()  # a turn comes in the very moment in which clients go
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        statistics = part.admission.statistics()
        busy = ("queued_requests", "queued_tokens", "queued_bytes", "running_requests", "running_tokens")
        assert {name: statistics[name] for name in busy} == dict.fromkeys(busy, 0)
        assert len(asyncio.all_tasks()) == 2  # this one, and who waits for it
        part.running.clear()
        last = part.start("a", 100)
        await settled()
        assert len(part.running) == 1
        last.cancel()

    run(talk)


def test_draining_refuses_who_waits_and_who_comes_and_lets_the_others_end() -> None:
    async def talk() -> None:
        part = Part(Admission(AdmissionSettings(), NARROW))
        runs, waits = part.start("a", 100), part.start("a", 100)
        await settled()
        part.admission.drain()
        for refused in (waits, part.start("b", 1)):
            with pytest.raises(Unavailable):
                await refused
        await part.end_one()
        await runs

    run(talk)


def test_a_lane_is_as_wide_as_its_part_has_replicas() -> None:
    counted = {"part": 1}

    async def talk() -> None:
        clock = Clock()
        part = Part(Admission(AdmissionSettings(), NARROW, clock, replicas=lambda: counted))
        tasks = [part.start("a", 50) for _ in range(7)]
        await settled()
        assert len(part.running) == 2
        counted["part"] = 3
        clock.now += 60
        tasks.append(part.start("a", 50))  # who waits looks
        async with asyncio.timeout(5):
            while len(part.running) < 6:
                await asyncio.sleep(0.001)
        assert len(part.running) == 6
        for task in tasks:
            task.cancel()

    run(talk)


def test_an_idle_door_is_not_slowed() -> None:
    async def talk() -> float:
        admission, deadline = Admission(AdmissionSettings(), NARROW), within()
        best = float("inf")
        for _ in range(5):
            begin = time.process_time()
            for _ in range(1000):
                async with admission.admitted(10, 100, deadline, part="part", rows=1):
                    pass
            best = min(best, time.process_time() - begin)
        return best / 1000

    seconds = run(talk)
    assert seconds < 50e-6


def test_estimates_count_what_is_read_and_what_is_held() -> None:
    assert estimate(["a" * 40, "b"]) == (12 + 2, 41)
    assert estimate([[1, 2, 3]])[0] == 3
    assert estimate([b"1234" * 100], "vector") == (1, 400)
    assert estimate([b"1234" * 100], "image")[0] > 100
