"""How varied a collection of tasks is: the Vendi score, and what each task adds to it.

The score (Friedman and Dieng, arXiv:2210.02410) is the exponential of the entropy of the eigenvalues of K / n, where K
holds the cosines of n tasks: an effective number between 1 (all alike) and n (all at right angles). Of order q
(arXiv:2310.12952) the entropy is Renyi's: q = 1 is Shannon's, small q counts rare directions more, q = 2 is n^2 over
the sum of squared cosines, infinity is one over the largest eigenvalue.

Embeddings of small data sets are noisy, and noise looks like variety: two halves of one data set are not parallel.
Where the cosine between such halves is known, cosines are divided by what it allows (Spearman's correction for
attenuation, 1904), which is `kernel_of` with `reliability`.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from metasepia.errors import InvalidRequest, InvalidSettings

MOST_FOR_ANY_ORDER = 400
"""Tasks whose leaving out is computed for any order; of more it is for order 2, in closed form."""
MOST = 20_000
PARTS = 1024
"""Rows of cosines in memory at once."""
Z95 = 1.959964


@dataclass(frozen=True, kw_only=True)
class Diversity:
    """What was measured of a collection."""

    count: int
    order: float
    score: float
    """Effective number of tasks, 1 to `count`."""
    low: float
    high: float
    """95 % interval of the score by the jackknife over tasks, of `adds_order`: what another draw of as many tasks would
    give. Rather too wide than too narrow where tasks are many kinds with noise."""
    adds: Float[np.ndarray, " tasks"]
    """The score less that of the collection without the task; below 0 where its likes are too many already."""
    adds_order: float
    """Of the score that `adds` is of: `order`, or 2 beyond MOST_FOR_ANY_ORDER tasks."""
    twin: Int[np.ndarray, " tasks"]
    """The place of each task's nearest other."""
    twin_cosine: Float[np.ndarray, " tasks"]

    @property
    def by_adds(self) -> list[int]:
        """Places, those first that add least; equal ones by the nearness of their twins."""
        return sorted(range(self.count), key=lambda i: (round(float(self.adds[i]), 9), -float(self.twin_cosine[i]), i))


def score(eigenvalues: Float[np.ndarray, " n"], order: float = 1.0) -> float:
    """The Vendi score of the eigenvalues of K / n, which are at least 0 and sum to 1."""
    if not order > 0:
        raise InvalidSettings("order", order, "above 0; 1 is Shannon's entropy, inf the largest eigenvalue alone")
    p = eigenvalues[eigenvalues > 1e-15]
    if order == 1:
        return float(np.exp(-(p * np.log(p)).sum()))
    if np.isinf(order):
        return float(1 / p.max())
    return float((p**order).sum() ** (1 / (1 - order)))


def spectrum(vectors: Float[np.ndarray, "tasks dims"]) -> Float[np.ndarray, " rank"]:
    """Eigenvalues of the cosines over their number, largest first, by the smaller side of `vectors`; they sum to 1."""
    given = _unit(vectors)
    if len(given) <= given.shape[1]:
        return _normalised(np.linalg.eigvalsh(given @ given.T))
    return _normalised(np.linalg.eigvalsh(given.T @ given))


def kernel_of(
    vectors: Float[np.ndarray, "tasks dims"], reliability: Float[np.ndarray, " tasks"] | None = None
) -> Float[np.ndarray, "tasks tasks"]:
    """Cosines, corrected for attenuation: c_ij / sqrt(r_i r_j), at most 1; ones on the diagonal.

    `reliability` in (0, 1]: the cosine to expect between two embeddings of the same task from other data. Corrected
    cosines need not be those of any vectors: eigenvalues below 0 are then cut, and the diagonal scaled back to ones.
    """
    given = _unit(vectors)
    kernel = given @ given.T
    if reliability is not None:
        if not ((reliability > 0) & (reliability <= 1)).all():
            raise InvalidRequest("reliability", "must be above 0 and at most 1")
        kernel = np.clip(kernel / np.sqrt(np.outer(reliability, reliability)), -1, 1)
        np.fill_diagonal(kernel, 1)
        values, sides = np.linalg.eigh(kernel)
        if values[0] < 0:
            kernel = (sides * np.maximum(values, 0)) @ sides.T
            scale = np.sqrt(np.diag(kernel))
            kernel /= np.outer(scale, scale)
    np.fill_diagonal(kernel, 1)
    return kernel


