"""benchmarks.contexts: its slow sides say what the fast ones say, and a difference ends the run."""

from argparse import Namespace

import numpy as np
import pytest

from benchmarks import contexts
from metasepia.reasoning.module import ModuleShape, ReasoningModule
from metasepia.synthetic.tasks import ProbabilisticLogisticRegression, Seeds

SHAPE = ModuleShape(dims=4, pairs=17, layers=2, width=32, heads=4)


def test_a_whole_forward_without_a_y_token_equals_the_module_and_the_compiled_answer():
    module = ReasoningModule(SHAPE, seed=1).requires_grad_(False)
    batch = ProbabilisticLogisticRegression(dims=4).batch(Seeds(), 0, num_sequences=1, num_pairs=10)
    slow = contexts.whole_forward(module, batch.x[0, :9], batch.y[0, :9], batch.x[0, 9])
    assert slow == pytest.approx(float(module(batch.x, batch.y)[0, 9]), abs=1e-5)
    (row,) = module.compile_rows([batch.x[0, :9]], [batch.y[0, :9]])
    assert slow == pytest.approx(float(module.answer([row], [batch.x[0, 9:]])[0]), abs=1e-5)


@pytest.mark.parametrize("wrong", [2e-4, float("nan")])
def test_a_difference_beyond_the_tolerance_ends_the_run(wrong: float):
    assert contexts.check([0.5, 0.5], [0.5, 0.50005], "answers") == pytest.approx(5e-5)
    with pytest.raises(SystemExit, match=r"answers differ by .*; nothing here counts"):
        contexts.check([0.5, 0.5], [0.5, 0.5 + wrong], "answers")


def test_a_share_of_the_work_counts_by_its_scale(monkeypatch: pytest.MonkeyPatch):
    walls, cpus = iter([0.0, 2.0, 5.0, 6.0]), iter([0.0, 1.0, 1.0, 2.0])
    monkeypatch.setattr(contexts.time, "perf_counter", lambda: next(walls))
    monkeypatch.setattr(contexts.time, "process_time", lambda: next(cpus))
    share, whole = contexts.Clock(), contexts.Clock()
    assert share.time(lambda: "said", scale=10.0) == "said"
    whole.time(lambda: None)
    assert (share.wall_s, share.cpu_s, whole.wall_s) == ([20.0], [10.0], [1.0])
    assert share.plus(whole).median_s == 21.0
    assert share.times_slower(whole) == "by processor time 10 times"


def test_tenants_asked_at_once_and_in_turn_agree_and_are_counted(monkeypatch: pytest.MonkeyPatch):
    module = ReasoningModule(SHAPE, seed=1).eval().requires_grad_(False)
    loaded = contexts.LoadedModule("small", "0" * 64, module, {})
    monkeypatch.setattr(contexts, "ENCODER_WIDTH", 24)
    monkeypatch.setattr(contexts, "NUM_TENANTS", 3)
    row = contexts._tenants_row(
        Namespace(rounds=1, threads=1), "tenants", loaded, contexts.PAPERS_REDUCTION, "a module"
    )
    assert row.against and row.ratio == pytest.approx(row.ours / row.against)
    assert row.unit == "queries/s" and np.isfinite(row.ours)
