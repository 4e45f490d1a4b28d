"""The scheduler: policy on a decoder that only counts, and continuations on a real one."""

import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from metasepia.decoding.generation import RowDecoder
from metasepia.decoding.inflight import Answer, Limits
from metasepia.decoding.scheduling import Scheduler
from metasepia.decoding.steps import Chosen, NewRow, StepPlan, StepResult
from metasepia.errors import (
    DeadlineExceeded,
    InvalidRequest,
    MetasepiaError,
    Overloaded,
    Unavailable,
    UnknownName,
    WindowExceeded,
)
from metasepia.rows import Executed, HiddenStatesWanted, Row, Sampling, Scores, TokenChunk
from tests import tiny

DIGEST = "b" * 64
PREPARED = tiny.prepared(DIGEST)
LIMITS = Limits(max_rows=4, max_batch_tokens=2048, max_queued_tokens=1000)
EXECUTED = Executed(backbone=DIGEST, factors=None, adapter=(), path="plain", dtype="float32", tp_size=1)


def row(request_id: str, num_tokens: int = 5, max_tokens: int = 3, **fields: Any) -> Row:
    fields.setdefault("sampling", Sampling(temperature=0.0, max_tokens=max_tokens))
    fields.setdefault("token_ids", tuple(range(num_tokens)))
    return Row(request_id=request_id, backbone=DIGEST, **fields)


@dataclass
class CountingDecoder:
    """Answers each step as a decoder would, with the number of tokens so far as the token; keeps the plans."""

    seconds_per_token: float = 0.0
    now: float = 1000.0
    plans: list[StepPlan] = field(default_factory=list)
    groups: dict[int, tuple[list[NewRow], int]] = field(default_factory=dict)
    live: dict[int, int] = field(default_factory=dict)
    most_rows: int = 0
    meanwhile: Callable[[], object] = lambda: None
    """Called in the middle of each step, as another thread would."""

    def run(self, plan: StepPlan) -> StepResult:
        self.plans.append(plan)
        self.meanwhile()
        result = StepResult(step=plan.step)
        for key in plan.drop:
            self.live.pop(key, None)
            for rows, _ in self.groups.values():
                rows[:] = [one for one in rows if one.key != key]
        assert {key for key, _ in plan.feed} == (set(self.live) if plan.feed else set())
        for key, _ in plan.feed:
            self.live[key] += 1
            result.chosen[key] = Chosen(token_id=self.live[key], logprob=0.0)
        num_read = 0
        for begin in plan.begin:
            self.groups[begin.group] = (list(begin.rows), 0)
        for advance in plan.advance:
            rows, done = self.groups.pop(advance.group, ([], 0))
            done += advance.num_columns
            num_read += advance.num_columns * len(rows)
            if rows and done < max(len(one.token_ids) for one in rows):
                self.groups[advance.group] = (rows, done)
                continue
            for one in rows:
                result.executed[one.key] = EXECUTED
                if one.want == "tokens":
                    self.live[one.key] = len(one.token_ids)
                    result.chosen[one.key] = Chosen(token_id=self.live[one.key], logprob=0.0)
                else:
                    result.arrays[one.key] = np.zeros(len(one.token_ids) - one.score_from, np.float32)
        result.executed.update({key: EXECUTED for key in result.chosen})
        self.most_rows = max(self.most_rows, len(self.live))
        self.now += self.seconds_per_token * (num_read + len(plan.feed))
        return result


class Harness:
    """A scheduler, its decoder and the answers by request."""

    def __init__(self, limits: Limits = LIMITS, run: Any = None, **decoder: Any) -> None:
        self.decoder = CountingDecoder(**decoder)
        self.scheduler = Scheduler(run or self.decoder.run, limits, PREPARED, clock=lambda: self.decoder.now)
        self.answers: dict[str, list[Answer]] = {}
        self.order: list[str] = []

    def submit(self, *rows: Row) -> None:
        for one in rows:
            self.answers[one.request_id] = []
            self.scheduler.submit(one, self.sink(one.request_id))

    def sink(self, request_id: str) -> Callable[[Answer], None]:
        def take(answer: Answer) -> None:
            self.answers[request_id].append(answer)
            if not isinstance(answer, TokenChunk) or answer.finish:
                self.order.append(request_id)

        return take

    def finish(self, steps: int = 500) -> None:
        for _ in range(steps):
            if not self.scheduler.step():
                return
        raise AssertionError(f"rows are still there after {steps} steps: {self.scheduler.load()}")

    def tokens(self, request_id: str) -> tuple[int, ...]:
        chunks = [answer for answer in self.answers[request_id] if isinstance(answer, TokenChunk)]
        return tuple(token for chunk in chunks for token in chunk.token_ids)


