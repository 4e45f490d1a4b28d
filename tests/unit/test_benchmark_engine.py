"""What benchmarks.engine measures, on a tiny model: both sides answer alike, and a wrong answer stops it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks import engine
from metasepia.experts.svf import attach
from tests import tiny


@pytest.fixture(scope="module")
def subject(tiny_checkpoint: Callable[[str], Path]) -> engine.Subject:
    prepared = tiny.prepared()
    plain, mine = (
        AutoModelForCausalLM.from_pretrained(tiny_checkpoint("llama")).eval().requires_grad_(False) for _ in range(2)
    )
    return engine.Subject(prepared, plain, mine, attach(mine, backbone=prepared.digest))


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"PROMPT_LEN": 8, "ANSWER_LEN": 6, "NUM_ROWS": 3, "SHORTEST": 2, "LONGEST": 12}.items():
        monkeypatch.setattr(engine, name, value)
    monkeypatch.setattr(engine, "generate_batch", lambda *_: None)


def test_a_batch_is_timed_on_both_sides_and_judged(subject: engine.Subject) -> None:
    row = engine.batch(subject, rounds=1)
    assert row.id == "engine-batch" and row.ratio is not None and row.ratio > 0
    assert "of the tokens equal" in row.note


def test_arrivals_are_offered_faster_until_the_percentile_is_worse(subject: engine.Subject) -> None:
    row = engine.arrivals(subject, 8)
    tried = row.extra["tried"]
    assert isinstance(tried, list) and isinstance(row.extra["p99_s"], float)
    factors = [factor for factor, _, _ in tried]
    assert factors == sorted(factors) and all(p99 <= row.extra["p99_s"] for _, _, p99 in tried[:-1])


def test_an_answer_that_the_plain_model_would_not_give_stops_the_run(subject: engine.Subject) -> None:
    asked = subject.asked(0, 0, [(5, 4)])
    right, _ = engine.generate(subject, asked)
    wrong = [[(right[0][0] + 1) % 200, *right[0][1:]]]
    assert engine.judge(subject, asked, right, right) == (pytest.approx(0.0, abs=1e-4), 1.0)
    with pytest.raises(SystemExit, match="do not do the same"):
        engine.judge(subject, asked, wrong, right)


def test_a_static_batch_gives_each_row_what_it_would_get_alone(subject: engine.Subject) -> None:
    asked = subject.asked(0, 1, [(3, 4), (9, 2), (5, 6)])
    together, at_s = engine.generate(subject, asked)
    assert together == [engine.generate(subject, [one])[0][0] for one in asked]
    assert len(at_s) == 6 and at_s == sorted(at_s)


def test_other_rates_keep_the_order_and_the_shape_of_arrivals(subject: engine.Subject) -> None:
    asked = subject.asked(20, 0)
    slow, fast = engine.arriving(asked, 1.0), engine.arriving(asked, 4.0)
    assert [one.arrives_s for one in slow] == pytest.approx([4 * one.arrives_s for one in fast])
    assert torch.tensor([one.arrives_s for one in slow]).diff().min() > 0


def test_loads_are_raised_until_two_in_a_row_bring_no_more():
    assert not engine.saturated([58.0, 70.0, 88.0])
    assert not engine.saturated([100.0, 101.0, 104.0])
    assert engine.saturated([58.0, 136.0, 120.0, 134.0])
