import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score, silhouette_score

from metasepia.clustering import (
    Centroids,
    Resamples,
    adjusted_rand,
    adjusted_rand_across,
    clusters,
    kmeans,
    nmi,
    scores,
    shuffled,
    silhouette,
    silhouettes,
    squared_distances,
)
from metasepia.errors import InvalidSettings


def blobs(data_seed: int, *, sizes: tuple[int, ...] = (30, 20, 25), dims: int = 8, apart: float = 20.0):
    """States around a centre for each task, `apart` standard deviations from the origin on its axis, and the tasks."""
    rng = np.random.default_rng(data_seed)
    labels = np.repeat(np.arange(len(sizes)), sizes)
    states = rng.standard_normal((len(labels), dims)) + apart * np.eye(len(sizes), dims)[labels]
    order = rng.permutation(len(labels))
    return states[order].astype(np.float32), labels[order]


def random_partitions(data_seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(data_seed)
    count = int(rng.integers(2, 60))
    return rng.integers(0, rng.integers(1, 8), count), rng.integers(0, rng.integers(1, 8), count)


def test_kmeans_finds_tasks_that_lie_apart():
    states, labels = blobs(0)
    assert adjusted_rand(kmeans(states, 3, seed=0), labels) == 1.0


def test_clusters_are_numbered_in_order_of_first_appearance():
    states, _ = blobs(1)
    found = kmeans(states, 3, seed=5)
    assert [int(one) for one in dict.fromkeys(found.tolist())] == [0, 1, 2]


def test_kmeans_is_tighter_than_every_single_point_moved_elsewhere():
    states, _ = blobs(2, apart=1.5)
    found = clusters(states, 3, seed=0)
    own = squared_distances(states, found.centres)
    assert (own.argmin(1) == found.assignment).all()
    np.testing.assert_allclose(
        found.centres, [states[found.assignment == i].astype(np.float64).mean(0) for i in range(3)], rtol=1e-12
    )


@pytest.mark.parametrize("value", [0.0, 0.1, -3e4])
def test_constant_states_are_one_cluster_with_ari_0_and_no_warning(value: float):
    states = np.full((40, 5), value, np.float32)
    labels = [f"task {i % 4}" for i in range(40)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = scores(states, labels, seed=0)
    assert found["clusters"] == 1
    assert found["ari"] == found["nmi"] == found["silhouette"] == found["silhouette_clusters"] == 0
    assert found["ari_shuffled"] == found["ari_shuffled_sd"] == 0


def test_rounding_of_a_constant_is_no_cluster_but_a_small_signal_is():
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 2
    constant = np.full((60, 4), 7.3, np.float32)
    rounded = np.nextafter(constant, rng.choice([-np.inf, np.inf], constant.shape)).astype(np.float32)
    assert kmeans(rounded, 2, seed=0).max() == 0
    beside_a_huge_dimension = np.column_stack([np.full(60, 1e6), 1e-3 * labels + 1e-5 * rng.standard_normal(60)])
    assert adjusted_rand(kmeans(beside_a_huge_dimension, 2, seed=0), labels) == 1


def test_no_more_distinct_states_than_clusters_get_one_cluster_each_without_a_warning():
    rng = np.random.default_rng(3)
    kinds = rng.integers(0, 3, 50)
    states = rng.standard_normal((3, 6))[kinds]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = clusters(states, 7, seed=0)
    assert adjusted_rand(found.assignment, kinds) == 1
    assert len(found.centres) == 3


def test_one_state_and_one_cluster_are_answered():
    assert kmeans(np.ones((1, 2)), 4, seed=0).tolist() == [0]
    assert kmeans(blobs(0)[0], 1, seed=0).max() == 0


def test_clusters_follow_the_states_when_these_are_moved_scaled_and_permuted():
    states, _ = blobs(4, apart=6.0)
    order = np.random.default_rng(0).permutation(len(states))
    found = kmeans(states, 3, seed=0)
    assert adjusted_rand(kmeans(1e-150 * states.astype(np.float64), 3, seed=0), found) == 1
    assert adjusted_rand(kmeans(1e3 + states[order], 3, seed=9), found[order]) == 1


def test_the_same_seed_gives_the_same_clusters_whatever_the_number_of_threads():
    script = (
        "import numpy as np, hashlib; from metasepia.clustering import clusters, silhouettes\n"
        "states = np.random.default_rng(0).standard_normal((3000, 16)).astype(np.float32)\n"
        "found = clusters(states, 7, seed=1, restarts=2)\n"
        "s = silhouettes(states[:600], found.assignment[:600])\n"
        "print(hashlib.sha256(found.assignment.tobytes() + found.centres.tobytes() + s.tobytes()).hexdigest())"
    )
    outputs = set()
    for threads in ("1", "4"):
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads}
        outputs.add(
            subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, check=True).stdout
        )
    assert len(outputs) == 1
    assert len(outputs.pop()) == 65