def test_rows_stop_at_their_length_and_at_stop_tokens_which_are_not_part_of_the_answer() -> None:
    h = Harness()
    stopping = Sampling(temperature=0.0, max_tokens=30, stop_token_ids=(9,))
    h.submit(row("length", 5, 3), row("stop", 7, sampling=stopping))
    h.finish()
    assert (h.tokens("length"), h.tokens("stop")) == ((5, 6, 7), (7, 8))
    for request_id, finish in (("length", "length"), ("stop", "stop")):
        chunks: Any = h.answers[request_id]
        assert [chunk.finish for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
        assert (chunks[-1].finish, chunks[-1].executed) == (finish, EXECUTED)
    assert h.scheduler.load().num_live == h.scheduler.load().cache_tokens == 0
    assert h.decoder.live == {}


@pytest.mark.parametrize(
    ("bad", "error", "text"),
    [
        ({"backbone": "c" * 64}, UnknownName, "no backbone named"),
        ({"token_ids": ()}, InvalidRequest, "token_ids: .*at least one"),
        ({"token_ids": (1, 288)}, InvalidRequest, "from 0 to 287"),
        ({"sent": (-1,)}, InvalidRequest, "from 0 to 287"),
        ({"sampling": Sampling(temperature=float("nan"))}, InvalidRequest, "temperature: .*got nan"),
        ({"sampling": Sampling(temperature=2.1)}, InvalidRequest, "temperature"),
        ({"sampling": Sampling(top_p=0.0)}, InvalidRequest, "top_p"),
        ({"sampling": Sampling(max_tokens=0)}, InvalidRequest, "max_tokens"),
        ({"sampling": Sampling(max_tokens=252)}, WindowExceeded, "257 tokens do not fit the window of 256"),
        ({"want": "logprobs", "score_from": 0}, InvalidRequest, "score_from"),
        ({"want": "logprobs", "token_ids": (1,) * 257}, WindowExceeded, "257"),
        ({"want": "hidden_states", "hidden": HiddenStatesWanted(layers=(3,))}, InvalidRequest, "from -3 to 2"),
        ({"want": "hidden_states", "hidden": HiddenStatesWanted(layers=())}, InvalidRequest, "layers"),
        ({"deadline_unix_s": 999.0}, DeadlineExceeded, "the row"),
    ],
)
def test_a_row_that_can_never_run_is_refused_at_once(bad: dict[str, Any], error: type, text: str) -> None:
    h = Harness()
    with pytest.raises(error, match=text):
        h.scheduler.submit(replace(row("bad"), **bad), h.order.append)  # pyright: ignore[reportArgumentType]
    assert not h.scheduler.step()


def test_a_row_longer_than_the_cache_is_refused_though_the_window_holds_it() -> None:
    h = Harness(Limits(max_rows=4, max_batch_tokens=100, max_queued_tokens=1000))
    with pytest.raises(WindowExceeded, match="101 tokens do not fit the window of 100"):
        h.submit(row("long", 98, 3))


def test_a_full_queue_says_how_long_it_takes_to_drain_at_the_measured_rate() -> None:
    h = Harness(seconds_per_token=0.1)
    h.submit(row("warm", 64, 1))
    h.finish()  # 64 tokens at 10 a second
    h.submit(row("a", 97, 3, priority=1))
    h.scheduler.step()
    h.submit(*(row(f"queued-{i}", 97, 103) for i in range(5)))
    with pytest.raises(Overloaded, match="queue") as refused:
        h.submit(row("one more", 97, 103))
    assert refused.value.retry_after_s == pytest.approx(200 / 10, rel=0.2)
    h.finish()
    assert all(h.tokens(f"queued-{i}") for i in range(5))


def test_a_late_row_is_told_so_and_the_others_go_on() -> None:
    h = Harness(seconds_per_token=1.0)
    h.submit(
        row("late", 5, 50, deadline_unix_s=1030.0), row("fine", 5, 50), row("waits", 250, 5, deadline_unix_s=1040.0)
    )
    h.finish()
    late, waits = h.answers["late"][-1], h.answers["waits"][-1]
    assert isinstance(late, DeadlineExceeded) and late.timeout_s == 30.0 and len(h.answers["late"]) > 1
    assert isinstance(waits, DeadlineExceeded)
    assert len(h.tokens("fine")) == 50


def test_a_cancelled_row_leaves_before_the_next_step_wherever_it_was() -> None:
    h = Harness(Limits(max_rows=1, max_batch_tokens=2048, max_queued_tokens=1000))
    h.submit(row("live", 5, 50), row("reading", 250, 1, want="logprobs"), row("waiting", 5, 50))
    h.scheduler.step()
    seen = {name: len(answers) for name, answers in h.answers.items()}
    assert [h.scheduler.cancel(name) for name in ("live", "reading", "waiting", "nobody")] == [True, True, True, False]
    h.finish()
    assert seen == {name: len(answers) for name, answers in h.answers.items()}
    assert h.decoder.live == {} and h.decoder.groups.keys() <= {0} and h.scheduler.load().num_waiting_tokens == 0


def test_higher_priority_goes_first_and_equals_go_in_order_of_arrival() -> None:
    h = Harness(Limits(max_rows=1, max_batch_tokens=2048, max_queued_tokens=1000))
    h.submit(row("first"), row("second"), row("urgent", priority=5), row("low", priority=-1))
    h.finish()
    assert h.order == ["urgent", "first", "second", "low"]


def test_rows_that_generate_and_rows_that_are_read_take_turns() -> None:
    h = Harness()
    h.submit(*(row(f"read-{i}", 60, want="logprobs") for i in range(8)), row("chat", 10, 1))
    h.finish()
    assert h.order.index("chat") <= 1


def test_a_short_prompt_overtakes_a_long_one_and_does_not_stop_it() -> None:
    h = Harness(seconds_per_token=0.01)  # 25 tokens in step_target_s: pieces of 64, the least
    h.submit(row("long", 250, 1))
    h.scheduler.step()
    h.submit(row("short", 10, 1))
    h.finish()
    assert h.order == ["short", "long"]
    h.submit(row("long again", 250, 1))
    for i in range(20):
        if "long again" in h.order:
            break
        h.submit(row(f"short-{i}", 60, 1))
        h.scheduler.step()
    else:
        raise AssertionError("short prompts kept a long one waiting for ever")


def test_background_rows_never_fill_the_queue_of_others_and_have_half_of_it() -> None:
    h = Harness()
    h.submit(row("runs", 5, 50), *(row(f"live-{i}", 5, 50) for i in range(3)))
    h.scheduler.step()
    with pytest.raises(Overloaded):
        h.submit(*(row(f"background-{i}", 50, 50, priority=-1) for i in range(10)))
    assert h.scheduler.load().num_waiting_tokens == 500
    h.submit(*(row(f"normal-{i}", 50, 50) for i in range(10)))  # all of the queue, as if nothing were there
    with pytest.raises(Overloaded):
        h.submit(row("one more", 50, 50))
    h.finish()
    assert h.order.index("normal-9") < h.order.index("background-0")


def test_a_background_row_makes_way_and_goes_on_where_it_stopped() -> None:
    h = Harness()
    h.submit(*(row(f"background-{i}", 5, 60, priority=-1) for i in range(4)))
    for _ in range(10):
        h.scheduler.step()
    h.submit(row("normal", 5, 6), row("other", 7, 6))
    h.finish()
    assert h.order[:2] == ["normal", "other"] and h.scheduler.load().put_back == 2
    for i in range(4):
        assert h.tokens(f"background-{i}") == tuple(range(5, 65))
    again = [one for plan in h.decoder.plans for begin in plan.begin for one in begin.rows if len(one.token_ids) > 7]
    assert [len(one.token_ids) for one in again] == [15, 15]  # with the ten that had left
    assert len({key for plan in h.decoder.plans for key, _ in plan.feed}) == 8  # no key twice


def test_background_prompts_that_are_being_read_make_way_and_are_read_again() -> None:
    limits = Limits(max_rows=4, max_batch_tokens=500, max_queued_tokens=10_000)
    h = Harness(limits, seconds_per_token=0.01)
    for i, length in enumerate((250, 90)):
        h.submit(row(f"background-{i}", length, 1, want="logprobs", priority=-1))
        h.scheduler.step()
    h.submit(row("normal", 250, 1))
    h.scheduler.step()
    assert h.scheduler.load().put_back > 0 and not h.order
    assert "normal" in {entry.row.request_id for entry in h.scheduler._state.reading()}
    h.finish()
    assert h.order[0] == "normal" and sorted(h.order[1:]) == ["background-0", "background-1"]
    assert all(len(answers) == 1 for answers in h.answers.values())


def test_background_rows_stay_where_their_going_would_not_help() -> None:
    h = Harness()
    h.submit(*(row(f"normal-{i}", 5, 40) for i in range(4)), row("background", 200, 1, want="logprobs", priority=-1))
    h.scheduler.step()
    h.submit(row("waits", 5, 5))
    h.finish()
    assert h.scheduler.load().put_back == 0


def test_bounds_hold_in_every_step_of_a_random_load() -> None:
    rng = np.random.default_rng(0)
    limits = Limits(max_rows=3, max_batch_tokens=200, max_queued_tokens=10**6)
    h = Harness(limits, seconds_per_token=0.001)
    for i in range(120):
        want = ("tokens", "logprobs", "hidden_states")[rng.integers(3)]
        num_tokens, max_tokens, priority = (int(rng.integers(high)) for high in (60, 30, 2))
        h.submit(row(str(i), num_tokens + 1, max_tokens + 1, want=want, priority=priority))
    for _ in range(5000):
        if not h.scheduler.step():
            break
        load = h.scheduler.load()
        assert load.num_live <= 3 and load.cache_tokens <= 200
    assert len(h.order) == 120 and h.decoder.most_rows == 3
    assert not any(isinstance(answers[-1], MetasepiaError) for answers in h.answers.values())


def test_rows_cancelled_in_the_middle_of_steps_leave_nothing_behind() -> None:
    rng = np.random.default_rng(1)
    h = Harness(Limits(max_rows=4, max_batch_tokens=400, max_queued_tokens=10**6), seconds_per_token=0.001)
    h.submit(*(row(str(i), int(rng.integers(1, 90)), int(rng.integers(1, 9))) for i in range(100)))
    cancelled: dict[str, int] = {}

    def cancel() -> None:
        request_id = str(rng.integers(100))
        if h.scheduler.cancel(request_id):
            cancelled[request_id] = len(h.answers[request_id])

    h.decoder.meanwhile = cancel
    h.finish()
    assert 20 < len(cancelled) < 80 and len(h.order) == 100 - len(cancelled)
    assert cancelled == {request_id: len(h.answers[request_id]) for request_id in cancelled}
    assert h.decoder.live == {} and h.scheduler.load().num_reading == 0


def test_scheduling_and_finding_a_prepared_backbone_need_no_torch() -> None:
    modules = "metasepia.decoding.scheduling, metasepia.models.prepared, metasepia.models.checkpoints"
    command = f"import sys, {modules}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", command], check=False).returncode == 0


