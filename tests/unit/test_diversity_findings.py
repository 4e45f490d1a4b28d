"""What is read out of a sweep's table: crossings that were put into it, their intervals, bounds, and the page."""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from metasepia.diversity.crossing import Crossing, crossing_of, first_crossing, move_between
from metasepia.diversity.figures import pictures
from metasepia.diversity.findings import Findings
from metasepia.diversity.measures import PATH_ALPHAS, SPLITS, block_metric, path_metric
from metasepia.diversity.profiles import plan_of, trials_of
from metasepia.diversity.report import page_of
from metasepia.diversity.results import Results
from metasepia.diversity.trial import DiversityTrial
from metasepia.errors import CorruptArtefact
from metasepia.sweeps.store import ROWS

SIZES = (4, 16, 64, 256)


def curves(crosses_at: float, *, seeds: int = 3, blocks: int = 8, spread: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    """Distances to the pool's and to the prior's estimator whose log ratio is log2 M less the crossing, and noise."""
    draw = np.random.default_rng(1)
    log2 = np.log2(np.array(SIZES, dtype=float))[:, None, None]
    seed_noise, block_noise = draw.normal(size=(1, seeds, 1)), draw.normal(size=(1, seeds, blocks))
    under = np.ones((len(SIZES), seeds, blocks))
    return under * np.exp(log2 - crosses_at + spread * (seed_noise + block_noise)), under


# -- crossings


def test_the_crossing_that_was_put_in_is_found_and_lies_in_its_interval():
    over, under = curves(4.6)
    found = crossing_of(over, under, SIZES)
    assert found is not None and found.found and found.changes == 1
    assert found.log2_tasks == pytest.approx(4.6, abs=0.2)
    assert found.low < found.log2_tasks < found.high and found.low < 4.6 < found.high
    assert found.share_found == 1.0
    assert f"M = {2**found.log2_tasks:.3g}" in found.text and "95 % interval" in found.text


def test_without_noise_the_crossing_is_exact_and_its_interval_a_point():
    found = crossing_of(*curves(4.6, spread=0.0), SIZES)
    assert found is not None
    assert (found.low, found.log2_tasks, found.high) == pytest.approx((4.6, 4.6, 4.6))


def test_more_seeds_that_agree_make_the_interval_narrower():
    few, many = (crossing_of(*curves(5.0, seeds=n, spread=0.3), SIZES) for n in (3, 24))
    assert few is not None and many is not None
    assert 0 < many.high - many.low < few.high - few.low


@pytest.mark.parametrize(("crosses_at", "said"), [(1.0, "beyond it at the smallest M already, 4"), (9.5, "256")])
def test_a_crossing_beyond_what_was_run_is_not_invented(crosses_at: float, said: str):
    found = crossing_of(*curves(crosses_at), SIZES)
    assert found is not None and not found.found and math.isinf(found.num_tasks)
    assert found.text.startswith("not crossed") and said in found.text


def test_an_interval_that_reaches_beyond_what_was_run_says_so():
    found = crossing_of(*curves(8.25, spread=0.6), SIZES)
    assert found is not None and found.found and 0.5 < found.share_found < 1.0
    assert "above 256" in found.interval


def test_curves_that_cross_downwards_alone_have_no_crossing():
    assert math.isnan(first_crossing(np.arange(3.0), np.array([1.0, 0.5, -1.0])))
    assert first_crossing(np.arange(4.0), np.array([1.0, -1.0, 1.0, 2.0])) == 1.5
    assert first_crossing(np.arange(2.0), np.array([-math.inf, 1.0])) == 0.5


def test_one_pool_has_no_crossing():
    over, under = curves(4.0)
    assert crossing_of(over[:1], under[:1], SIZES[:1]) is None


def test_a_seed_that_diverged_at_one_size_takes_no_others_with_it():
    over, under = curves(4.6, spread=0.0)
    over[1, 0] = np.nan
    found = crossing_of(over, under, SIZES)
    assert found is not None and found.log2_tasks == pytest.approx(4.6)


def test_a_move_is_paired_and_doubted_where_its_interval_holds_none():
    first, second = (crossing_of(*curves(at, spread=0.4), SIZES) for at in (4.0, 5.0))
    assert first is not None and second is not None
    move = move_between(first, second)
    # The same noise is in both: their difference is known better than either.
    assert move.low == pytest.approx(1.0) and move.high == pytest.approx(1.0)
    assert "up by 1.00 doublings" in move.text
    assert "contains no move" in move_between(first, first).text
    beyond = crossing_of(*curves(9.5), SIZES)
    assert isinstance(beyond, Crossing) and "not crossed" in move_between(first, beyond).text


# -- a table


Figures = Callable[[DiversityTrial, str], Mapping[str, float]]


def table_of(trials: tuple[DiversityTrial, ...], figures: Figures) -> pa.Table:
    """Every metric of every trial, the same at each position, block and step."""
    rows: list[tuple[Any, ...]] = []
    for i, trial in enumerate(trials):
        for split in SPLITS:
            for metric, value in figures(trial, split).items():
                for step in trial.stops:
                    rows.append((i, step, metric, -1, split, value, "ok"))
                    rows += [(i, step, metric, k, split, value, "ok") for k in range(trial.points)]
                blocks = range(trial.measured_blocks)
                rows += [(i, trial.num_steps, block_metric(metric, b), -1, split, value, "ok") for b in blocks]
                if split == "new" and trial.num_tasks != 1:
                    rows += [(i, trial.num_steps, path_metric(metric, a), -1, "", value, "ok") for a in PATH_ALPHAS]
    return pa.table(dict(zip(ROWS.names, map(list, zip(*rows, strict=True)), strict=True)), schema=ROWS)


def crossing_at(where: Callable[[DiversityTrial], float]) -> Figures:
    """Models that are nearer ridge from 2**where tasks on; with few they err twice and a half as much as ridge."""

    def figures(trial: DiversityTrial, split: str) -> Mapping[str, float]:
        beyond = 20.0 if trial.num_tasks is None else math.log2(trial.num_tasks) - where(trial)
        error = 1.0 if beyond <= 0 else 0.45
        return {
            "error": error,
            "ridge_error": 0.4,
            "dmmse_error": 0.9,
            "delta_ridge": 2.0**-beyond,
            "delta_dmmse": 2.0**beyond,
            "delta_estimators": 0.5,
        }

    return figures


def findings_of(axes: Mapping[str, Any], figures: Figures, profile: str = "laptop") -> Findings:
    trials = trials_of(plan_of("tiny", {"num_tasks": (4, 16, 64, 256, None), **axes}))
    return Findings(Results(trials, table_of(trials, figures)), profile)


def test_bounds_that_hold_and_bounds_that_are_missed_are_told_apart():
    held = {claim.id: claim for claim in findings_of({}, crossing_at(lambda _: 5.0)).claims}
    assert held["kept"].value == pytest.approx(2.0**6) and held["lost"].value == pytest.approx(2.5)
    assert held["learnt"].value == pytest.approx(0.45 / 0.4) and held["crossing"].value == pytest.approx(32)
    assert all(claim.holds for claim in held.values())
    missed = {claim.id: claim.holds for claim in findings_of({}, crossing_at(lambda _: 1.0)).claims}
    assert missed == {"kept": False, "lost": False, "learnt": True, "crossing": False}
    strict = {claim.id: claim.holds for claim in findings_of({}, crossing_at(lambda _: 5.0), "paper").claims}
    assert not strict["learnt"]  # 1.125 is within a laptop's bound and beyond the paper's


def test_a_bound_on_models_that_were_not_run_is_neither_held_nor_missed():
    claims = {claim.id: claim.holds for claim in findings_of({"num_tasks": (8, 64)}, crossing_at(lambda _: 5.0)).claims}
    assert claims == {"kept": None, "lost": None, "learnt": None, "crossing": True}


def test_the_crossing_moves_with_the_dimension_and_points_follow_it():
    findings = findings_of({"dims": (2, 4)}, crossing_at(lambda trial: trial.dims + 1.0))
    assert findings.results.axes == {"dims": [2, 4]}
    assert findings.results.followers("dims") == ("points", "noise_variance")
    assert [group.label for group in findings.results.groups] == ["dimension 2", "dimension 4"]
    (moved,) = [one for one in findings.moves if one.split == "new"]
    assert moved.move.log2_difference == pytest.approx(2.0)
    assert {claim.id: claim.holds for claim in findings.claims}["dimension"]


def test_two_axes_move_the_crossing_each_with_the_other_held():
    moves = findings_of(
        {"dims": (2, 4), "weight_decay": (0.0, 0.1)}, crossing_at(lambda t: t.dims + 1.0 - 10 * t.weight_decay)
    ).moves
    told = {(m.axis, m.rest): m.move.log2_difference for m in moves if m.split == "new"}
    assert told == pytest.approx(
        {
            ("dims", "weight decay 0"): 2.0,
            ("dims", "weight decay 0.1"): 2.0,
            ("weight_decay", "dimension 2"): -1.0,
            ("weight_decay", "dimension 4"): -1.0,
        }
    )


def test_the_papers_criterion_needs_two_budgets_and_finds_where_more_training_helps():
    def figures(trial: DiversityTrial, split: str) -> Mapping[str, float]:
        made = dict(crossing_at(lambda _: 5.0)(trial, split))
        log2 = 20.0 if trial.num_tasks is None else math.log2(trial.num_tasks)
        longer = math.log2(trial.num_steps / 60)
        return {**made, "delta_ridge": 0.1 * 2 ** (longer * (6.0 - log2))}

    assert findings_of({}, figures).by_budget == []
    (found,) = findings_of({"num_steps": (60, 120)}, figures).by_budget
    assert (found.axis, found.values) == ("num_steps", (60, 120))
    assert found.crossing.log2_tasks == pytest.approx(6.0)


def test_trials_that_diverged_or_stopped_are_in_no_mean():
    trials = trials_of(plan_of("tiny", {"num_tasks": (4, 16)}))
    figures = crossing_at(lambda _: 3.0)
    rows = table_of(trials, lambda t, s: {**figures(t, s), "error": 1.0 + t.seed}).to_pylist()
    of = {(trial.num_tasks, trial.seed): i for i, trial in enumerate(trials)}
    rows = [row for row in rows if row["trial"] != of[4, 1]]
    lost = {"trial": of[4, 1], "step": 60, "metric": "diverged", "position": -1, "split": "", "value": 9.0}
    rows = [row for row in rows if not (row["trial"] == of[16, 0] and row["step"] == 60)]
    (group,) = Results(trials, pa.Table.from_pylist([*rows, {**lost, "status": "diverged"}], schema=ROWS)).groups
    assert group.mean("error", "new", 4) == 1.0 and group.mean("error", "new", 16) == 2.0
    assert group.results.diverged == {of[4, 1]: 9} and group.results.unfinished == {of[16, 0]}


def test_a_table_of_other_trials_is_refused():
    trials = trials_of(plan_of("tiny", {}))
    with pytest.raises(CorruptArtefact, match="beyond the sweep's 1"):
        Results(trials[:1], table_of(trials, crossing_at(lambda _: 3.0)))


# -- the page


def test_the_page_stands_alone_and_says_what_was_found():
    findings = findings_of({"dims": (2, 4)}, crossing_at(lambda trial: trial.dims + 1.0))
    drawn = pictures(findings)
    assert {one.name for one in drawn} == {
        *(f"{name}-{g}" for name in ("tasks", "training", "positions", "path") for g in (0, 1)),
        "movement",
    }
    html = page_of(findings, drawn, command="python -m it --out OUT", digest="d" * 64).html()
    assert not re.search(r"https?://|<script|<link|src=\"(?!data:image/png;base64,)", html)
    assert html.count("<img ") == len(drawn) == len(re.findall(r'<img alt="[^"]{40,}"', html))
    for said in (
        "python -m it --out OUT",
        "d" * 64,
        "M = 8 (2^3.00; 95 % interval 8 to 8)",
        "dimension from 2 to 4, new tasks: up by 2.00 doublings of M",
        "points and noise variance go with it",
        "this sweep has one: give --steps or --batch-size two values",
    ):
        assert said in html, said


def test_a_sweep_that_crossed_nowhere_says_so_and_draws_the_same_bytes_again():
    findings = findings_of({"num_tasks": (4, 16)}, crossing_at(lambda _: 12.0))
    drawn = pictures(findings)
    html = page_of(findings, drawn, command="c", digest="d").html()
    assert "not crossed, not yet at the largest M, 16" in html
    assert page_of(findings, pictures(findings), command="c", digest="d").html() == html


def test_one_trial_alone_has_a_page():
    trials = trials_of(plan_of("tiny", {"num_tasks": (1,), "seed": (0,)}))
    findings = Findings(Results(trials, table_of(trials, crossing_at(lambda _: 5.0))), "tiny")
    drawn = pictures(findings)
    assert {one.name for one in drawn} == {"tasks-0", "training-0", "positions-0"}
    assert "A crossing needs two numbers of tasks" in page_of(findings, drawn, command="c", digest="d").html()


def test_a_sweep_whose_trials_all_diverged_has_a_page():
    trials = trials_of(plan_of("tiny", {"num_tasks": (4, 16), "seed": (0,)}))
    rows = [
        {"trial": i, "step": 60, "metric": "diverged", "position": -1, "split": "", "value": 3.0, "status": "diverged"}
        for i in range(2)
    ]
    findings = Findings(Results(trials, pa.Table.from_pylist(rows, schema=ROWS)), "tiny")
    assert pictures(findings) == []
    html = page_of(findings, [], command="c", digest="d").html()
    assert "2 trials diverged" in html and "M = 16 seed 0 at step 3" in html


def test_logistic_sweeps_are_told_in_their_own_estimators():
    def figures(trial: DiversityTrial, split: str) -> Mapping[str, float]:
        words = {"ridge": "gaussian", "dmmse": "discrete"}
        made = crossing_at(lambda _: 5.0)(trial, split)
        named = {re.sub("ridge|dmmse", lambda found: words[found[0]], name): value for name, value in made.items()}
        losses = {"log_loss": 0.7, "discrete_log_loss": 0.6, "gaussian_log_loss": 0.625}
        return {**named, **losses, "gaussian_standard_error": 0.0078}

    findings = findings_of({"problem": ("logistic",)}, figures)
    assert findings.claims == []
    html = page_of(findings, [], command="c", digest="d").html()
    assert "nearer the Gaussian posterior than the pool" in html and "ridge than" not in html
    assert "Log loss in nats" in html and "0.625" in html
    assert "The Gaussian posterior is sampled: the standard error of its probabilities is 0.0078" in html
    assert findings.results.groups[0].first.scale == 10.0
