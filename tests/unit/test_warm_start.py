"""Warm starts of a few-shot search: what similarities become, that a right one helps and a wrong one is left behind."""

import json
from dataclasses import replace

import numpy as np
import pytest

from metasepia.errors import CorruptArtefact, InvalidRequest
from metasepia.experts.mixing import check_simplex
from metasepia.search.cross_entropy import CrossEntropySearch, Generation, Score, SearchSettings
from metasepia.search.fewshot import Found
from metasepia.search.jobs import Progress, SearchJob, found_json
from metasepia.search.warm_start import Nearness, Start, WarmStartSettings, warm_start
from tests.searches import BASE, LAW, MATHS, a_job

BASES = ("f" * 64,)
EXPERTS = tuple(f"{i:x}" * 64 for i in range(12))
CANDIDATES = (*EXPERTS, *BASES)
SETTINGS = WarmStartSettings()


def near(*experts: int) -> dict[str, float]:
    """Cosines with the task: of these experts' tasks high ones."""
    rng = np.random.default_rng(1)
    return {one: 0.1 + 0.02 * float(rng.normal()) + (0.5 if i in experts else 0) for i, one in enumerate(EXPERTS)}


def landscape(*wanted: int) -> np.ndarray:
    """Half base, half these experts."""
    target = np.zeros(len(CANDIDATES))
    target[-1] = 0.5
    target[list(wanted)] = 0.5 / len(wanted)
    return target


def trace(start: Start | None, target: np.ndarray, seed: int, generations: int = 12) -> list[Generation]:
    """A search whose scores fall with the distance to one mixture."""
    settings = SearchSettings(population=12, elites=4, generations=generations, patience=generations, seed=seed)
    search, told = CrossEntropySearch(CANDIDATES, settings, start=start), []
    while search.stopped is None:
        told.append(search.tell([Score(value=-float(np.abs(one - target).sum())) for one in search.ask()]))
    return told


def bests(start: Start | None, target: np.ndarray, seeds: int = 24) -> np.ndarray:
    """By seed and generation."""
    runs = [trace(start, target, seed) for seed in range(seeds)]
    return np.array([[one.scores[one.best].value for one in run] for run in runs])


def test_the_mean_is_the_bases_share_and_a_softmax_of_standardised_similarities_beside_an_even_part() -> None:
    similarities = {"a" * 64: 0.3, "b" * 64: 0.5, "c" * 64: 0.1}
    settings = WarmStartSettings(temperature=2.0, base=0.4, uniform=0.3)
    start = warm_start(similarities, [*similarities, *BASES], settings, bases=BASES)
    values = np.array([0.3, 0.5, 0.1])
    soft = np.exp((values - values.mean()) / values.std() / 2)
    np.testing.assert_allclose(start.mean[:3], 0.6 * (0.1 + 0.7 * soft / soft.sum()))
    assert start.mean[3] == pytest.approx(0.4) and start.similarities == (0.3, 0.5, 0.1, None)
    assert set(start.std) == {settings.std}


def test_neither_the_scale_of_similarities_nor_the_order_of_candidates_matters() -> None:
    start = warm_start(near(3), CANDIDATES, bases=BASES)
    scaled = warm_start({one: 0.9 + value / 10 for one, value in near(3).items()}, CANDIDATES[::-1], bases=BASES)
    np.testing.assert_allclose(scaled.mean, start.mean, atol=1e-9)


def test_similarities_all_alike_are_no_reason_to_prefer_one() -> None:
    alike = {one: 0.4 + 1e-4 * i for i, one in enumerate(EXPERTS)}
    mean = np.array(warm_start(alike, CANDIDATES, bases=BASES).mean[:-1])
    assert mean.max() / mean.min() < 1.15


def test_an_expert_of_which_nothing_is_known_is_neither_favoured_nor_held_back_and_tried_alone_first() -> None:
    known = {one: value for one, value in near(3).items() if one != EXPERTS[7]}
    start = warm_start(known, CANDIDATES, bases=BASES)
    others = [one for i, one in enumerate(start.mean[:-1]) if i not in (3, 7)]
    assert min(others) <= start.mean[7] < start.mean[3]
    assert start.order[:3] == (12, 7, 3)


def test_the_candidates_are_tried_alone_in_the_order_of_promise_in_half_of_the_places_until_all_were() -> None:
    start = warm_start(near(3, 5), CANDIDATES, bases=BASES)
    search = CrossEntropySearch(CANDIDATES, SearchSettings(population=12), start=start)
    np.testing.assert_allclose(search.ask()[0], start.mean, atol=1e-4)
    assert set(start.order[:3]) == {12, 3, 5} and sorted(start.order) == list(range(13))
    for tried in (start.order[:6], start.order[6:12], start.order[12:], ()):
        alpha = search.ask()
        np.testing.assert_array_equal(alpha[1 : 1 + len(tried)], np.eye(13)[list(tried)])
        search.tell([Score(value=-float(np.square(one - 0.1).sum())) for one in alpha])
        assert search.stopped is None


def test_a_right_start_needs_half_of_the_generations_of_a_uniform_one() -> None:
    target = landscape(3, 5)
    uniform, warm = bests(None, target), bests(warm_start(near(3, 5), CANDIDATES, bases=BASES), target)
    assert (warm[:, 5] >= uniform[:, -1]).mean() > 0.75
    assert warm[:, 5].mean() > uniform[:, -1].mean()


