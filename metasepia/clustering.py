"""How well the clusters of hidden states agree with tasks (Wu and Varshney, arXiv:2402.12151).

K-means sees no labels; its clusters are compared with the tasks by the adjusted Rand index (ARI) and normalised mutual
information (NMI), and both are compared with shuffled labels. A score of hidden states says little alone: untrained
networks and bags of words score above 0, so callers set it beside step 0, layer 0 or a bag of words.

What is promised of repetition: equal states, labels and seed give equal results in one process or many, whatever
OMP_NUM_THREADS says and in any order of calls, because k-means here runs on one thread and in float64 (its sums over
threads are added in the order in which threads finish). Another processor or BLAS may round a product differently and
so, where two centres are equally near, choose differently.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from metasepia.errors import InvalidSettings

States = Float[np.ndarray, "points dims"]
Labels = Sequence[str] | Sequence[int] | Shaped[np.ndarray, " points"]
"""One task or cluster a point; any names or numbers, compared by equality only."""
Assignment = Int[np.ndarray, " points"]
"""Cluster of each point, numbered 0, 1, ... in order of first appearance."""

RESTARTS = 10
"""K-means runs from so many seeded starts and keeps the tightest."""
PERMUTATIONS = 20
"""Shuffles of the labels behind the control's mean and spread."""
MOST_SILHOUETTE = 2000
"""Silhouette looks at all pairs: beyond so many points it is taken over a seeded sample of them."""
ROUNDING = 1e-6
"""States whose every dimension strays by no more than this share of its mean are taken for constant: float32 rounds."""


@dataclass(frozen=True)
class Clusters:
    """What k-means found."""

    assignment: Assignment
    centres: Float[np.ndarray, "clusters dims"]
    """float64, row i is the mean of the points assigned to i."""

    def nearest(self, states: States) -> Assignment:
        """The cluster whose centre is nearest to each of other states; the first of equally near ones."""
        return squared_distances(states, self.centres).argmin(1)


@dataclass(frozen=True)
class Centroids:
    """The mean state of each task: a router by the nearest, and what a patch puts in a state's place."""

    names: tuple[Any, ...]
    """The labels, sorted."""
    means: Float[np.ndarray, "names dims"]
    """float64."""

    @classmethod
    def of(cls, states: States, labels: Labels) -> "Centroids":
        """Raises InvalidSettings for no states, or not one label a state."""
        _check(states)
        names, codes = _codes(labels, len(states))
        return cls(tuple(names.tolist()), _means(np.asarray(states, np.float64), codes, len(names)))

    def nearest(self, states: States) -> tuple[Int[np.ndarray, " points"], Float[np.ndarray, " points"]]:
        """Position in `names` of the nearest mean, and the margin (second - first) / second of the two distances.

        Distances are Euclidean, margins in [0, 1]: 1 on a mean, 0 halfway between two (and where two means coincide).
        With one name the margin is 1.
        """
        distances = np.sqrt(squared_distances(states, self.means))
        chosen = distances.argmin(1)
        if len(self.names) == 1:
            return chosen, np.ones(len(distances))
        first, second = np.partition(distances, 1, axis=1)[:, :2].T
        return chosen, np.divide(second - first, second, out=np.zeros_like(second), where=second > 0)

    def accuracy(self, states: States, labels: Labels) -> float:
        """Share of states whose nearest mean is their own label's; a label without a mean is never right."""
        return float(self.right(states, labels).mean())

    def right(self, states: States, labels: Labels) -> Bool[np.ndarray, " points"]:
        """Whether each state's nearest mean is its own label's."""
        _check(states)
        wanted = np.asarray(labels)
        if len(wanted) != len(states):
            raise InvalidSettings("labels", len(wanted), f"one a state, {len(states)} of them")
        return np.asarray(self.names)[self.nearest(states)[0]] == wanted