def test_a_row_whose_reader_fails_ends_alone() -> None:
    h = Harness()

    def gone(_answer: Answer) -> None:
        raise RuntimeError("event loop is closed")

    h.scheduler.submit(row("gone", 5, 20), gone)
    h.submit(row("here", 5, 20))
    h.finish()
    assert len(h.tokens("here")) == 20
    assert len(h.decoder.plans) < 30 and h.decoder.live == {}


def test_a_failed_gang_ends_the_thread_and_answers_no_row() -> None:
    def lost(plan: StepPlan) -> StepResult:
        raise ConnectionResetError("rank 1 is gone")

    h = Harness(run=lost)
    h.submit(row("waits"))
    with pytest.raises(ConnectionResetError, match="rank 1 is gone"):
        h.scheduler.run_forever(threading.Event())
    assert h.answers == {"waits": []}
    with pytest.raises(Unavailable):
        h.submit(row("after"))


def test_one_id_is_in_flight_once() -> None:
    h = Harness()
    h.submit(row("same"))
    with pytest.raises(InvalidRequest, match="in flight"):
        h.scheduler.submit(row("same"), h.sink("same"))


# -- on a real decoder -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_llama(tiny_checkpoint: Callable[[str], Path]):
    return AutoModelForCausalLM.from_pretrained(tiny_checkpoint("llama")).eval()


