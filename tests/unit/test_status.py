"""GET /v1/status: what it says, how often it asks, and what a silent part costs."""

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from metasepia.errors import Unavailable
from serve.telemetry import status
from serve.telemetry.health import Health
from serve.telemetry.status import MAX_DURATIONS, NUM_STEPS, SERIES, Recent, Status
from tests.doors import Bench
from tests.unit.test_prompts import write_byte_tokenizer


class Clock:
    """Moved by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Part:
    """Counts how often it was asked, and how often it ran a forward."""

    def __init__(self) -> None:
        self.num_asked = self.num_checked = 0
        self.hangs = False

    async def load(self) -> Mapping[str, Any]:
        self.num_asked += 1
        if self.hangs:
            await asyncio.sleep(60)
        return {"num_waiting_tokens": 7.0}

    async def check(self) -> None:
        self.num_checked += 1
        if self.hangs:
            raise Unavailable("it", 1.0)


def made(part: Part, clock: Clock, replicas: Mapping[str, Any] | None = None) -> Status:
    health = Health({"backbone tiny": part.check})
    asks = {"backbones": {"tiny": part.load}, "reasoning": {"": part.load}}
    return Status(Recent(clock), health, asks, lambda: replicas or {}, clock)


def test_the_door_tells_of_its_parts_its_pace_and_its_requests(tmp_path: Path):
    write_byte_tokenizer(tmp_path)
    bench = Bench(tmp_path)
    bench.says("xyz")
    for _ in range(3):
        bench.chat()
    bench.chat(model="nobody")
    bench.get("/health")
    told = bench.get("/v1/status").json()
    assert told["ready"] and {one["name"]: one["ready"] for one in told["parts"]}["backbone tiny"]
    assert told["backbones"]["tiny"]["num_waiting"] == 3 and told["reasoning"]["contexts_kept"] == 2
    latency = told["latency"]["/v1/chat/completions"]
    assert latency["count"] == 4 and 0 < latency["p50_ms"] <= latency["p99_ms"]
    assert told["running"] == 1  # this one
    assert tuple(told["history"]["series"]) == SERIES


def test_however_many_ask_the_parts_are_asked_once_a_second(monkeypatch: pytest.MonkeyPatch):
    part, clock = Part(), Clock()

    async def main() -> None:
        one = made(part, clock)
        for _ in range(50):
            await asyncio.gather(*(one.json() for _ in range(20)))
            clock.now += 0.1

    asyncio.run(main())
    assert part.num_asked <= 2 * 7  # two groups, five seconds


def test_a_forward_is_run_only_where_the_last_one_is_old(monkeypatch: pytest.MonkeyPatch):
    part, clock = Part(), Clock()
    monkeypatch.setattr("serve.telemetry.health.time.monotonic", clock)

    async def main() -> list[int]:
        one, checked = made(part, clock), []
        told: dict[str, Any] = {}
        for _ in range(40):
            told = await one.json()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            checked.append(part.num_checked)
            clock.now += 2.0
        assert told["ready"] and told["checked_ago_s"] <= status.CHECK_S + 2
        return checked

    checked = asyncio.run(main())
    assert checked[0] == 1 and checked[-1] == pytest.approx(80 / (status.CHECK_S + 1), abs=2)


def test_a_part_that_keeps_silent_is_told_and_holds_nobody_up(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(status, "ASK_TIMEOUT_S", 0.05)
    part, clock = Part(), Clock()
    part.hangs = True

    async def main() -> tuple[Any, Any]:
        one = made(part, clock, {"backbone tiny": {"status": "healthy", "running": 2}})
        first = await asyncio.wait_for(one.json(), 1)
        await asyncio.sleep(0.01)
        clock.now += 2
        return first, await asyncio.wait_for(one.json(), 1)

    first, later = asyncio.run(main())
    assert first["backbones"] == {"tiny": {"reason": "no answer in time"}}
    assert first["parts"][0]["reason"] == "not asked yet" and not first["ready"]
    (part_told,) = later["parts"]
    assert (part_told["ready"], part_told["replicas"]) == (False, {"status": "healthy", "running": 2})
    assert "try again" in part_told["reason"] or "it" in part_told["reason"]


def test_the_history_counts_each_step_and_forgets_what_is_older_than_ten_minutes(monkeypatch: pytest.MonkeyPatch):
    part, clock = Part(), Clock()
    recent = Recent(clock)

    async def sleep(seconds: float) -> None:
        nonlocal steps
        clock.now += seconds
        steps += 1
        if steps > NUM_STEPS + 10:
            raise asyncio.CancelledError
        for index in range(steps):
            recent.end("/x", index == 0, 0.010 * (index + 1))
        recent.num_tokens += 50

    steps = 0
    one = Status(recent, Health({}), {"backbones": {"tiny": part.load}}, dict, clock)

    async def main() -> None:
        monkeypatch.setattr(status.asyncio, "sleep", sleep)
        with pytest.raises(asyncio.CancelledError):
            await one._sample()

    asyncio.run(main())
    series = one._series
    assert all(len(series[name]) == NUM_STEPS for name in SERIES)
    last = NUM_STEPS + 10
    assert list(series["requests_per_s"])[-1] == last / status.STEP_S
    assert list(series["tokens_per_s"])[-1] == 50 / status.STEP_S
    assert list(series["failures_per_s"])[-1] == 1 / status.STEP_S
    assert list(series["p50_ms"])[-1] == pytest.approx(10 * (last // 2 + 1), abs=10)
    assert list(series["queued_tokens"])[-1] == 7


def test_latencies_are_of_the_last_requests_and_of_a_bounded_number():
    clock = Clock()
    recent = Recent(clock)
    for _ in range(2 * MAX_DURATIONS):
        recent.end("/x", False, 1.0)
    recent.end("/old", False, 9.0)
    clock.now += status.STEP_S * NUM_STEPS + 1
    for milliseconds in range(1, 101):
        recent.end("/x", False, milliseconds / 1000)
    assert recent.latency() == {"/x": {"p50_ms": 51.0, "p99_ms": 100.0, "count": 100}}
    assert len(recent.since(clock.now - 1)) == 100
