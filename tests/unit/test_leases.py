"""Experts come and go by the plan: never from under a row that runs, within the bound, and no row waits for ever."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from metasepia.decoding.inflight import Answer, Limits
from metasepia.decoding.leases import Leases, Moves
from metasepia.decoding.scheduling import Scheduler
from metasepia.decoding.steps import Chosen, NewRow, StepPlan, StepResult
from metasepia.errors import InvalidRequest, MetasepiaError, UnknownName
from metasepia.rows import Adapter, Executed, Row, Sampling, TokenChunk
from tests import tiny

DIGEST = "b" * 64
PREPARED = tiny.prepared(DIGEST)
LIMITS = Limits(max_rows=4, max_batch_tokens=2048, max_queued_tokens=10**6)
EXECUTED = Executed(backbone=DIGEST, factors=None, adapter=(), path="plain", dtype="float32", tp_size=1)


def only(name: str) -> Adapter:
    return ((name * 64, 1.0),)


def mixed(names: str) -> Adapter:
    return tuple((name * 64, 1.0 / len(names)) for name in names)


@dataclass
class Ranks:
    """Ranks and their owner: a table that changes as the plan says, and experts that take `delay` steps to come."""

    sizes: dict[str, int] = field(default_factory=dict)
    """Bytes by letter; those that are absent have 10."""
    unknown: str = ""
    delay: Callable[[], int] = lambda: 1
    now: float = 1000.0
    scheduler: Any = None
    table: set[str] = field(default_factory=set)
    aside: set[str] = field(default_factory=set)
    coming: list[tuple[int, str]] = field(default_factory=list)
    live: dict[int, NewRow] = field(default_factory=dict)
    groups: dict[int, list[NewRow]] = field(default_factory=dict)
    steps: int = 0
    most_bytes: int = 0
    most_aside: int = 0
    learnt: list[str] = field(default_factory=list)

    def size(self, digest: str) -> int:
        return self.sizes.get(digest[0], 10)

    def move(self, moves: Moves) -> None:
        for digest in moves.unwanted:
            self.aside.discard(digest)
        for digest in moves.wanted:
            self.coming.append((self.steps + self.delay(), digest))

    def bring(self) -> None:
        """What is due arrives; called between steps, as another thread would."""
        self.steps += 1
        for due, digest in list(self.coming):
            if due <= self.steps:
                self.coming.remove((due, digest))
                if digest[0] in self.unknown:
                    self.scheduler.expert_refused(digest, UnknownName("expert", digest, ()))
                else:
                    self.put(digest)

    def put(self, digest: str) -> None:
        self.aside.add(digest)
        self.scheduler.expert_arrived(digest, self.size(digest))

    def run(self, plan: StepPlan) -> StepResult:
        self.now += 0.01
        self.table -= set(plan.forget)
        for digest in plan.learn:
            self.aside.remove(digest)
            self.table.add(digest)
            self.learnt.append(digest[0])
        self.most_bytes = max(self.most_bytes, sum(map(self.size, self.table)))
        self.most_aside = max(self.most_aside, len(self.aside))
        for key in plan.drop:
            self.live.pop(key, None)
        result = StepResult(step=plan.step)
        for begin in plan.begin:
            self.groups[begin.group] = list(begin.rows)
        read = [row for one in plan.advance for row in self.groups[one.group]]
        for row in [*self.live.values(), *read]:
            assert {digest for digest, _ in row.adapter} <= self.table, "a row ran without its expert"
        for one in plan.advance:  # every prompt here is read in one piece
            for row in self.groups.pop(one.group):
                self.live[row.key] = row
        for key in self.live:
            result.chosen[key] = Chosen(token_id=1, logprob=0.0)
            result.executed[key] = EXECUTED
        return result


class Harness:
    def __init__(self, max_bytes: int, *, limits: Limits = LIMITS, always: str = "", **ranks: Any) -> None:
        self.ranks = Ranks(**ranks)
        self.leases = Leases(max_bytes, always=frozenset(name * 64 for name in always))
        self.scheduler = self.ranks.scheduler = Scheduler(
            self.ranks.run, limits, PREPARED, leases=self.leases, move=self.ranks.move, clock=lambda: self.ranks.now
        )
        self.answers: dict[str, list[Answer]] = {}
        self.order: list[str] = []

    def submit(self, name: str, adapter: Adapter, max_tokens: int = 3, **fields: Any) -> None:
        self.answers[name] = []
        sampling = Sampling(temperature=0.0, max_tokens=max_tokens)
        row = Row(request_id=name, backbone=DIGEST, token_ids=(1, 2), adapter=adapter, sampling=sampling, **fields)
        self.scheduler.submit(row, lambda answer: self._take(name, answer))

    def _take(self, name: str, answer: Answer) -> None:
        self.answers[name].append(answer)
        if not isinstance(answer, TokenChunk) or answer.finish:
            self.order.append(name)

    def step(self) -> None:
        self.scheduler.step()
        self.ranks.bring()

    def finish(self, steps: int = 300) -> None:
        for _ in range(steps):
            if len(self.order) == len(self.answers) and not self.ranks.coming:
                return
            self.step()
        raise AssertionError(f"{set(self.answers) - set(self.order)} wait still: {self.scheduler.load()}")

    def tokens(self, name: str) -> int:
        return sum(len(one.token_ids) for one in self.answers[name] if isinstance(one, TokenChunk))


def test_an_expert_comes_once_for_all_rows_that_name_it_and_base_rows_do_not_wait() -> None:
    h = Harness(100, delay=lambda: 5)
    h.submit("a1", only("a"))
    h.submit("a2", only("a"))
    h.submit("base", ())
    h.finish()
    assert h.order[0] == "base" and h.tokens("a1") == h.tokens("a2") == 3
    h.submit("a3", only("a"))
    h.finish()
    assert h.ranks.learnt == ["a"]


def test_the_longest_unused_makes_room_and_never_one_in_use() -> None:
    h = Harness(30)
    for name in "abc":
        h.submit(name, only(name))
        h.finish()
    h.submit("a again", only("a"), max_tokens=30)
    h.step()
    h.submit("d", only("d"))
    h.finish()
    assert {digest[0] for digest in h.ranks.table} == {"a", "c", "d"}
    load = h.scheduler.load()
    assert (load.experts, load.expert_bytes, load.experts_learnt, load.experts_forgotten) == (3, 30, 4, 1)


def test_rows_behind_do_not_keep_the_room_that_a_row_waits_for() -> None:
    """Hot experts whose rows never stop coming would otherwise hold everything for ever."""
    h = Harness(20, limits=Limits(max_rows=8, max_batch_tokens=2048, max_queued_tokens=10**6))

    def two_hot_rows(i: int) -> None:
        for name in "ab":
            h.submit(f"{name}-{i}", only(name), max_tokens=3 + (5 * i + ord(name)) % 7)

    for i in range(10):
        two_hot_rows(i)
        h.step()
    h.submit("rare", only("c"))
    for i in range(10, 60):
        if "rare" in h.order:
            break
        two_hot_rows(i)
        h.step()
    assert "rare" in h.order
    h.finish()
    assert h.ranks.most_bytes <= 20


def test_a_row_takes_the_room_of_one_that_waits_behind_it_but_not_of_one_before_it() -> None:
    limits = Limits(max_rows=1, max_batch_tokens=2048, max_queued_tokens=10**6)
    h = Harness(20, limits=limits)
    h.submit("runs", only("a"), max_tokens=20)
    h.submit("waits", only("b"))
    for _ in range(5):
        h.step()  # both are held: no room
    h.submit("behind", only("c"))
    h.submit("before", only("d"), priority=1)
    h.finish()
    assert h.order == ["runs", "before", "waits", "behind"]
    assert h.ranks.learnt == ["a", "b", "d", "b", "c"]


def test_a_mixture_needs_all_its_experts_at_once_and_two_do_not_block_each_other() -> None:
    h = Harness(30, delay=lambda: 2)
    for name in ("abc", "bcd", "cde", "aec"):
        h.submit(name, mixed(name))
    h.finish()
    assert all(h.tokens(name) == 3 for name in h.answers) and h.ranks.most_bytes == 30


def test_experts_that_together_exceed_the_bound_are_refused_in_words() -> None:
    h = Harness(25, sizes={"x": 26})
    h.submit("too many", mixed("abc"))
    h.submit("too large", only("x"))
    h.submit("fits", mixed("ab"))
    h.finish()
    for name in ("too many", "too large"):
        refused = h.answers[name][-1]
        assert isinstance(refused, InvalidRequest) and "max_expert_mib" in str(refused)
    assert h.tokens("fits") == 3 and not h.ranks.aside


def test_an_expert_that_cannot_be_had_ends_its_rows_alone() -> None:
    h = Harness(30, unknown="x")
    for name, adapter in (("x", only("x")), ("mixed", mixed("ax")), ("a", only("a"))):
        h.submit(name, adapter)
    h.finish()
    assert isinstance(h.answers["x"][-1], UnknownName) and isinstance(h.answers["mixed"][-1], UnknownName)
    assert h.tokens("a") == 3


def test_a_pinned_expert_never_leaves_and_the_identity_costs_nothing() -> None:
    h = Harness(20, always="i")
    h.ranks.table = {"p" * 64, "i" * 64}
    h.leases.pin("p" * 64, 10)
    for name in "abcabc":
        h.submit(f"{name}-{len(h.answers)}", mixed(f"i{name}"))
    h.submit("p", mixed("pa"))
    h.submit("too much", mixed("ab"))
    h.finish()
    assert "p" * 64 in h.ranks.table and h.ranks.most_bytes == 20 + 10  # the identity's ten are not counted
    refused = h.answers["too much"][-1]
    assert isinstance(refused, InvalidRequest) and "beside the pinned one" in str(refused)


def test_what_came_unasked_is_learnt_where_there_is_room_and_else_taken_back() -> None:
    h = Harness(20)
    h.submit("ab", mixed("ab"), max_tokens=20)
    for _ in range(3):
        h.step()
    h.ranks.put("c" * 64)
    h.ranks.put("a" * 64)  # held already
    h.finish()
    assert not h.ranks.aside and {digest[0] for digest in h.ranks.table} == {"a", "b"}
    h.ranks.put("c" * 64)
    h.step()
    assert "c" * 64 in h.ranks.table and h.ranks.most_bytes == 20


def test_cancelled_rows_leave_nothing_aside_and_give_their_room_back() -> None:
    h = Harness(10, delay=lambda: 3)
    h.submit("runs", only("a"), max_tokens=50)
    for _ in range(6):
        h.step()
    for name in "bcdefgh":
        h.submit(name, only(name))
        h.step()
    for name in "bcdefgh":
        assert h.scheduler.cancel(name)
        h.order.append(name)
    h.step()
    h.scheduler.cancel("runs")
    h.order.append("runs")
    for _ in range(8):
        h.step()
    assert not h.ranks.aside and not h.ranks.coming
    h.submit("last", only("z"))
    h.finish()
    assert h.tokens("last") == 3


@pytest.mark.parametrize("seed", range(3))
def test_a_random_storm_keeps_every_bound_and_answers_every_row(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = {name: int(rng.integers(5, 15)) for name in "abcdefghij"}
    h = Harness(40, sizes=sizes, unknown="j", delay=lambda: int(rng.integers(1, 6)))
    cancelled = 0
    for i in range(150):
        names = "".join(rng.choice(list("abcdefghij"), int(rng.integers(0, 3)), replace=False))
        h.submit(str(i), mixed(names), int(rng.integers(1, 12)), priority=int(rng.integers(-1, 2)))
        if rng.random() < 0.1:
            h.ranks.put(str(rng.choice(list("abcdefghi"))) * 64)
        if rng.random() < 0.2 and h.scheduler.cancel(one := str(rng.integers(i + 1))):
            cancelled += 1
            h.order.append(one)
        if rng.random() < 0.7:
            h.step()
    h.finish(5000)
    h.step()
    assert sorted(h.order, key=int) == [str(i) for i in range(150)] and cancelled > 5
    assert h.ranks.most_bytes <= 40 and not h.ranks.aside
    assert h.scheduler.load().experts_forgotten > 30
    for name, answers in h.answers.items():
        wants_j = any(isinstance(one, MetasepiaError) for one in answers)
        assert not wants_j or isinstance(answers[-1], UnknownName), name


def test_a_scheduler_that_waits_for_an_expert_sleeps() -> None:
    h = Harness(10, delay=lambda: 10**6)
    h.submit("a", only("a"))
    import threading

    stop, count = threading.Event(), [0]
    step = h.scheduler.step

    def counted() -> bool:
        count[0] += 1
        return step()

    h.scheduler.step = counted  # pyright: ignore[reportAttributeAccessIssue]
    thread = threading.Thread(target=h.scheduler.run_forever, args=(stop,))
    thread.start()
    time.sleep(0.5)
    stop.set()
    thread.join(5)
    assert 1 <= count[0] < 10
