import json

import numpy as np
import pytest

from metasepia.errors import CorruptArtefact, InvalidRequest
from metasepia.experts.mixing import check_simplex
from metasepia.rows import Adapter
from metasepia.search.cross_entropy import CrossEntropySearch, Generation, Score, SearchSettings, to_simplex

CANDIDATES = ("a" * 64, "b" * 64, "c" * 64, "d" * 64)
TARGET = np.array([0.6, 0.0, 0.4, 0.0])


def a_search(**settings: object) -> CrossEntropySearch:
    num_layers = 3 if settings.get("per_layer") else 1
    made = SearchSettings(**({"population": 24, "generations": 30} | settings))  # pyright: ignore[reportArgumentType]
    return CrossEntropySearch(CANDIDATES, made, num_layers=num_layers)


def by_distance(search: CrossEntropySearch) -> list[Score]:
    """Minus the distance to a known mixture: a search has to find it."""
    alpha = search.ask()
    target = TARGET[:, None] if alpha.ndim == 3 else TARGET
    return [Score(value=-float(np.abs(one - target).mean())) for one in alpha]


def run(search: CrossEntropySearch) -> list[Generation]:
    trace = []
    while search.stopped is None:
        trace.append(search.tell(by_distance(search)))
    return trace


def weights(adapter: Adapter) -> np.ndarray:
    return np.array([np.mean(dict(adapter).get(digest, 0.0)) for digest in CANDIDATES])


@pytest.mark.parametrize("per_layer", [False, True])
def test_a_search_finds_a_mixture_that_is_known(per_layer: bool) -> None:
    search = a_search(population=64, elites=10, patience=30, per_layer=per_layer)
    run(search)
    np.testing.assert_allclose(weights(search.incumbent), TARGET, atol=0.06)


@pytest.mark.parametrize("per_layer", [False, True])
def test_every_mixture_asked_for_lies_on_the_simplex_of_each_layer(per_layer: bool) -> None:
    search = a_search(per_layer=per_layer)
    for _ in range(3):
        assert search.ask().shape == ((24, 4, 3) if per_layer else (24, 4))
        for adapter in search.adapters():
            check_simplex(adapter, 3)
        search.tell(by_distance(search))


def test_a_point_is_projected_to_the_nearest_of_the_simplex() -> None:
    rng = np.random.default_rng(0)
    points = rng.normal(size=(5, 4, 2))
    projected = to_simplex(points)
    np.testing.assert_allclose(projected.sum(1), 1)
    grid = rng.dirichlet([0.3] * 4, size=20_000)
    for i, layer in np.ndindex(5, 2):
        nearest = np.square(grid - points[i, :, layer]).sum(1).min()
        assert np.square(projected[i, :, layer] - points[i, :, layer]).sum() <= nearest + 1e-9


def test_the_first_generation_holds_equal_weights_and_then_each_candidate_alone() -> None:
    alpha = a_search().ask()
    np.testing.assert_array_equal(alpha[0], [0.25] * 4)
    np.testing.assert_array_equal(alpha[1:5], np.eye(4))


def test_the_best_so_far_is_in_slot_0_of_the_next_generation() -> None:
    search = a_search()
    for _ in range(4):
        alpha, scores = search.ask(), by_distance(search)
        best = max(range(len(scores)), key=lambda i: (scores[i].rounded, -i))
        search.tell(scores)
        np.testing.assert_array_equal(search.ask()[0], alpha[best])


def test_the_best_never_becomes_worse() -> None:
    values = [generation.scores[generation.best] for generation in run(a_search())]
    assert values == sorted(values)


def test_among_equal_scores_the_likelier_answers_win_and_then_the_earlier_place() -> None:
    search = a_search(population=4, elites=1)
    told = search.tell([Score(value=1.0, likelihood=one) for one in (-2.0, -1.0, -1.0, -3.0)])
    assert told.best == 1