def test_a_wrong_start_is_left_behind() -> None:
    """The experts wanted are said to be the furthest, and the base, that has half of the mean, is not wanted at all."""
    target = np.zeros(len(CANDIDATES))
    target[[3, 5]] = 0.5
    wrong = {**near(8), EXPERTS[3]: -0.2, EXPERTS[5]: -0.2}
    uniform, misled = bests(None, target), bests(warm_start(wrong, CANDIDATES, bases=BASES), target)
    assert misled[:, 0].mean() < -1.4  # how far it began
    assert misled[:, -1].mean() > -0.35 and uniform[:, -1].mean() < -0.1


@pytest.mark.parametrize("per_layer", [False, True])
def test_a_warm_search_killed_after_any_generation_goes_on_to_the_same_bytes(per_layer: bool) -> None:
    start = warm_start(near(3), CANDIDATES, bases=BASES)
    settings = SearchSettings(population=8, generations=4, per_layer=per_layer)
    whole = CrossEntropySearch(CANDIDATES, settings, num_layers=3, start=start)
    past = [whole.to_bytes()]
    while whole.stopped is None:
        for adapter in whole.adapters():
            check_simplex(adapter, 3)
        whole.tell([Score(value=-float(np.square(one).sum())) for one in whole.ask()])
        past.append(whole.to_bytes())
    for state in past:
        resumed = CrossEntropySearch.from_bytes(state)
        assert resumed.start == start
        while resumed.stopped is None:
            resumed.tell([Score(value=-float(np.square(one).sum())) for one in resumed.ask()])
        assert resumed.to_bytes() == past[-1]


def test_a_broken_start_in_a_state_is_refused() -> None:
    search = CrossEntropySearch(CANDIDATES, SearchSettings(), start=warm_start(near(1), CANDIDATES, bases=BASES))
    tree = json.loads(search.to_bytes())
    for change in ({"mean": [1.0]}, {"std": [0.0] * 13}, {"mean": [0.5] * 13}, {"source": None, "mean": None}):
        with pytest.raises(CorruptArtefact):
            CrossEntropySearch.from_bytes(json.dumps({**tree, "start": {**tree["start"], **change}}).encode())


def test_a_start_is_a_part_of_the_jobs_digest_and_a_uniform_one_leaves_it_as_it_was() -> None:
    start = warm_start({MATHS: 0.9, LAW: 0.1}, (MATHS, LAW, BASE), bases=(BASE,))
    uniform, warm = a_job(), a_job(start=start)
    assert "start" not in json.loads(uniform.to_bytes()) and "start" not in json.loads(uniform.begin().to_bytes())
    other = a_job(start=replace(start, std=(0.3, 0.3, 0.3)))
    assert len({uniform.id, warm.id, other.id}) == 3
    assert SearchJob.from_bytes(warm.to_bytes()) == warm and warm.begin().start == start


def test_the_trace_and_the_card_say_where_it_began() -> None:
    start = warm_start({MATHS: 0.9, LAW: 0.1}, (MATHS, LAW, BASE), bases=(BASE,), source="task reviews")
    job = a_job(start=start)
    progress = Progress(job.begin())
    for _ in range(2):
        told = progress.state.tell([Score(value=float(i)) for i in range(12)])
        progress = progress.told(told)
    assert [one.get("start") is not None for one in progress.trace] == [True, False]
    assert Progress.from_bytes(progress.to_bytes()).to_bytes() == progress.to_bytes()
    found = Found(
        adapter=((MATHS, 1.0),), shots={}, held_out={}, best_single=MATHS, stopped="", generations=2, evaluations=24
    )
    said = found_json(found, job, 6)["start"]
    assert said["similarities"] == {"maths": 0.9, "law": 0.1, "base": None}
    assert said["weights"]["maths"] > said["weights"]["law"] and said["source"] == "task reviews"
    assert found_json(found, a_job(), 6)["start"] == "uniform"


def test_of_an_expert_with_several_tasks_the_nearest_counts_and_what_stands_for_nothing_is_left_out() -> None:
    told = Nearness(experts=(("maths", 0.2), ("law", 0.5), ("maths", 0.7), ("gone", 0.9)), source="", settings=SETTINGS)
    start = told.start({"maths": MATHS, "law": LAW}, (MATHS, LAW, BASE), (BASE,))
    assert start.similarities == (0.7, 0.5, None)


@pytest.mark.parametrize(
    ("similarities", "says"),
    [({}, "nothing is known"), ({"9" * 63: 0.5}, "nothing is known"), ({EXPERTS[0]: float("nan")}, "not finite")],
)
def test_a_start_of_which_nothing_is_known_is_refused(similarities: dict[str, float], says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        warm_start(similarities, CANDIDATES, bases=BASES)


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", 0.0), ("base", 1.0), ("uniform", 0.0), ("std", 0.1), ("std", float("nan"))],
)
def test_settings_that_could_not_be_recovered_from_are_refused_by_their_field(field: str, value: float) -> None:
    with pytest.raises(InvalidRequest, match=f"start.{field}"):
        WarmStartSettings(**{field: value})


def test_a_start_for_other_candidates_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="for 13 candidates, not 3"):
        CrossEntropySearch((MATHS, LAW, BASE), SearchSettings(), start=warm_start(near(1), CANDIDATES, bases=BASES))