def diversity(
    vectors: Float[np.ndarray, "tasks dims"],
    *,
    order: float = 1.0,
    reliability: Float[np.ndarray, " tasks"] | None = None,
) -> Diversity:
    """Measures a collection of two tasks or more.

    Beyond MOST_FOR_ANY_ORDER tasks nothing of size tasks x tasks is formed, and `reliability` cannot be used. Raises
    InvalidRequest for less than 2 or more than MOST tasks.
    """
    count = len(vectors)
    if not 2 <= count <= MOST:
        raise InvalidRequest("tasks", f"between 2 and {MOST} are measured, got {count}")
    if count > MOST_FOR_ANY_ORDER:
        if reliability is not None:
            raise InvalidRequest("reliability", f"is taken into account up to {MOST_FOR_ANY_ORDER} tasks, got {count}")
        given = _unit(vectors)
        whole = score(spectrum(vectors), order)
        squares, twin, cosine = _rows(given.astype(np.float32))
        total = float(squares.sum())
        # Without task i the sum of squared cosines lacks its row, its column, and once their crossing.
        without = (count - 1) ** 2 / np.maximum(total - 2 * squares + 1, 1e-12)
        adds, adds_order = count**2 / total - without, 2.0
    else:
        kernel = kernel_of(vectors, reliability)
        whole = score(_normalised(np.linalg.eigvalsh(kernel)), order)
        without = np.array([_without(kernel, place, order) for place in range(count)])
        adds, adds_order = whole - without, order
        apart = kernel - 2 * np.eye(count)
        twin, cosine = apart.argmax(1), apart.max(1)
    # On logarithms, whose jackknife is nearer to normal; a score cannot leave [1, count].
    spread = np.log(without) - np.log(without).mean()
    error = np.sqrt((count - 1) / count * (spread**2).sum()) if count > 2 else np.log(count)
    centre = np.log(whole)
    return Diversity(
        count=count,
        order=order,
        score=whole,
        low=float(np.clip(np.exp(centre - Z95 * error), 1, count)),
        high=float(np.clip(np.exp(centre + Z95 * error), 1, count)),
        adds=adds,
        adds_order=adds_order,
        twin=twin,
        twin_cosine=cosine,
    )


def _without(kernel: np.ndarray, place: int, order: float) -> float:
    rest = np.delete(np.delete(kernel, place, 0), place, 1)
    return score(_normalised(np.linalg.eigvalsh(rest)), order)


def _rows(given: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each task the sum of its squared cosines to all, its nearest other, and their cosine; PARTS rows at a time."""
    squares, nearest = np.empty(len(given)), np.empty(len(given))
    twin = np.empty(len(given), np.int64)
    for begin in range(0, len(given), PARTS):
        cosines = given[begin : begin + PARTS] @ given.T
        rows = np.arange(len(cosines))
        squares[begin : begin + PARTS] = (cosines**2).sum(1)
        cosines[rows, begin + rows] = -2
        twin[begin : begin + PARTS] = cosines.argmax(1)
        nearest[begin : begin + PARTS] = cosines.max(1)
    return squares, twin, nearest


def _unit(vectors: np.ndarray) -> np.ndarray:
    if vectors.ndim != 2 or not len(vectors) or not np.isfinite(vectors).all():
        raise InvalidRequest("vectors", f"must be finite, [tasks, dims], got {list(vectors.shape)}")
    norms = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    if not norms.all():
        raise InvalidRequest("vectors", "one is zero, so it has no direction")
    return vectors / norms


def _normalised(eigenvalues: np.ndarray) -> np.ndarray:
    """Largest first, rounding below zero cut, summing to 1."""
    positive = np.maximum(eigenvalues[::-1], 0)
    return positive / positive.sum()