@pytest.mark.parametrize("data_seed", range(40))
def test_ari_and_nmi_are_scikit_learns(data_seed: int):
    a, b = random_partitions(data_seed)
    assert adjusted_rand(a, b) == pytest.approx(adjusted_rand_score(a, b), abs=1e-12)
    assert nmi(a, b) == pytest.approx(normalized_mutual_info_score(a, b), abs=1e-12)


def test_partitions_may_be_named_anyhow():
    assert adjusted_rand(["x", "y", "x"], [7, -1, 7]) == nmi(["x", "y", "x"], [7, -1, 7]) == 1


def test_one_part_agrees_with_one_part_and_says_nothing_of_several():
    assert adjusted_rand([0, 0, 0], ["a", "a", "a"]) == nmi([0, 0, 0], ["a", "a", "a"]) == 1
    assert adjusted_rand([0, 0, 0, 0], ["a", "a", "b", "c"]) == nmi([0, 0, 0, 0], ["a", "a", "b", "c"]) == 0


def test_the_worst_ari_of_four_points_is_minus_a_half():
    assert adjusted_rand([0, 0, 1, 1], [0, 1, 0, 1]) == -0.5


def test_silhouette_is_scikit_learns_and_that_of_far_blobs_is_near_1():
    states, labels = blobs(5)
    assert silhouette(states, labels) == pytest.approx(silhouette_score(states.astype(np.float64), labels), abs=1e-9)
    assert silhouette(100 * states, labels) == pytest.approx(silhouette(states, labels), abs=1e-9)
    assert silhouette(blobs(5, apart=2000.0)[0], labels) > 0.99


def test_silhouette_of_a_sample_is_near_that_of_all():
    states, labels = blobs(6, sizes=(300, 300, 300))
    whole = silhouettes(states, labels).mean()
    sampled = [silhouette(states, labels, seed, most=300) for seed in range(3)]
    assert len(set(sampled)) == 3
    np.testing.assert_allclose(sampled, whole, atol=0.02)


def test_labels_of_each_point_its_own_have_silhouette_0():
    assert silhouette(blobs(0)[0][:9], list(range(9))) == 0


def test_shuffled_labels_score_about_0_and_the_true_ones_lie_many_deviations_above():
    states, labels = blobs(7, apart=5.0)
    found = scores(states, labels, seed=0, permutations=50)
    assert abs(found["ari_shuffled"]) < 4 * found["ari_shuffled_sd"] / np.sqrt(50)
    assert 0 < found["nmi_shuffled"] < 0.15
    assert found["ari"] > found["ari_shuffled"] + 10 * found["ari_shuffled_sd"]


def test_the_shuffled_control_has_the_spread_of_a_permutation_test():
    labels = np.repeat([0, 1], 50)
    rng = np.random.default_rng(0)
    by_hand = [adjusted_rand_score(labels, rng.permutation(labels)) for _ in range(500)]
    control = shuffled(labels, labels, seed=1, permutations=500)
    assert control["ari_shuffled_sd"] == pytest.approx(np.std(by_hand), rel=0.2)


def test_more_or_fewer_clusters_than_tasks_lower_ari():
    states, labels = blobs(8)
    assert scores(states, labels, seed=0)["ari"] == 1
    assert scores(states, labels, seed=0, k=2)["ari"] < 0.8
    assert scores(states, labels, seed=0, k=6)["ari"] < 0.8


def test_centroids_are_means_and_a_state_on_one_has_margin_1():
    states, labels = blobs(9)
    names = np.array(["sort", "add", "copy"])[labels]
    centroids = Centroids.of(states, names)
    assert centroids.names == ("add", "copy", "sort")
    np.testing.assert_allclose(centroids.means[0], states[names == "add"].mean(0), rtol=1e-5)
    chosen, margin = centroids.nearest(centroids.means)
    assert chosen.tolist() == [0, 1, 2]
    assert (margin == 1).all()
    between = centroids.means[:2].mean(0, keepdims=True)
    assert centroids.nearest(between)[1][0] == pytest.approx(0, abs=1e-12)
    assert centroids.accuracy(states, names) == 1


def test_a_margin_is_the_share_by_which_the_nearest_mean_is_nearer():
    centroids = Centroids.of(np.array([[0.0], [4.0]]), ["a", "b"])
    assert centroids.nearest(np.array([[1.0]]))[1][0] == pytest.approx((3 - 1) / 3)


def test_two_coinciding_means_have_margin_0_and_one_alone_has_margin_1():
    assert Centroids.of(np.zeros((2, 3)), ["a", "b"]).nearest(np.zeros((1, 3)))[1].tolist() == [0]
    assert Centroids.of(np.zeros((2, 3)), ["a", "a"]).nearest(np.ones((1, 3)))[1].tolist() == [1]


def test_a_label_without_a_mean_is_never_right():
    centroids = Centroids.of(np.array([[0.0], [4.0]]), ["a", "b"])
    assert centroids.right(np.array([[0.1], [0.1]]), ["a", "z"]).tolist() == [True, False]


