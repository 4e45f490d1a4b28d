"""Trials, packs and measures of task-diversity sweeps, against the estimators themselves and against training alone."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

from metasepia.diversity.measures import SPLITS, Evaluation, Shared
from metasepia.diversity.profiles import PROFILES, plan_of, trial_of, trials_of, values_of
from metasepia.diversity.trial import DiversityTrial
from metasepia.diversity.work import DiversityPack
from metasepia.errors import InvalidSettings

SMALL: dict[str, Any] = {"dims": 2, "layers": 1, "width": 8, "heads": 2, "num_steps": 24, "batch_size": 4}
MEASURED: dict[str, Any] = {"measured_sequences": 32, "measured_blocks": 4, "num_measures": 2, "learning_rate": 3e-3}


def trial(**changes: Any) -> DiversityTrial:
    return trial_of({**SMALL, "num_tasks": 4, **changes}, MEASURED)


def pack(trials: Sequence[DiversityTrial]) -> DiversityPack:
    return DiversityPack([one.to_json() for one in trials], "cpu")


def measured(work: DiversityPack) -> dict[tuple[Any, ...], float]:
    """By (trial, metric, split, position); the step is the work's."""
    rows = work.measure().to_pylist()
    assert {row["step"] for row in rows} == {work.step}
    return {(row["trial"], row["metric"], row["split"], row["position"]): row["value"] for row in rows}


# -- settings


def test_the_papers_settings_are_the_papers():
    one = trials_of(plan_of("paper", {}))[13]
    assert (one.num_tasks, one.dims, one.points, one.noise_variance) == (2**14, 8, 16, 0.25)
    assert (one.layers, one.width, one.heads, one.batch_size, one.num_steps) == (8, 128, 2, 256, 500_000)
    assert (one.model_seed, one.seeds.data, one.seeds.task, one.seeds.noise) == (100, 101, 102, 103)
    sizes = [one.num_tasks for one in trials_of(plan_of("paper", {}))]
    assert sizes == [*(2**i for i in range(1, 21)), None]
    small = trials_of(plan_of("paper", {"model": ("small",)}))[0]
    assert (small.layers, small.width, small.heads, small.num_steps) == (4, 64, 2, 500_000)


def test_the_laptop_has_one_dimension_eight_pools_and_three_seeds():
    trials = trials_of(plan_of("laptop", {}))
    assert {(one.dims, one.points, one.noise_variance) for one in trials} == {(4, 8, 0.125)}
    sizes = {one.num_tasks for one in trials}
    assert len(sizes) == 8 and {4, None} <= sizes and len({one.seed for one in trials}) == 3


@pytest.mark.parametrize("profile", PROFILES)
def test_packs_hold_models_of_one_shape_and_are_two_at_least(profile: str):
    plan = plan_of(profile, {})
    trials = trials_of(plan)
    assert len(plan.packs) >= 2
    for members in plan.packs:
        one = [trials[i] for i in members]
        assert len({(t.shape, t.dims, t.num_steps, t.batch_size, t.stops, t.noise_variance) for t in one}) == 1


def test_points_and_noise_follow_the_dimension_unless_given():
    plan = plan_of("tiny", {"dims": (4, 8)})
    assert {(t.dims, t.points, t.noise_variance) for t in trials_of(plan)} == {(4, 8, 0.125), (8, 16, 0.25)}
    plan = plan_of("tiny", {"dims": (4, 8), "points": (6,)})
    assert {(t.dims, t.points) for t in trials_of(plan)} == {(4, 6), (8, 6)}


def test_a_sample_is_some_of_the_grid_and_fixed_by_its_seed():
    whole = {str(one) for one in plan_of("tiny", {}).trials}
    some = plan_of("tiny", {}, sample=5, sample_seed=3)
    assert len(some.trials) == 5 and {str(one) for one in some.trials} < whole
    assert some.digest == plan_of("tiny", {}, sample=5, sample_seed=3).digest
    assert some.trials != plan_of("tiny", {}, sample=5, sample_seed=4).trials


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_tasks": 0}, "num_tasks = 0 .* from 1 to 1048576, or inf"),
        ({"num_tasks": 2**21}, "from 1 to 1048576"),
        ({"points": 9, "context": 8}, "at most the context of 8 pairs"),
        ({"noise_variance": -1.0}, "noise_variance = -1.0"),
        ({"noise_variance": math.nan}, "noise_variance = nan"),
        ({"noise_variance": 0.0}, "dMMSE has no meaning"),
        ({"problem": "logistic", "noise_variance": 0.5}, "labels are drawn"),
        ({"width": 9}, "a multiple of the 2 heads"),
        ({"measured_sequences": 30}, "a multiple of the 4 blocks"),
        ({"learning_rate": 0.0}, "above 0"),
        ({"depth": 3}, "depth"),
    ],
)
def test_settings_out_of_range_are_refused_in_words(changes: Mapping[str, Any], said: str):
    with pytest.raises(InvalidSettings, match=said):
        trial(**changes)