def clusters(states: States, k: int, seed: int, *, restarts: int = RESTARTS) -> Clusters:
    """scikit-learn's k-means (Lloyd to convergence, k-means++ starts) on centred float64 states.

    No more distinct states than `k` give each its own cluster, and constant states one; neither warns. Raises
    InvalidSettings for k < 1, no states, or states that are not finite.
    """
    if k < 1:
        raise InvalidSettings("k", k, "at least 1 cluster")
    _check(states)
    points = np.asarray(states, np.float64)
    mean = points.mean(0)
    centred = points - mean + 0.0  # + 0.0: no -0.0, whose bytes differ from 0.0's
    if k == 1 or _is_constant(centred, mean):
        found = np.zeros(len(points), np.int64)
    else:
        rows = [row.tobytes() for row in centred]
        place = {row: i for i, row in enumerate(dict.fromkeys(rows))}
        found = np.array([place[row] for row in rows]) if len(place) <= k else _lloyd(centred, k, seed, restarts)
    assignment = _in_order(found)
    return Clusters(assignment, _means(points, assignment, int(assignment.max()) + 1))


def kmeans(states: States, k: int, seed: int, *, restarts: int = RESTARTS) -> Assignment:
    """The assignment of `clusters` alone."""
    return clusters(states, k, seed, restarts=restarts).assignment


def adjusted_rand(a: Labels, b: Labels) -> float:
    """Hubert and Arabie's index: 1 for equal partitions, 0 in expectation for independent ones, at worst -0.5.

    One cluster against several tasks is 0. Raises InvalidSettings for partitions of different length or of nothing.
    """
    return float(_adjusted_rand(*_counts(a, b))[0])


def adjusted_rand_across(a: Labels, b: Labels, groups: Labels) -> float:
    """ARI over pairs of points from different groups alone.

    Where texts come by few templates, half of a task's pairs share a template, and clusters of templates would score as
    clusters of tasks; this asks whether different templates of a task fall together. 1 for one group: no pairs.
    """
    codes = _codes(groups, len(a))[1]
    return float(_adjusted_rand(*_counts(a, b, codes, np.ones((1, codes.max() + 1)), within=0.0))[0])


def nmi(a: Labels, b: Labels) -> float:
    """Mutual information over the arithmetic mean of the entropies, in [0, 1]; unlike ARI, above 0 by chance.

    Two partitions of one part each agree, 1; one such against several parts is 0.
    """
    return float(_nmi(*_counts(a, b))[0])


def silhouette(states: States, labels: Labels, seed: int = 0, *, most: int = MOST_SILHOUETTE) -> float:
    """Mean silhouette (Euclidean) of the labelling, in [-1, 1]; of a seeded sample beyond `most` points."""
    sample = _sample(len(states), seed, most)
    return float(silhouettes(states[sample], np.asarray(labels)[sample]).mean())


def silhouettes(states: States, labels: Labels) -> Float[np.ndarray, " points"]:
    """The silhouette of each point; 0 where it is not defined: one label, constant states, or all points labels of
    their own."""
    from sklearn.metrics import silhouette_samples

    _check(states)
    names, codes = _codes(labels, len(states))
    points = np.asarray(states, np.float64)
    mean = points.mean(0)
    centred = points - mean
    if not 1 < len(names) < len(points) or _is_constant(centred, mean):
        return np.zeros(len(points))
    with _one_thread():
        return np.asarray(silhouette_samples(centred, codes))


def scores(
    states: States, labels: Labels, seed: int, *, k: int | None = None, permutations: int = PERMUTATIONS
) -> dict[str, float]:
    """K-means with k clusters (None: as many as there are labels) against the labels and against shuffled labels.

    Keys: `ari`, `nmi`, `silhouette` (of the labels), `silhouette_clusters` (of k-means' own clusters), `clusters`
    (found), and `ari_shuffled`, `ari_shuffled_sd`, `nmi_shuffled`, `nmi_shuffled_sd`: mean and standard deviation over
    seeded permutations of the labels, what the same clusters score by chance.
    """
    _check(states)
    names, codes = _codes(labels, len(states))
    found = kmeans(states, len(names) if k is None else k, seed)
    return {
        "ari": adjusted_rand(found, codes),
        "nmi": nmi(found, codes),
        "silhouette": silhouette(states, codes, seed),
        "silhouette_clusters": silhouette(states, found, seed),
        "clusters": float(found.max() + 1),
        **shuffled(found, codes, seed, permutations=permutations),
    }


