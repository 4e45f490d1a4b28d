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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int, Shaped

from metasepia.errors import InvalidSettings

if TYPE_CHECKING:
    from threadpoolctl import ThreadpoolController

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


@dataclass(frozen=True)
class Clusters:
    """What k-means found."""

    assignment: Assignment
    centres: Float[np.ndarray, "clusters dims"]
    """float64, row i is the mean of the points assigned to i."""

    def nearest(self, states: States) -> Assignment:
        """The cluster whose centre is nearest to each of other states (squared Euclidean distance)."""
        return squared_distances(states, self.centres).argmin(1)


@dataclass(frozen=True)
class Centroids:
    """The mean state of each task: the router of arXiv:2402.12151's reading, and what a patch puts in place."""

    names: tuple[Any, ...]
    """The labels, sorted."""
    means: Float[np.ndarray, "names dims"]

    @classmethod
    def of(cls, states: States, labels: Labels) -> "Centroids":
        raise NotImplementedError

    def nearest(self, states: States) -> tuple[Int[np.ndarray, " points"], Float[np.ndarray, " points"]]:
        """Position in `names` of the nearest mean, and the margin: (second distance - first) / second, in [0, 1].

        1 lies on a mean, 0 halfway between two. With one name the margin is 1.
        """
        raise NotImplementedError

    def accuracy(self, states: States, labels: Labels) -> float:
        """Share of states whose nearest mean is their own label's. NaN for no states."""
        raise NotImplementedError


def clusters(states: States, k: int, seed: int, *, restarts: int = RESTARTS) -> Clusters:
    """scikit-learn's k-means (Lloyd, k-means++ starts) on centred float64 states.

    Fewer distinct states than `k` give as many clusters as there are distinct states, and constant states one; neither
    warns. Raises InvalidSettings for k < 1, no states, or states that are not finite.
    """
    raise NotImplementedError


def kmeans(states: States, k: int, seed: int, *, restarts: int = RESTARTS) -> Assignment:
    """The assignment of `clusters` alone."""
    return clusters(states, k, seed, restarts=restarts).assignment


def adjusted_rand(a: Labels, b: Labels) -> float:
    """Hubert and Arabie's index: 1 for equal partitions, 0 in expectation for independent ones, at worst -0.5.

    One cluster against several tasks is 0. Raises InvalidSettings for partitions of different length or of nothing.
    """
    raise NotImplementedError


def nmi(a: Labels, b: Labels) -> float:
    """Mutual information over the arithmetic mean of the entropies, in [0, 1]; unlike ARI, above 0 by chance."""
    raise NotImplementedError


def silhouette(states: States, labels: Labels, seed: int = 0, *, most: int = MOST_SILHOUETTE) -> float:
    """Mean silhouette (Euclidean) of the labelling, in [-1, 1]; 0 where it is not defined: one label, constant states,
    or every point a label of its own. Beyond `most` points, of a seeded sample.
    """
    raise NotImplementedError


def scores(
    states: States, labels: Labels, seed: int, *, k: int | None = None, permutations: int = PERMUTATIONS
) -> dict[str, float]:
    """K-means with k clusters (None: as many as there are labels) against the labels and against shuffled labels.

    Keys: `ari`, `nmi`, `silhouette` (of the labels in the states), `silhouette_clusters` (of k-means' own clusters),
    `clusters` (found), and `ari_shuffled`, `ari_shuffled_sd`, `nmi_shuffled`, `nmi_shuffled_sd`: mean and standard
    deviation over seeded permutations of the labels, what the same clusters score by chance.
    """
    raise NotImplementedError


def squared_distances(states: States, centres: States) -> Float[np.ndarray, "points centres"]:
    """Squared Euclidean distances in float64, exactly 0 at a centre."""
    raise NotImplementedError
