import numpy as np
import pytest

from metasepia.embedding import vendi
from metasepia.embedding.vendi import diversity, kernel_of, score, spectrum
from metasepia.errors import InvalidRequest, InvalidSettings

ORDERS = [0.1, 0.5, 1.0, 2.0, np.inf]


def groups(data_seed: int, sizes: tuple[int, ...], spread: float = 0.0, dims: int = 40) -> np.ndarray:
    """Tasks around directions at right angles, so many a direction."""
    rng = np.random.default_rng(data_seed)
    axes = np.linalg.qr(rng.standard_normal((dims, len(sizes))))[0].T
    vectors = np.repeat(axes, sizes, 0) + spread * rng.standard_normal((sum(sizes), dims))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.parametrize("order", ORDERS)
def test_tasks_at_right_angles_count_fully_and_equal_ones_once(order):
    assert diversity(groups(0, (1,) * 7), order=order).score == pytest.approx(7)
    assert diversity(groups(0, (7,)), order=order).score == pytest.approx(1)
    assert diversity(groups(0, (4, 4, 4)), order=order).score == pytest.approx(3)


def test_the_score_of_unequal_groups_is_the_entropy_of_their_shares():
    shares = np.array([6, 3, 1]) / 10
    assert diversity(groups(0, (6, 3, 1))).score == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))
    assert diversity(groups(0, (6, 3, 1)), order=2.0).score == pytest.approx(1 / (shares**2).sum())


def test_the_small_side_has_the_eigenvalues_of_the_large_one():
    wide, tall = groups(0, (3, 2), 0.3), groups(1, (30, 25, 8), 0.3)
    for vectors in (wide, tall):
        whole = np.linalg.eigvalsh(vectors @ vectors.T)[::-1] / len(vectors)
        found = spectrum(vectors)
        np.testing.assert_allclose(found, whole[: len(found)], atol=1e-12)
    assert len(spectrum(tall)) == 40 < len(tall)


@pytest.mark.parametrize("order", ORDERS)
def test_what_a_task_adds_is_the_score_less_that_without_it(order):
    vectors = groups(0, (4, 2, 1), 0.4)
    measured = diversity(vectors, order=order)
    for place in range(len(vectors)):
        without = diversity(np.delete(vectors, place, 0), order=order).score
        assert measured.adds[place] == pytest.approx(measured.score - without, abs=1e-9)


def test_a_near_duplicate_adds_least_and_is_named_with_its_twin():
    vectors = groups(0, (1,) * 9)
    vectors = np.concatenate([vectors, vectors[3:4] + 0.01 * vectors[:1]])
    measured = diversity(vectors)
    assert set(measured.by_adds[:2]) == {3, 9} and measured.twin[9] == 3 and measured.twin[3] == 9
    assert measured.twin_cosine[9] > 0.999


def test_a_large_collection_is_measured_in_closed_form_as_by_leaving_out(monkeypatch):
    vectors = groups(0, (9, 5, 2, 1), 0.3)
    exact = diversity(vectors, order=2.0)
    monkeypatch.setattr(vendi, "MOST_FOR_ANY_ORDER", 3)
    monkeypatch.setattr(vendi, "PARTS", 4)
    large = diversity(vectors, order=1.0)
    np.testing.assert_allclose(large.adds, exact.adds, rtol=1e-4)
    np.testing.assert_array_equal(large.twin, exact.twin)
    assert large.adds_order == 2 and large.score == pytest.approx(score(spectrum(vectors)))


def test_the_order_of_tasks_does_not_matter():
    vectors = groups(0, (4, 2, 1), 0.4)
    order = np.random.default_rng(3).permutation(7)
    one, other = diversity(vectors), diversity(vectors[order])
    assert one.score == pytest.approx(other.score) and one.low == pytest.approx(other.low)
    np.testing.assert_allclose(other.adds, one.adds[order], atol=1e-10)


def test_the_interval_holds_the_mean_over_other_draws():
    axes = groups(0, (1,) * 6, dims=12)
    found = []
    for data_seed in range(40):
        rng = np.random.default_rng(data_seed)
        found.append(diversity(axes[rng.integers(0, 6, 40)] + 0.1 * rng.standard_normal((40, 12))))
    mean = np.mean([one.score for one in found])
    held = np.mean([one.low <= mean <= one.high for one in found])
    assert held >= 0.85 and np.mean([one.high - one.low for one in found]) < 4


def test_cosines_freed_of_noise_are_those_of_the_tasks_without_it():
    signal = groups(0, (5, 5), 0.01, dims=2000)
    noise = np.random.default_rng(1).standard_normal((10, 2000)) * 0.02
    noisy = signal + noise
    reliability = 1 / (1 + (noise**2).sum(1))
    truth, freed = signal @ signal.T, kernel_of(noisy, reliability)
    raw = kernel_of(noisy)
    off = ~np.eye(10, dtype=bool)
    assert np.abs(freed - truth)[off].mean() < np.abs(raw - truth)[off].mean() / 3
    assert diversity(noisy, reliability=reliability).score < diversity(noisy).score - 0.5
    assert np.linalg.eigvalsh(freed)[0] > -1e-9


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(InvalidRequest, match="between 2 and"):
        diversity(np.ones((1, 3)))
    with pytest.raises(InvalidRequest, match="finite"):
        diversity(np.array([[1.0, np.nan], [1.0, 0.0]]))
    with pytest.raises(InvalidRequest, match="no direction"):
        diversity(np.array([[1.0, 0.0], [0.0, 0.0]]))
    with pytest.raises(InvalidSettings, match="above 0"):
        diversity(np.eye(3), order=0.0)
    with pytest.raises(InvalidRequest, match="reliability"):
        diversity(np.eye(3), reliability=np.array([0.5, 0.0, 1.0]))
