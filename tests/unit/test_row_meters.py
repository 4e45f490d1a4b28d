"""What a scheduler's rows and steps leave in the metrics, on a decoder that only counts."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from actors import meters
from actors.recording import Distribution
from actors.row_meters import Pace, RowMeters
from cluster.settings import BackboneSettings
from metasepia.decoding.scheduling import Scheduler
from metasepia.rows import Row
from tests.unit.test_scheduling import DIGEST, LIMITS, PREPARED, CountingDecoder, row

EXPERT = ((DIGEST, 1.0),)


@pytest.fixture(autouse=True)
def cleared() -> Iterator[None]:
    for one in meters.METRICS.values():
        one.clear()
    yield
    for one in meters.METRICS.values():
        one.clear()


class Run:
    """A scheduler with its meters, on a clock that the decoder moves: a token takes a hundredth of a second."""

    def __init__(self) -> None:
        self.decoder = CountingDecoder(seconds_per_token=0.01)
        self.meters = RowMeters(BackboneSettings(id="tiny", source="none", max_batch_tokens=2048))
        self.scheduler = Scheduler(
            self.decoder.run, LIMITS, PREPARED, watcher=self.meters, clock=lambda: self.decoder.now
        )
        self.meters.follow(self.scheduler)

    def submit(self, *rows: Row) -> None:
        for one in rows:
            self.scheduler.submit(one, lambda _: None)

    def finish(self) -> None:
        while self.scheduler.step():
            pass


def seen(meter: Any) -> Distribution:
    found = meter.value(backbone="tiny")
    assert found is not None
    return found


def test_a_row_waits_is_read_and_ends_and_each_part_is_measured():
    run = Run()
    run.submit(row("a", num_tokens=10, max_tokens=3))
    run.decoder.now += 0.5  # it waits for half a second
    run.finish()
    assert seen(meters.ROW_QUEUE).total == pytest.approx(0.5)
    assert seen(meters.ROW_PREFILL).total == pytest.approx(0.1)  # ten tokens
    assert meters.ROWS.value(backbone="tiny", outcome="length") == 1
    assert meters.STEPS.value(backbone="tiny") == 4  # read, two more tokens, and let go
    assert seen(meters.STEP).total == pytest.approx(0.12)
    assert meters.BATCH_TOKENS.value(part="backbone", model="tiny", what="used") == 12


def test_padding_is_what_shorter_prompts_and_rows_that_left_cost():
    run = Run()
    run.submit(row("a", num_tokens=20, max_tokens=1), row("b", num_tokens=14, max_tokens=1))
    run.finish()
    assert meters.BATCH_TOKENS.value(part="backbone", model="tiny", what="padding") == 6
    assert meters.BATCH_TOKENS.value(part="backbone", model="tiny", what="used") == 34
    assert seen(meters.STEP_ROWS).total == 2


def test_rows_that_end_badly_are_told_by_their_error():
    run = Run()
    run.submit(row("late", deadline_unix_s=1000.5))
    run.decoder.now += 1
    run.finish()
    assert meters.ROWS.value(backbone="tiny", outcome="DeadlineExceeded") == 1
    assert meters.ROW_QUEUE.value(backbone="tiny") is None  # it never began


def test_gauges_tell_what_is_held_and_take_back_experts_that_are_gone():
    run = Run()
    run.submit(*(replace(row(f"r{i}", num_tokens=8, max_tokens=8), adapter=EXPERT if i % 2 else ()) for i in range(6)))
    run.scheduler.step()
    run.meters.tell()
    assert meters.RUNNING_ROWS.value(backbone="tiny") == 4  # max_rows
    assert meters.QUEUED.value(backbone="tiny") == 2
    assert meters.CACHE.value(backbone="tiny") == pytest.approx(4 * 16 / 2048)
    experts = {(one["adapter"], one["state"]): value for one, value in meters.ADAPTER_ROWS.items()}
    assert sum(experts.values()) == 3 and {adapter for adapter, _ in experts} == {DIGEST[:12]}
    run.finish()
    run.meters.tell()
    assert list(meters.ADAPTER_ROWS.items()) == [] and meters.RUNNING_ROWS.value(backbone="tiny") == 0


def test_pace_is_the_first_token_and_the_mean_of_those_after_it(monkeypatch: pytest.MonkeyPatch):
    now = [10.5]
    monkeypatch.setattr("actors.row_meters.time.time", lambda: now[0])
    pace = Pace("tiny", begin_unix_s=10.0)
    pace.tokens(1, last=False)
    for at, count, last in ((11.0, 1, False), (12.5, 3, True)):
        now[0] = at
        pace.tokens(count, last)
    assert seen(meters.FIRST_TOKEN).total == pytest.approx(0.5)
    assert seen(meters.PER_TOKEN).total == pytest.approx(0.5)  # four more in two seconds