@pytest.mark.parametrize(
    ("axis", "text", "said"),
    [
        ("colour", "1", "axis = 'colour' .* one of problem, model"),
        ("num_tasks", "", "axis num_tasks = ''"),
        ("num_tasks", "4,,8", "one or more values"),
        ("dims", "4,x", "a whole number"),
        ("model", "huge", "one of small, base, large"),
    ],
)
def test_axes_that_do_not_parse_are_refused_in_words(axis: str, text: str, said: str):
    with pytest.raises(InvalidSettings, match=said):
        values_of(axis, text)


def test_pools_are_written_as_people_write_them():
    assert values_of("num_tasks", "4, 2^10,2**20,inf") == (4, 1024, 1 << 20, None)
    assert values_of("weight_decay", "0,0.1") == (0.0, 0.1)


def test_it_is_measured_early_evenly_and_at_the_end():
    one = dataclasses.replace(trial(), num_steps=800, num_measures=4)
    assert one.stops == (25, 50, 100, 200, 400, 600, 800)
    assert dataclasses.replace(one, num_steps=1).stops == (1,)


# -- measures


@pytest.mark.parametrize("problem", ["linear", "logistic"])
def test_a_model_that_answers_as_an_estimator_has_its_error_and_no_distance_to_it(problem: str):
    evaluation = Evaluation(trial(problem=problem, measured_sequences=16))
    for split in SPLITS:
        asked = evaluation.problems[split]
        for name, answer in asked.answers.items():
            output = torch.logit(answer, eps=1e-12) if problem == "logistic" else answer
            found = evaluation.figures(asked, output)
            torch.testing.assert_close(found["error"], found[f"{name}_error"], atol=1e-9, rtol=1e-9)
            assert float(found[f"delta_{name}"].max()) < 1e-9
            (other,) = set(asked.answers) - {name}
            torch.testing.assert_close(found[f"delta_{other}"], found["delta_estimators"], atol=1e-9, rtol=1e-9)


def test_figures_are_squares_over_the_dimension():
    evaluation = Evaluation(trial(dims=4))
    asked = evaluation.problems["new"]
    found = evaluation.figures(asked, asked.target + 3.0)
    torch.testing.assert_close(found["error"], torch.full_like(asked.target, 9.0 / 4))


def test_each_estimator_is_best_where_its_prior_is_true():
    """Both are posterior means, so the other's error is its own and their distance (Pythagoras)."""
    evaluation = Evaluation(trial(dims=4, num_tasks=16, measured_sequences=4096))
    for split, best, other in (("pretraining", "dmmse", "ridge"), ("new", "ridge", "dmmse")):
        asked = evaluation.problems[split]
        found = {name: float(one.mean()) for name, one in evaluation.figures(asked, asked.target).items()}
        expected = found[f"{best}_error"] + found["delta_estimators"]
        assert found[f"{other}_error"] == pytest.approx(expected, rel=0.05)


def test_with_a_fresh_task_in_every_sequence_the_estimators_are_one():
    for asked in Evaluation(trial(num_tasks=None)).problems.values():
        first, second = asked.answers.values()
        assert torch.equal(first, second)


def test_new_sequences_are_the_same_for_every_pool_and_shared_within_a_pack():
    shared: Shared = {}
    few, many = (Evaluation(trial(num_tasks=m), shared=shared).problems["new"] for m in (2, 64))
    alone = Evaluation(trial(num_tasks=64)).problems["new"]
    assert torch.equal(few.x, many.x) and torch.equal(few.y, many.y)
    assert torch.equal(many.answers["ridge"], alone.answers["ridge"]) and torch.equal(many.y, alone.y)
    other = Evaluation(trial(num_tasks=64, seed=1), shared=shared).problems["new"]
    assert not torch.equal(other.x, many.x)


