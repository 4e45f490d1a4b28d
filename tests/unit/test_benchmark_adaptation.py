"""What the quality benchmark rests on: its intervals, and runs that are made once."""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks import adaptation, adaptation_runs
from benchmarks.adaptation_runs import Outcome, Plan, Runs, gain_over
from jobs.tasks import make
from jobs.workbench import Workbench


def outcomes(rates: list[float], count: int = 200, data_seed: int = 0, group_size: int = 1) -> list[Outcome]:
    """Runs that are right at these rates, by chance."""
    rng = np.random.default_rng(data_seed)
    groups = [str(i // group_size) for i in range(count)]
    right = [np.repeat(rng.random(count // group_size) < rate, group_size).tolist() for rate in rates]
    return [Outcome(right={"exact": one}, groups=groups) for one in right]


def test_the_gain_is_the_difference_of_means_and_its_interval_covers_it_and_shrinks_with_questions() -> None:
    widths = []
    for count in (100, 400):
        ours, base = outcomes([0.8, 0.8, 0.8], count, 1), outcomes([0.5], count, 2)
        gain, low, high = gain_over(ours, base)
        assert gain == pytest.approx(np.mean([one.accuracy() for one in ours]) - base[0].accuracy())
        assert low < gain < high and low > 0
        widths.append(high - low)
    assert widths[0] / widths[1] == pytest.approx(2, rel=0.25)


def test_a_gain_over_itself_is_nothing_at_all() -> None:
    same = outcomes([0.6], data_seed=3)
    assert gain_over(same, same) == (0, 0, 0)


def test_questions_of_one_group_widen_the_interval_and_so_do_seeds_that_disagree() -> None:
    def width(ours: list[Outcome], base: list[Outcome]) -> float:
        _, low, high = gain_over(ours, base)
        return high - low

    alone, grouped = ((outcomes([0.7], 400, 1, size), outcomes([0.4], 400, 2, size)) for size in (1, 20))
    assert width(*grouped) > 2 * width(*alone)
    agreed, split = (outcomes(rates, 400, 1) for rates in ([0.7, 0.7, 0.7], [0.5, 0.7, 0.9]))
    assert width(split, alone[1]) > 2 * width(agreed, alone[1])


@pytest.fixture
def runs(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> Runs:
    """A tiny model and a set of words of two kinds."""
    texts, labels = [f"{'ab'[i % 2] * 3}{i}" for i in range(60)], ["x", "y"] * 30
    splits = ["train"] * 30 + ["dev"] * 10 + ["test"] * 20
    pq.write_table(pa.table({"text": texts, "label": labels, "split": splits}), tmp_path / "words.parquet")
    bench = Workbench.open(str(tiny_checkpoint("llama")), tmp_path / "home")
    return Runs(tmp_path / "runs", bench, {"words": make("classify", tmp_path / "words.parquet")}, 20)


def test_a_run_is_trained_once_and_then_read_and_another_plan_is_another_run(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Plan(task="words", steps=2, batch=4, first_block=1)
    trained, base = runs.expert(plan), runs.base("words")
    assert trained.parameters == 3 * 48 and len(trained.right["exact"]) == len(base.right["choice"]) == 20
    assert trained.adapter is not None
    monkeypatch.setattr(adaptation_runs, "train", None)
    again = runs.expert(plan)
    assert again.right == trained.right and again.adapter is not None
    assert again.adapter.digest == trained.adapter.digest
    with pytest.raises(TypeError, match="not callable"):
        runs.expert(Plan(task="words", steps=2, batch=4, first_block=1, seed=1))


def test_parts_give_a_row_a_measure_with_every_seed_in_it(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adaptation, "TRAINED", ("words",))
    options = Namespace(seeds=2, steps=1, batch=2, first_block=1)
    rows = [*adaptation.experts(runs, options), *adaptation.lora(runs, options)]
    assert [row.id for row in rows] == ["expert-words", "expert-words-choice", "lora-words", "lora-words-choice"]
    assert [row.detail for row in rows] == [False, True] * 2
    for row in rows:
        assert row.extra["gain"] == pytest.approx(row.ours - (row.against or 0), abs=1e-9)
        assert len(row.extra["seeds"]) == 2  # pyright: ignore[reportArgumentType]
    assert "144 parameters against" in rows[2].note
