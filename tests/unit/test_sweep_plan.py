"""Trials and packs are fixed by index alone."""

import itertools
import json

import pytest

from benchmarks.sweep_fits import plan_of
from metasepia.errors import CorruptArtefact, InvalidSettings
from metasepia.sweeps.plan import SweepPlan, grid, pack


def test_a_grid_turns_the_last_axis_fastest():
    assert grid({"a": [1, 2], "b": ["x", "y", "z"]}) == [
        {"a": a, "b": b} for a, b in itertools.product([1, 2], ["x", "y", "z"])
    ]


@pytest.mark.parametrize(
    "axes, said",
    [
        ({}, "at least one axis"),
        ({"dims": []}, "axis dims = \\[\\]"),
        ({"dims": "48"}, "axis dims = '48'"),
        ({"dims": [4, 8, 4]}, "no value comes twice"),
    ],
)
def test_axes_that_make_no_grid_are_refused_by_name(axes: dict, said: str):
    with pytest.raises(InvalidSettings, match=said):
        grid(axes)


def test_packs_hold_trials_that_agree_in_index_order_and_of_even_size():
    trials = grid({"seed": list(range(17)), "dims": [4, 8]})
    packs = pack(trials, ["dims"], 16)
    assert [len(one) for one in packs] == [8, 8, 9, 9]
    assert all(len({trials[i]["dims"] for i in one}) == 1 for one in packs)
    assert all(list(one) == sorted(one) for one in packs) and list(packs) == sorted(packs)
    assert sorted(itertools.chain(*packs)) == list(range(34))


def test_packing_by_a_field_that_a_trial_lacks_is_refused():
    with pytest.raises(InvalidSettings, match=r"'width'.*trial 0 lacks"):
        pack([{"dims": 4}], ["width"], 4)
    with pytest.raises(InvalidSettings, match="size = 0"):
        pack([{"dims": 4}], ["dims"], 0)


def test_a_plan_comes_back_from_json_with_its_digest():
    plan = plan_of()
    again = SweepPlan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again.digest == plan.digest
    assert again.trials_of(1) == [plan.trials[i] for i in plan.packs[1]]


def test_the_digest_tells_every_part_of_a_plan_apart():
    base = plan_of()
    others = [
        SweepPlan("other", base.settings, base.trials, base.packs),
        SweepPlan(base.kind, {"x": 1}, base.trials, base.packs),
        SweepPlan(base.kind, base.settings, base.trials[::-1], base.packs),
        SweepPlan(base.kind, base.settings, base.trials, base.packs[::-1]),
    ]
    assert len({one.digest for one in [base, *others]}) == 5


@pytest.mark.parametrize(
    "kind, trials, packs, said",
    [
        ("A b", ({},), ((0,),), "kind"),
        ("fits", (), (), "trials = 0"),
        ("fits", ({}, {}), ((0,),), "packs"),
        ("fits", ({}, {}), ((0, 1), (1,)), "packs"),
        ("fits", ({},), ((0,), ()), "packs"),
        ("fits", ({"rate": float("nan")},), ((0,),), "NaN"),
        ("fits", ({"rate": object()},), ((0,),), "JSON"),
    ],
)
def test_a_plan_that_contradicts_itself_is_refused(kind: str, trials: tuple, packs: tuple, said: str):
    with pytest.raises(InvalidSettings, match=said):
        SweepPlan(kind, {}, trials, packs)


@pytest.mark.parametrize("value", [{}, {"kind": "fits"}, {"kind": "a", "settings": 3, "trials": [1], "packs": []}])
def test_json_that_is_no_plan_is_refused(value: dict):
    with pytest.raises(CorruptArtefact, match="plan cannot be used"):
        SweepPlan.from_json(value)
