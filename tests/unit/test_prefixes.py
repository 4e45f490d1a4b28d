"""Prefixes that rows share: read once, taken by each as far as it can be, bounded, and of no effect on answers."""

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from metasepia.backbone import ReferenceBackbone
from metasepia.decoding.generation import RowDecoder
from metasepia.decoding.inflight import Answer, Limits
from metasepia.decoding.prefixes import PATIENCE_S
from metasepia.decoding.scheduling import Scheduler
from metasepia.decoding.steps import StepPlan, StepResult
from metasepia.errors import InvalidRequest, UnknownName
from metasepia.rows import HiddenStates, HiddenStatesWanted, Row, Sampling, Scores, TokenChunk
from tests import tiny

DIGEST = "b" * 64
PREPARED = tiny.prepared(DIGEST)
Checkpoint = Callable[[str], Path]


def tokens(length: int, data_seed: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng([data_seed, length]).integers(0, 256, length).tolist())


SHARED = tokens(60, 1)


class Running:
    """A scheduler over a real decoder, its plans, and the answers by request."""

    def __init__(self, directory: Path, *, max_prefix_tokens: int = 100, max_batch_tokens: int = 4096) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(directory).eval().requires_grad_(False)
        self.decoder = RowDecoder(self.model, backbone=DIGEST)
        self.reference = ReferenceBackbone(self.model, DIGEST)
        self.plans: list[StepPlan] = []
        self.answers: dict[str, list[Answer]] = {}
        self.now = 0.0
        limits = Limits(
            max_rows=8,
            max_batch_tokens=max_batch_tokens,
            max_queued_tokens=10**6,
            max_prefix_tokens=max_prefix_tokens,
        )
        self.scheduler = Scheduler(self._run, limits, PREPARED, clock=lambda: self.now)

    def _run(self, plan: StepPlan) -> StepResult:
        self.plans.append(plan)
        return self.decoder.run(plan)

    def ask(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self.answers[row.request_id] = []
            self.scheduler.submit(row, self.answers[row.request_id].append)
        for _ in range(200):
            if not self.scheduler.step():
                return
        raise AssertionError(f"rows are still there: {self.scheduler.load()}")

    @property
    def num_prefixes_read(self) -> int:
        return sum(row.want == "prefix" for plan in self.plans for begin in plan.begin for row in begin.rows)

    def assert_answered_as_by_the_reference(self, row: Row) -> None:
        answer = self.answers[row.request_id][-1]
        if isinstance(answer, HiddenStates):
            want = asyncio.run(self.reference.hidden_states(row)).states
            np.testing.assert_allclose(answer.states, want, atol=1e-4)
        elif isinstance(answer, Scores):
            want = asyncio.run(self.reference.score(row)).logprobs
            np.testing.assert_allclose(answer.logprobs, want, atol=1e-4, rtol=1e-4)
        else:
            chunks = [one for one in self.answers[row.request_id] if isinstance(one, TokenChunk)]
            emitted = [token for chunk in chunks for token in chunk.token_ids]
            assert len(emitted) == row.sampling.max_tokens
            logits = self.reference.logits((*row.token_ids, *emitted))[len(row.token_ids) - 1 : -1]
            chosen = logits[torch.arange(len(emitted)), emitted]
            assert (logits.amax(-1) - chosen <= 1e-4 * logits.abs().amax(-1)).all()


def spans(name: str, shared: int, own: int, **fields: Any) -> Row:
    """A row that begins with `shared` tokens of the prefix and asks for two parts of its own ones."""
    begin = fields.pop("span_begin", shared)
    fields.setdefault("prefix", SHARED)
    return Row(
        request_id=name,
        backbone=DIGEST,
        token_ids=(*fields["prefix"][:shared], *tokens(own, len(name) + shared)),
        want="hidden_states",
        hidden=HiddenStatesWanted(
            layers=(0, -1), pooling="spans", spans=((begin, shared + own), (shared + own - 1, shared + own))
        ),
        **fields,
    )


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_rows_that_share_a_prefix_answer_as_each_would_alone(family: str, tiny_checkpoint: Checkpoint) -> None:
    running = Running(tiny_checkpoint(family))
    rows = [spans(f"s{shared}-{own}", shared, own) for shared, own in [(60, 9), (60, 5), (60, 1), (40, 30), (17, 3)]]
    greedy = Sampling(temperature=0.0, max_tokens=5)
    common = {"backbone": DIGEST, "prefix": SHARED}
    rows += [
        Row(request_id="generated", token_ids=(*SHARED, 7, 8), sampling=greedy, **common),
        Row(request_id="the prefix itself", token_ids=SHARED, sampling=greedy, **common),
        Row(request_id="scored", token_ids=(*SHARED, *tokens(9, 3)), want="logprobs", score_from=30, **common),
        spans("whole", 60, 9, span_begin=3),  # asks for parts of the prefix, so it reads them
        spans("nothing in common", 0, 20),
    ]
    running.ask(rows)
    for row in rows:
        running.assert_answered_as_by_the_reference(row)
    assert running.num_prefixes_read == 1
    load = running.scheduler.load()
    assert load.prefix_tokens == 60
    # At most what each could take; at least that less what shorter rows of a group read again.
    assert 0 < load.reused_tokens <= 60 * 3 + 40 + 17 + 61 + 59 + 29


def test_a_prefix_is_kept_for_later_rows_until_others_need_its_room(tiny_checkpoint: Checkpoint) -> None:
    running = Running(tiny_checkpoint("llama"), max_prefix_tokens=100)
    other, third = tokens(30, 8), tokens(40, 9)
    running.ask([spans("a", 60, 5)])
    running.ask([spans("b", 60, 6)])
    assert running.num_prefixes_read == 1
    running.ask([spans("c", 30, 5, prefix=other)])  # both fit
    running.ask([spans("d", 60, 5)])
    running.ask([spans("e", 40, 5, prefix=third)])  # the other was used before the shared one
    assert running.num_prefixes_read == 3 and running.scheduler.load().prefix_tokens == 100
    assert len(running.decoder._kept) == 2
    running.ask([spans("f", 60, 5), spans("g", 40, 5, prefix=third)])
    assert running.num_prefixes_read == 3
    running.ask([spans("h", 30, 5, prefix=other)])
    assert running.num_prefixes_read == 4 and running.scheduler.load().prefix_tokens <= 100
    for name, row in {"d": spans("d", 60, 5), "h": spans("h", 30, 5, prefix=other)}.items():
        assert row.request_id == name
        running.assert_answered_as_by_the_reference(row)


def test_rows_of_more_prefixes_than_there_is_room_for_are_all_answered(tiny_checkpoint: Checkpoint) -> None:
    running = Running(tiny_checkpoint("llama"), max_prefix_tokens=64)
    rows = [
        spans(f"{seed}-{i}", 50, 4 + i, prefix=tokens(50, seed), deadline_unix_s=1000.0)
        for i in range(3)
        for seed in range(20, 25)
    ]
    running.ask(rows)
    for row in rows:
        running.assert_answered_as_by_the_reference(row)
    assert running.num_prefixes_read == 5  # one after the other, each once
    assert len(running.decoder._kept) == 1


def test_a_row_does_not_wait_for_room_for_ever(tiny_checkpoint: Checkpoint) -> None:
    running = Running(tiny_checkpoint("llama"), max_prefix_tokens=64)
    taking = [spans(f"first {i}", 60, 4) for i in range(2)]
    late = spans("late", 50, 4, prefix=tokens(50, 9))
    for row in (*taking, late):
        running.answers[row.request_id] = []
        running.scheduler.submit(row, running.answers[row.request_id].append)
    running.now = PATIENCE_S + 1
    running.ask([])
    running.assert_answered_as_by_the_reference(late)
    assert running.num_prefixes_read == 1


def test_a_prefix_longer_than_the_bound_is_read_with_its_row(tiny_checkpoint: Checkpoint) -> None:
    running = Running(tiny_checkpoint("llama"), max_prefix_tokens=59)
    running.ask([spans("a", 60, 5)])
    running.assert_answered_as_by_the_reference(spans("a", 60, 5))
    assert running.num_prefixes_read == 0 and running.scheduler.load().reused_tokens == 0


def test_rows_whose_prefix_cannot_be_read_meet_its_error_themselves(tiny_checkpoint: Checkpoint) -> None:
    running = Running(tiny_checkpoint("llama"))
    rows = [spans("unknown expert", 60, 5, adapter=(("e" * 64, 1.0),)), spans("base", 60, 5)]
    running.ask(rows)
    assert isinstance(running.answers["unknown expert"][-1], UnknownName)
    running.assert_answered_as_by_the_reference(rows[1])


def test_rows_after_a_prefix_stay_within_the_bound_of_the_cache(tiny_checkpoint: Checkpoint) -> None:
    running = Running(tiny_checkpoint("llama"), max_batch_tokens=300)
    rows = [spans(f"{i}", 60, 3) for i in range(12)]
    running.ask(rows)
    widest = [
        len(begin.rows) * max(len(row.token_ids) for row in begin.rows)
        for plan in running.plans
        for begin in plan.begin
    ]
    assert max(widest) <= 300 and len(running.answers["11"]) == 1


@pytest.mark.parametrize("bad", [(), ((0, 70),), ((3, 3),), ((-1, 4),)])
def test_parts_that_a_row_does_not_have_are_refused(bad: tuple[tuple[int, int], ...]) -> None:
    limits = Limits(max_rows=1, max_batch_tokens=300, max_queued_tokens=300)
    scheduler = Scheduler(lambda plan: StepResult(step=plan.step), limits, PREPARED)
    wanted = HiddenStatesWanted(pooling="spans", spans=bad)
    row = Row(request_id="a", backbone=DIGEST, token_ids=tokens(69, 0), want="hidden_states", hidden=wanted)
    with pytest.raises(InvalidRequest, match=r"spans: must be parts \[begin, end\) of the 69 tokens"):
        scheduler.submit(row, lambda _: None)