def test_a_thread_answers_rows_of_every_kind_and_sampled_rows_resume_where_they_broke(tiny_llama) -> None:
    scheduler = Scheduler(RowDecoder(tiny_llama, backbone=DIGEST).run, LIMITS, PREPARED)
    stop = threading.Event()
    thread = threading.Thread(target=scheduler.run_forever, args=(stop,))
    thread.start()
    try:
        sampled = row("whole", 9, seed=3, sampling=Sampling(temperature=1.0, top_p=0.9, max_tokens=12))
        whole = ask(scheduler, sampled)
        tokens = tuple(token for chunk in whole for token in chunk.token_ids)
        assert len(tokens) == 12 and whole[-1].finish == "length"
        neighbours = [row(f"n{i}", 5 + i, 40, seed=i, sampling=Sampling(max_tokens=40)) for i in range(3)]
        for one in neighbours:
            scheduler.submit(one, lambda _: None)
        for cut in (1, 7, 12):
            rest = ask(scheduler, replace(sampled, request_id=f"cut-{cut}", sent=tokens[:cut]))
            assert tuple(token for chunk in rest for token in chunk.token_ids) == tokens[cut:]
            assert rest[-1].finish == "length" and rest[-1].executed is not None
        scores = ask(scheduler, row("scores", 9, want="logprobs", score_from=4))[0]
        assert isinstance(scores, Scores) and scores.logprobs.shape == (5,)
    finally:
        stop.set()
        thread.join(10)
    assert not thread.is_alive()


