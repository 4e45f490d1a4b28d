"""What the driver refuses before it starts anything, what it tells a person, and what ASHA compares. No Ray runs."""

import io
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks.sweep_fits import Fits, plan_of
from jobs.progress_bar import Bar
from jobs.sweep_progress import Told
from jobs.sweep_tune import Listener, score_of
from jobs.sweeping import Asha, run_sweep
from metasepia.errors import CannotPlace, InvalidSettings
from metasepia.sweeps.failures import PacksFailed, StorageFailed
from metasepia.sweeps.run import run_pack
from metasepia.sweeps.store import SweepStore

PLAN = plan_of(seeds=4, rates=(0.1,), size=2)
WORK = "benchmarks.sweep_fits:Fits"


def report(pack: int, step: int, **more: Any) -> dict[str, Any]:
    told = {"last": 8, "at_work": True, "finished": False, "problem": "", "fatal": None, "seconds": 0.5}
    return {"pack": pack, "step": step, "stored": step, **told, **more}


@pytest.mark.parametrize(
    "changed, said",
    [
        ({"workers": 0}, "workers = 0"),
        ({"gpus_per_trial": 1.5}, "gpus_per_trial = 1.5"),
        ({"gpus_per_trial": -1.0}, "gpus_per_trial = -1"),
        ({"cpus_per_trial": 0}, "cpus_per_trial = 0"),
        ({"cpus_per_trial": math.nan}, "cpus_per_trial = nan"),
        ({"work": "benchmarks.sweep_fits:Fit"}, "module:Class"),
        ({"asha": Asha(metric="error")}, "packs of one trial"),
    ],
)
def test_what_cannot_be_run_is_refused_before_a_folder_is_made(tmp_path: Path, changed: dict[str, Any], said: str):
    arguments: dict[str, Any] = {"work": WORK, "workers": 2, **changed}
    with pytest.raises(InvalidSettings, match=said):
        run_sweep(PLAN, str(tmp_path / "new"), arguments.pop("work"), **arguments)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("bad", [{"mode": "best"}, {"grace_steps": 0}, {"reduction_factor": 1.0}])
def test_asha_that_makes_no_sense_is_refused(bad: dict[str, Any]):
    with pytest.raises(InvalidSettings, match=f"asha.{next(iter(bad))}"):
        Asha(metric="error", **bad)


def test_no_gpu_where_one_is_asked_is_refused_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("jobs.sweeping._num_gpus", lambda: 0)
    with pytest.raises(CannotPlace, match=r"need 0\.5 GPU \(one trial, on one node\) and the cluster has 0"):
        run_sweep(PLAN, str(tmp_path), WORK, workers=2, gpus_per_trial=0.5, progress=False)


def test_a_finished_sweep_is_written_again_without_a_cluster(tmp_path: Path):
    store = SweepStore.open(str(tmp_path), PLAN)
    for pack in range(2):
        run_pack(Fits, store, pack)
    swept = run_sweep(PLAN, str(tmp_path), WORK, workers=2)  # a unit test cannot start Ray
    assert (swept.num_run, swept.num_packs) == (0, 2) and Path(swept.table).is_file()


def test_progress_says_steps_rate_and_time_left_where_there_is_no_terminal():
    told, out = Told(PLAN, [0, 1]), io.StringIO()
    told._began_s -= 10
    with Bar(told, shown=True, file=out) as bar:
        told.running.add(0)
        told.take(report(0, 0))
        told.take(report(0, 4))
        bar.show(now=True)
    line = out.getvalue().splitlines()[0]
    assert line.startswith(f"sweep {PLAN.digest[:12]}: packs 0/2, 1 running, steps 4/16, 0.4 a second, 0.5 min left")
    with Bar(told, shown=False, file=(silent := io.StringIO())) as bar:
        bar.show(now=True)
    assert not silent.getvalue()


def test_steps_that_were_stored_before_are_no_part_of_the_rate():
    told = Told(PLAN, [1])
    told._began_s -= 10
    told.take(report(1, 6))
    assert told.steps[:2] == (6, 8) and told.steps[2] == 0
    told.take(report(1, 8, finished=True))
    assert told.steps[2] == pytest.approx(0.2, rel=0.05) and told.done == {0, 1}


class Trial:
    def __init__(self, pack: int) -> None:
        self.config, self.max_failures = {"pack": pack}, -1


def test_a_pack_may_die_often_if_it_gets_further_in_between_but_not_in_a_row():
    told = Told(PLAN, [0, 1])
    listener, trial = Listener(told, Bar(told, shown=False), 3), Trial(0)

    def dies() -> None:
        listener.on_trial_recover(0, [], trial)

    for step in (2, 4, 6):
        dies()
        dies()
        assert trial.max_failures == 0, "the next death is the last"
        listener.on_trial_result(0, [], trial, report(0, step - 2, stored=step - 3))
        assert trial.max_failures == 0, "being back where it was is no progress"
        listener.on_trial_result(0, [], trial, report(0, step + 1, stored=step - 3))
        assert trial.max_failures == 0, "nor are steps beyond the last stop, which the next death takes away"
        listener.on_trial_result(0, [], trial, report(0, step))
        assert trial.max_failures == -1
    assert told.num_deaths == 6 and not told.problems
    listener.on_trial_error(0, [], trial)
    assert told.problems == {0: "its process died 1 times in a row at step 6"}


def test_what_asha_compares_is_the_mean_over_all_positions_and_a_diverged_trial_is_worst():
    rows = Fits(PLAN.trials_of(0), "cpu").measure()
    compared = {"metric": "error", "split": "", "mode": "min"}
    assert score_of(rows, compared) == pytest.approx(sum(rows["value"].to_pylist()) / 2)
    work = Fits([{**PLAN.trials[0], "rate": 100.0}], "cpu")
    work.advance(60)
    assert score_of(work.measure(), compared) == math.inf
    assert score_of(work.measure(), {**compared, "mode": "max"}) == -math.inf
    with pytest.raises(InvalidSettings, match=r"asha\.metric"):
        score_of(rows, {**compared, "metric": "accuracy"})
    only = rows.slice(0, 1).set_column(2, "metric", [["diverged"]]).set_column(6, "status", [["diverged"]])
    assert score_of(only, compared) == math.inf, "a diverged trial may have no other row"


@pytest.mark.parametrize("error", [StorageFailed("a/b", "disk full"), PacksFailed("a", ("pack 0: x",), 2)])
def test_errors_cross_processes_whole(error: Exception):
    import copy

    again = copy.copy(error)  # the same protocol (__reduce_ex__) that carries it between processes
    assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))
