"""Whether probabilities mean what they say, and when an answer had better not be given.

Confidence is the probability of the likeliest class. Calibration error and reliability bins as in Guo et al.
(arXiv:1706.04599): bins of equal width over confidence, each from above its lower edge to its upper one included.
`probabilities` are [n, classes], rows summing to one; `truth` holds the index of each row's true class.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from metasepia.errors import InvalidRequest


@dataclass(frozen=True)
class ReliabilityBin:
    """Answers of similar confidence; `confidence` and `accuracy` are means over them, NaN where `count` is 0."""

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float


def reliability(
    probabilities: Float[np.ndarray, "n classes"], truth: Int[np.ndarray, " n"], bins: int = 15
) -> list[ReliabilityBin]:
    """The reliability table, all bins from 0 to 1. Raises InvalidRequest for no rows."""
    confidence, right = _judged(probabilities, truth)
    edges = np.linspace(0, 1, bins + 1)
    # Rounding may lift a probability above 1; it belongs into the last bin.
    owner = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
    table = []
    for i in range(bins):
        inside = owner == i
        count = int(inside.sum())
        means = (float(confidence[inside].mean()), float(right[inside].mean())) if count else (np.nan, np.nan)
        table.append(ReliabilityBin(float(edges[i]), float(edges[i + 1]), count, *means))
    return table


def expected_calibration_error(
    probabilities: Float[np.ndarray, "n classes"], truth: Int[np.ndarray, " n"], bins: int = 15
) -> float:
    """sum over bins of count / n * |accuracy - confidence|; in [0, 1], 0 is best. Small n alone raises it."""
    table = [one for one in reliability(probabilities, truth, bins) if one.count]
    return sum(one.count * abs(one.accuracy - one.confidence) for one in table) / len(truth)


def brier_score(probabilities: Float[np.ndarray, "n classes"], truth: Int[np.ndarray, " n"]) -> float:
    """Mean over rows of the sum over classes of (p - [class is true])^2, Brier's own form: in [0, 2], 0 is best."""
    _judged(probabilities, truth)
    hit = np.arange(probabilities.shape[1]) == truth[:, None]
    return float(((probabilities.astype(np.float64) - hit) ** 2).sum(axis=1).mean())


def abstain(probabilities: Float[np.ndarray, "n classes"], below: float) -> Int[np.ndarray, " n"]:
    """The likeliest class of each row (the first at a tie), -1 where its probability is below `below`."""
    return np.where(probabilities.max(axis=1) < below, -1, probabilities.argmax(axis=1))


@dataclass(frozen=True)
class Abstention:
    """What answering only from `threshold` on gives: the share of rows answered, and the accuracy on those."""

    threshold: float
    coverage: float
    accuracy: float


def abstentions(probabilities: Float[np.ndarray, "n classes"], truth: Int[np.ndarray, " n"]) -> list[Abstention]:
    """Every threshold that changes what is answered, ascending; the first answers every row."""
    confidence, right = _judged(probabilities, truth)
    order = np.argsort(-confidence, kind="stable")
    confidence, right = confidence[order], right[order]
    accuracy = np.cumsum(right) / np.arange(1, len(right) + 1)
    # Rows of equal confidence are answered together: only the last of them ends a group.
    ends = np.flatnonzero(np.append(confidence[1:] < confidence[:-1], True))
    return [Abstention(float(confidence[i]), (i + 1) / len(right), float(accuracy[i])) for i in reversed(ends)]


def threshold_for(
    probabilities: Float[np.ndarray, "n classes"], truth: Int[np.ndarray, " n"], accuracy: float
) -> Abstention | None:
    """The lowest threshold whose answers reach `accuracy` on these rows, to be used as `abstain_below`; None: none.

    Chosen on few rows it promises too much for others; give it a context's left-out answers (`audit.left_out`).
    """
    return next((one for one in abstentions(probabilities, truth) if one.accuracy >= accuracy), None)


def _judged(probabilities: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Confidence of each row in float64, and whether its likeliest class is the true one."""
    if not len(truth):
        raise InvalidRequest("probabilities", "there are none to judge")
    return probabilities.max(axis=1).astype(np.float64), probabilities.argmax(axis=1) == truth