def shuffled(assignment: Labels, labels: Labels, seed: int, *, permutations: int = PERMUTATIONS) -> dict[str, float]:
    """What the clusters score against seeded permutations of the labels: `ari_shuffled`, `nmi_shuffled`, and `_sd`.

    Raises InvalidSettings for fewer than two permutations, which have no spread.
    """
    if permutations < 2:
        raise InvalidSettings("permutations", permutations, "at least 2")
    codes = np.asarray(labels)
    draws = [np.random.default_rng((seed, i)).permutation(codes) for i in range(permutations)]
    aris = np.array([adjusted_rand(assignment, one) for one in draws])
    nmis = np.array([nmi(assignment, one) for one in draws])
    return {
        "ari_shuffled": float(aris.mean()),
        "ari_shuffled_sd": float(aris.std(ddof=1)),
        "nmi_shuffled": float(nmis.mean()),
        "nmi_shuffled_sd": float(nmis.std(ddof=1)),
    }


@dataclass(frozen=True)
class Resamples:
    """Bootstrap resamples of points that come in groups: whole groups are drawn, as many as there are.

    Paraphrases by one template are a group, `range(n)` makes each point its own. Scores of two kinds of states on the
    same resamples are paired.
    """

    codes: Int[np.ndarray, " points"]
    """Group of each point, from 0."""
    drawn: Int[np.ndarray, "resamples groups"]
    """How often each group is drawn."""

    @classmethod
    def of(cls, groups: Labels, count: int, seed: int) -> "Resamples":
        """Raises InvalidSettings for fewer than two groups."""
        names, codes = _codes(groups, len(groups))
        size = len(names)
        if size < 2:
            raise InvalidSettings("groups", size, "at least 2 groups to draw from")
        return cls(codes, np.random.default_rng(seed).multinomial(size, np.full(size, 1 / size), size=count))

    def mean(self, values: Shaped[np.ndarray, " points"]) -> Float[np.ndarray, " resamples"]:
        """Mean of the points' values in each resample."""
        size = self.drawn.shape[1]
        return (self.drawn @ np.bincount(self.codes, values, size)) / (self.drawn @ np.bincount(self.codes, None, size))

    def adjusted_rand(
        self, assignment: Labels, labels: Labels, *, across_only: bool = False
    ) -> Float[np.ndarray, " resamples"]:
        """ARI of each resample (`across_only`: over pairs of two groups alone), whose mean is the ARI of all points.

        A group drawn twice makes no pairs with itself: such pairs would weigh twice what a group has in common, and a
        point always agrees with itself. Pairs of two of G groups are drawn (G - 1) / G times in the mean and count for
        as much more.
        """
        size = self.drawn.shape[1]
        within = 0.0 if across_only else 1.0
        return _adjusted_rand(*_counts(assignment, labels, self.codes, self.drawn, size / (size - 1), within))


def squared_distances(
    states: States, centres: Float[np.ndarray, "centres dims"]
) -> Float[np.ndarray, "points centres"]:
    """Squared Euclidean distances in float64, centre by centre and so exactly 0 at one."""
    points, others = np.asarray(states, np.float64), np.asarray(centres, np.float64)
    return np.stack([np.square(points - one).sum(1) for one in others], axis=1)


@dataclass(frozen=True)
class _Counted:
    """Points of one kind (cells, clusters, labels), summed up by resample."""

    number: Float[np.ndarray, "resamples kinds"]
    pairs: Float[np.ndarray, " resamples"]
    """Pairs of two distinct points that share a kind."""


def _counts(
    a: Labels,
    b: Labels,
    groups: np.ndarray | None = None,
    drawn: np.ndarray | None = None,
    across: float = 1.0,
    within: float = 1.0,
) -> tuple[_Counted, _Counted, _Counted, Float[np.ndarray, " resamples"]]:
    """Of the cells, of the parts of a and of b; and all pairs. Without resamples, of each point once.

    `across`, `within`: how much a pair of two groups and one within a group count.
    """
    if len(a) == 0 or len(a) != len(b):
        raise InvalidSettings("labels", len(b), f"as long as the assignment ({len(a)}), and not empty")
    codes_a, codes_b = (_codes(one, len(a))[1] for one in (a, b))
    groups = np.arange(len(a)) if groups is None else groups
    weights = np.ones((1, len(a))) if drawn is None else np.asarray(drawn, np.float64)
    cells = codes_a * (codes_b.max() + 1) + codes_b
    counted = [_counted(kinds, groups, weights, across, within) for kinds in (cells, codes_a, codes_b)]
    everything = _counted(np.zeros_like(cells), groups, weights, across, within)
    return counted[0], counted[1], counted[2], everything.pairs