@pytest.mark.parametrize("data_seed", range(8))
def test_a_resample_without_repetition_is_scored_as_its_points_alone(data_seed: int):
    a, b = random_partitions(100 + data_seed)
    rng = np.random.default_rng(data_seed)
    kept = rng.integers(0, 2, (5, len(a)))
    kept[:, :2] = 1
    values = rng.standard_normal(len(a))
    drawn = Resamples(np.arange(len(a)), kept)
    for weights, ari, mean in zip(kept, drawn.adjusted_rand(a, b), drawn.mean(values), strict=True):
        assert ari == pytest.approx(adjusted_rand_score(a[weights > 0], b[weights > 0]), abs=0.2 / len(a) + 1e-9)
        assert mean == pytest.approx(values[weights > 0].mean())


def test_pairs_of_a_resample_are_those_counted_one_by_one():
    groups, a, b = [0, 0, 1, 1, 1, 2], [0, 0, 0, 1, 1, 1], [0, 1, 0, 0, 1, 1]
    weights = np.array([2, 0, 1])
    points = [(g, copy, x, y) for g, x, y in zip(groups, a, b, strict=True) for copy in range(weights[g])]
    pairs = [(p, q) for i, p in enumerate(points) for q in points[:i]]
    across = 3 / 2
    counts = np.zeros(4)
    for p, q in pairs:
        if p[0] == q[0] and p[1] != q[1]:
            continue
        share = 1.0 if p[0] == q[0] else across
        counts += share * np.array([p[2:] == q[2:], p[2] == q[2], p[3] == q[3], True])
    both, same_a, same_b, total = counts
    expected = same_a * same_b / total
    by_hand = (both - expected) / ((same_a + same_b) / 2 - expected)
    found = Resamples(np.array(groups), weights[None]).adjusted_rand(a, b)
    assert found[0] == pytest.approx(by_hand)


def test_clusters_of_templates_are_no_clusters_of_tasks_across_templates():
    templates = np.repeat(np.arange(8), 10)
    tasks = templates // 2
    assert adjusted_rand(templates, tasks) > 0.5
    assert adjusted_rand_across(templates, tasks, templates) == 0
    assert adjusted_rand_across(tasks, tasks, templates) == 1
    a, b = random_partitions(3)
    assert adjusted_rand_across(a, b, range(len(a))) == adjusted_rand(a, b)


@pytest.mark.parametrize("size", [1, 5])
def test_the_mean_over_resamples_is_the_ari_of_all_points(size: int):
    rng = np.random.default_rng(0)
    groups = np.arange(60) // size
    labels = groups % 4
    by_group = rng.integers(0, 5, 60)[groups]  # what a group has in common
    assignment = np.where(rng.random(60) < 0.5, np.arange(60) % 5, by_group)
    drawn = Resamples.of(groups, 4000, seed=0)
    whole = adjusted_rand(assignment, labels)
    assert drawn.adjusted_rand(assignment, labels).mean() == pytest.approx(whole, abs=0.012)
    counts = drawn.drawn[:500, drawn.codes]
    written_out = np.mean([adjusted_rand_score(assignment.repeat(w), labels.repeat(w)) for w in counts])
    assert abs(written_out - whole) > 0.02  # what pairs of a point or group with itself would do


def test_resamples_draw_groups_whole_and_as_many_as_there_are():
    drawn = Resamples.of(["p", "q", "q", "r", "r", "r"], 200, seed=0)
    assert drawn.codes.tolist() == [0, 1, 1, 2, 2, 2]
    assert (drawn.drawn.sum(1) == 3).all()
    assert (Resamples.of(["p", "q", "q", "r", "r", "r"], 200, seed=0).drawn == drawn.drawn).all()
    assert drawn.drawn.var(0) == pytest.approx([2 / 3] * 3, abs=0.2)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: kmeans(np.ones((3, 2)), 0, seed=0), "k = 0"),
        (lambda: kmeans(np.ones((0, 2)), 2, seed=0), "at least one of each"),
        (lambda: kmeans(np.array([[np.nan], [1.0]]), 2, seed=0), "NaN or infinity"),
        (lambda: scores(np.ones((3, 2)), ["a", "b"], seed=0), "one a state, 3 of them"),
        (lambda: adjusted_rand([], []), "not empty"),
        (lambda: nmi([0, 1], [0]), "as long as the assignment"),
        (lambda: shuffled([0, 1], [0, 1], 0, permutations=1), "at least 2"),
        (lambda: Resamples.of(["a", "a"], 5, seed=0), "at least 2 groups"),
        (lambda: Centroids.of(np.ones((2, 2)), ["a"]), "one a state, 2 of them"),
    ],
)
def test_what_cannot_be_scored_is_refused_in_words(call, said: str):
    with pytest.raises(InvalidSettings, match=said):
        call()