def test_between_two_tasks_the_pools_estimator_errs_more_than_at_them():
    evaluation = Evaluation(trial(dims=4, num_tasks=8, measured_sequences=1024))
    error = {
        alpha: {name: float(one.mean()) for name, one in evaluation.figures(asked, asked.target).items()}
        for alpha, asked in evaluation.paths().items()
    }
    assert list(error) == [i / 8 for i in range(9)]
    assert error[0.5]["dmmse_error"] > error[0.5]["ridge_error"]
    assert error[0.5]["dmmse_error"] > 1.5 * max(error[0.0]["dmmse_error"], error[1.0]["dmmse_error"])
    assert error[0.5]["ridge_error"] < 1.2 * max(error[0.0]["ridge_error"], error[1.0]["ridge_error"])


def test_one_task_has_no_way_to_another():
    assert Evaluation(trial(num_tasks=1)).paths() == {}
    assert len(Evaluation(trial(num_tasks=None)).paths()) == 9


# -- packs


def test_a_pack_that_was_stopped_and_restored_measures_the_same():
    trials = [trial(num_tasks=m, seed=s) for s in (0, 1) for m in (1, 4, None)]
    whole, cut = pack(trials), pack(trials)
    whole.advance(24)
    cut.advance(7)
    state = cut.state()
    again = pack(trials)
    again.restore(state)
    again.advance(13)
    again.advance(24)
    assert again.measure().equals(whole.measure())


def test_a_model_in_a_pack_is_measured_as_alone():
    trials = [trial(num_tasks=m, weight_decay=d) for m, d in ((1, 0.0), (4, 0.1), (None, 0.0))]
    together = pack(trials)
    together.advance(24)
    figures = measured(together)
    for i, one in enumerate(trials):
        alone = pack([one])
        alone.advance(24)
        for (_, *key), value in measured(alone).items():
            assert figures[i, *key] == pytest.approx(value, rel=1e-3, abs=1e-6), key


def test_means_over_positions_and_blocks_are_the_mean_over_all():
    work = pack([trial()])
    work.advance(24)
    found = measured(work)
    for split in SPLITS:
        for metric in ("error", "delta_ridge", "delta_dmmse"):
            mean = found[0, metric, split, -1]
            positions = [found[0, metric, split, k] for k in range(4)]
            blocks = [found[0, f"{metric}/block{b:02d}", split, -1] for b in range(4)]
            assert sum(positions) / 4 == pytest.approx(mean) and sum(blocks) / 4 == pytest.approx(mean)


def test_a_model_learns_its_one_task():
    learning = {"num_steps": 200, "batch_size": 16, "width": 16, "learning_rate": 1e-2}
    work = pack([trial_of({**SMALL, "num_tasks": 1, **learning}, {**MEASURED, "learning_rate": 1e-2})])
    work.advance(1)
    before = measured(work)[0, "delta_dmmse", "pretraining", -1]
    work.advance(200)
    assert measured(work)[0, "delta_dmmse", "pretraining", -1] < 0.05 * before


def test_a_model_that_diverges_is_recorded_and_its_neighbours_go_on():
    good = trial(num_tasks=4)
    work = pack([good, trial(num_tasks=4, learning_rate=1e30)])
    work.advance(24)
    rows = work.measure().to_pylist()
    (lost,) = [row for row in rows if row["trial"] == 1]
    assert (lost["metric"], lost["status"]) == ("diverged", "diverged") and 0 < lost["value"] < 24
    mine = [row for row in rows if row["trial"] == 0]
    assert {row["status"] for row in mine} == {"ok"} and all(math.isfinite(row["value"]) for row in mine)


def test_a_model_that_the_last_update_broke_is_recorded():
    """No loss has told, as there is no later one."""
    work = pack([trial(num_tasks=4, num_steps=1, learning_rate=1e30), trial(num_tasks=4, num_steps=1)])
    work.advance(1)
    rows = work.measure().to_pylist()
    (lost,) = [row for row in rows if row["trial"] == 0]
    assert (lost["metric"], lost["status"], lost["value"]) == ("diverged", "diverged", 1.0)
    assert {row["status"] for row in rows if row["trial"] == 1} == {"ok"}


def test_a_pack_of_two_shapes_is_refused():
    with pytest.raises(InvalidSettings, match=r"width = 16 .* 8, as its pack's first"):
        pack([trial(), trial(width=16)])