def _counted(kinds: np.ndarray, groups: np.ndarray, weights: np.ndarray, across: float, within: float) -> _Counted:
    shared, sizes = np.unique(kinds * weights.shape[1] + groups, return_counts=True)  # sorted by kind, then by group
    kind, group = np.divmod(shared, weights.shape[1])
    points = weights[:, group] * sizes
    number = np.add.reduceat(points, np.flatnonzero(np.diff(kind, prepend=-1)), axis=1)
    of_two = (np.square(number).sum(1) - np.square(points).sum(1)) / 2
    return _Counted(number, across * of_two + within * (weights[:, group] @ (sizes * (sizes - 1) / 2)))


def _adjusted_rand(cells: _Counted, a: _Counted, b: _Counted, pairs: np.ndarray) -> np.ndarray:
    # (index - expected) / (best - expected), times `pairs` above and below: whole numbers, so 0 and 1 come out exact
    by_chance = a.pairs * b.pairs
    above, below = cells.pairs * pairs - by_chance, (a.pairs + b.pairs) / 2 * pairs - by_chance
    # 0 / 0: both are one part, or both all single points: equal partitions
    return np.divide(above, below, out=np.ones_like(pairs), where=below != 0)


def _nmi(cells: _Counted, a: _Counted, b: _Counted, _: np.ndarray) -> np.ndarray:
    entropies = [_entropy(one.number) for one in (cells, a, b)]
    mean = (entropies[1] + entropies[2]) / 2
    information = entropies[1] + entropies[2] - entropies[0]
    return np.divide(information, mean, out=np.ones_like(mean), where=mean > 0).clip(0, 1)


def _entropy(number: Float[np.ndarray, "resamples kinds"]) -> Float[np.ndarray, " resamples"]:
    shares = number / number.sum(1, keepdims=True)
    return -(shares * np.log(shares, out=np.zeros_like(shares), where=shares > 0)).sum(1)


def _lloyd(centred: np.ndarray, k: int, seed: int, restarts: int) -> np.ndarray:
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    scaled = centred / np.abs(centred).max()  # squares neither overflow nor vanish
    with warnings.catch_warnings(), _one_thread():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer clusters than k is an answer here
        n_init: Any = restarts  # scikit-learn's annotation says str
        model = KMeans(k, n_init=n_init, random_state=np.random.RandomState(seed % 2**32), tol=0.0)
        return model.fit_predict(scaled)


@contextmanager
def _one_thread() -> Iterator[None]:
    with _thread_pools().limit(limits=1):
        yield


@cache
def _thread_pools() -> Any:
    import sklearn.cluster
    import sklearn.metrics  # noqa: F401  # their OpenMP and BLAS must be loaded before the controller looks for them
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()


def _check(states: np.ndarray) -> None:
    if states.ndim != 2 or 0 in states.shape:
        raise InvalidSettings("states", states.shape, "[points, dims] with at least one of each")
    if not np.isfinite(states).all():
        raise InvalidSettings("states", "not finite", "finite: a state holds NaN or infinity")


def _codes(labels: Labels, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The labels that occur, sorted, and the position of each point's among them."""
    values = np.asarray(labels)
    if len(values) != count or not count:
        raise InvalidSettings("labels", len(values), f"one a state, {count} of them, and at least one")
    names, codes = np.unique(values, return_inverse=True)
    return names, codes


def _means(points: np.ndarray, codes: np.ndarray, count: int) -> np.ndarray:
    return np.stack([points[codes == code].mean(0) for code in range(count)])


def _in_order(found: np.ndarray) -> np.ndarray:
    """The same partition, its parts numbered in order of first appearance."""
    _, first, codes = np.unique(found, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[codes]


def _is_constant(centred: np.ndarray, mean: np.ndarray) -> bool:
    return bool((np.abs(centred) <= ROUNDING * np.abs(mean)).all())


def _sample(count: int, seed: int, most: int) -> np.ndarray:
    if count <= most:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, most, replace=False))