@pytest.mark.parametrize("per_layer", [False, True])
def test_a_search_killed_after_any_generation_goes_on_to_the_same_bytes(per_layer: bool) -> None:
    whole = a_search(per_layer=per_layer, patience=3)
    past = [whole.to_bytes()]
    trace = []
    while whole.stopped is None:
        trace.append(whole.tell(by_distance(whole)))
        past.append(whole.to_bytes())
    assert len(past) > 4
    for killed_after, state in enumerate(past):
        resumed = CrossEntropySearch.from_bytes(state)
        resumed.ask()  # asked for and never told: the process died meanwhile
        resumed = CrossEntropySearch.from_bytes(resumed.to_bytes())
        assert run(resumed) == trace[killed_after:]
        assert resumed.to_bytes() == past[-1]


def test_the_order_of_the_candidates_does_not_matter_but_the_seed_does() -> None:
    settings = SearchSettings(population=8)
    one = CrossEntropySearch(CANDIDATES, settings)
    other = CrossEntropySearch(CANDIDATES[::-1], settings)
    assert one.adapters() == other.adapters()
    assert one.adapters() != CrossEntropySearch(CANDIDATES, SearchSettings(population=8, seed=1)).adapters()


def test_differences_below_the_rounding_do_not_change_the_way() -> None:
    one, other = a_search(), a_search()
    for _ in range(3):
        scores = [score.rounded for score in by_distance(one)]
        one.tell(scores)
        other.tell([Score(value=score.value + 1e-5) for score in scores])
    assert one.to_bytes() == other.to_bytes()


def test_it_stops_when_nothing_improves() -> None:
    search = a_search(patience=3)
    trace = []
    while search.stopped is None:
        trace.append(search.tell([Score(value=0.5)] * 24))
    assert (search.stopped, len(trace)) == ("no improvement", 4)
    assert [one.improved for one in trace] == [True, False, False, False]


def test_it_stops_at_a_perfect_score_once_the_weights_agree() -> None:
    search = CrossEntropySearch(CANDIDATES, SearchSettings(population=8, elites=1), perfect=1.0)
    search.tell([Score(value=float(i == 1)) for i in range(8)])
    assert search.stopped == "perfect"
    spread = CrossEntropySearch(CANDIDATES, SearchSettings(population=8, elites=4), perfect=1.0)
    spread.tell([Score(value=1.0)] * 8)
    assert spread.stopped is None


def test_it_stops_at_its_budgets() -> None:
    generations = a_search(generations=2)
    run(generations)
    assert (generations.stopped, generations.generation) == ("generations", 2)
    evaluations = a_search(max_evaluations=50)
    run(evaluations)
    assert (evaluations.stopped, evaluations.evaluations) == ("evaluations", 48)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_score_that_is_no_number_is_refused(value: float) -> None:
    search = a_search()
    before = search.to_bytes()
    with pytest.raises(ValueError, match="must be finite"):
        search.tell([Score(value=value)] * 24)
    assert search.to_bytes() == before


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"population": 1}, "population: must lie from 2"),
        ({"elites": 33}, "elites: must lie from 1 to 32"),
        ({"generations": 0}, "generations: must lie"),
        ({"min_std": float("nan")}, "min_std: must lie"),
        ({"max_evaluations": 31}, "max_evaluations: must lie from 32"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, object], problem: str) -> None:
    with pytest.raises(InvalidRequest, match=problem):
        SearchSettings(**changes)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("candidates", [(), ("a" * 64,), ("a" * 64, "a" * 64)])
def test_fewer_than_two_candidates_are_refused(candidates: tuple[str, ...]) -> None:
    with pytest.raises(InvalidRequest, match="two different candidates"):
        CrossEntropySearch(candidates, SearchSettings())


@pytest.mark.parametrize("field", ["format", "mean", "generator", "settings", "generation"])
def test_a_state_that_is_damaged_is_refused(field: str) -> None:
    tree = json.loads(a_search().to_bytes())
    tree[field] = [1]
    with pytest.raises(CorruptArtefact, match="cannot be read"):
        CrossEntropySearch.from_bytes(json.dumps(tree).encode())