def test_a_background_row_that_made_way_answers_as_if_it_had_been_alone(tiny_llama) -> None:
    rows = [
        row(f"background-{i}", 6 + i, seed=i, priority=-1, sampling=Sampling(temperature=0.7, max_tokens=14))
        for i in range(LIMITS.max_rows)
    ]
    rows[0] = replace(rows[0], prefix=rows[0].token_ids)

    def answers(*others: Row) -> dict[str, list[int]]:
        scheduler = Scheduler(RowDecoder(tiny_llama, backbone=DIGEST).run, LIMITS, PREPARED)
        tokens: dict[str, list[int]] = {}
        for one in rows:
            took = tokens[one.request_id] = []
            scheduler.submit(one, lambda answer, took=took: took.extend(answer.token_ids))  # pyright: ignore[reportAttributeAccessIssue]
        for _ in range(8):
            scheduler.step()
        for one in others:
            scheduler.submit(one, lambda _: None)
        while scheduler.step():
            pass
        assert scheduler.load().put_back == len(others)
        return tokens

    assert answers(row("a", 9, 8), row("b", 30, 8), row("c", 3, 8)) == answers()


def ask(scheduler: Scheduler, one: Row) -> list[Any]:
    answers: list[Any] = []
    done = threading.Event()

    def take(answer: Answer) -> None:
        answers.append(answer)
        if not isinstance(answer, TokenChunk) or answer.finish:
            done.set()

    scheduler.submit(one, take)
    assert done.wait(30)
    return answers
