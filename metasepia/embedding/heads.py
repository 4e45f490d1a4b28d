"""Heads on a frozen encoder's vectors, fitted to a task's answers so that they answer other texts in its place.

Ridge regression on the answers, with an intercept. The penalty is the one whose left-out residuals are least (exact
leave-one-out in closed form: Allen's PRESS, 1974), within bounds, so twenty examples and ten thousand are treated
alike. Scores become probabilities by softmax(log prior + slope * score); the slope is fitted to left-out scores by
their cross-entropy, so it is calibrated on answers that the head was not fitted to. Open replies are fitted as vectors,
and stay so.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

PENALTIES = np.logspace(-1.5, 1.25, 12)
"""Of the ridge, in units of the mean squared norm of the centred vectors. Below, few examples are learnt by heart;
above, they are not learnt at all."""
LEAST_SLOPE = 1.0
"""Where few examples let no left-out answer be told: the direction that they point to, at the size of the scores."""


@dataclass(frozen=True)
class Features:
    """Vectors of a task's texts, decomposed once for all tasks on the same texts: vectors - mean = u diag(s) vh."""

    mean: Float[np.ndarray, " width"]
    u: Float[np.ndarray, "texts rank"]
    s: Float[np.ndarray, " rank"]
    vh: Float[np.ndarray, "rank width"]

    @classmethod
    def of(cls, vectors: Float[np.ndarray, "texts width"]) -> "Features":
        given = vectors.astype(np.float64)
        mean = given.mean(0)
        centred = given - mean
        if len(given) <= given.shape[1]:
            u, s, vh = np.linalg.svd(centred, full_matrices=False)
        else:
            squares, v = np.linalg.eigh(centred.T @ centred)
            s, vh = np.sqrt(np.maximum(squares[::-1], 0)), v.T[::-1]
            u = centred @ (vh.T / np.maximum(s, 1e-12))
        # Directions at the size of rounding in float32 vectors carry nothing.
        kept = s > 1e-5 * max(float(s[0]), float(np.abs(given).max()))
        return cls(mean, u[:, kept], s[kept], vh[kept])


@dataclass(frozen=True)
class Ridge:
    """One task's head: scores are (x - mean) vh^T weights, about the intercept."""

    features: Features
    weights: Float[np.ndarray, "rank outputs"]
    intercept: Float[np.ndarray, " outputs"]
    left_out: Float[np.ndarray, "texts outputs"]
    """Of each text it was fitted on: the score, about the intercept, of a head fitted without that text."""
    penalty: float

    @classmethod
    def fit(cls, features: Features, targets: Float[np.ndarray, "texts outputs"]) -> "Ridge":
        count, squares = len(targets), features.s**2
        intercept = targets.mean(0)
        centred = targets - intercept
        projected = features.u.T @ centred
        leverages = features.u**2
        best: tuple[float, np.ndarray, float] | None = None
        for penalty in PENALTIES * (squares.sum() / count):
            shrunk = squares / (squares + penalty)
            kept_out = np.maximum(1 - 1 / count - leverages @ shrunk, 1e-6)
            residual = (centred - features.u @ (shrunk[:, None] * projected)) / kept_out[:, None]
            press = float((residual**2).sum())
            if best is None or press < best[0]:
                best = press, residual, float(penalty)
        assert best is not None
        _, residual, penalty = best
        weights = (features.s / (squares + penalty))[:, None] * projected
        return cls(features, weights, intercept, centred - residual, penalty)

    def scores(self, vectors: Float[np.ndarray, "n width"]) -> Float[np.ndarray, "n outputs"]:
        """About the intercept."""
        return ((vectors.astype(np.float64) - self.features.mean) @ self.features.vh.T) @ self.weights

    def probabilities(
        self, vectors: Float[np.ndarray, "n width"], targets: Float[np.ndarray, "texts outputs"]
    ) -> Float[np.ndarray, "n outputs"]:
        """Calibrated by the left-out scores against `targets`, those that the head was fitted to."""
        log_prior, slope = calibration(self.left_out, targets)
        return _softmax(log_prior + max(slope, LEAST_SLOPE) * self.scores(vectors))


def calibration(
    left_out: Float[np.ndarray, "texts labels"], targets: Float[np.ndarray, "texts labels"]
) -> tuple[Float[np.ndarray, " labels"], float]:
    """log prior, and the slope >= 0 with the least cross-entropy of softmax(log prior + slope * left_out) to `targets`.

    Newton's method on a convex function of one number, in steps of at most a factor of eight.
    """
    log_prior = np.log((targets.sum(0) + 0.5) / (len(targets) + 0.5 * targets.shape[1]))
    slope = 4.0
    for _ in range(60):
        p = _softmax(log_prior + slope * left_out)
        gradient = float(((p - targets) * left_out).sum())
        curvature = float((p * left_out**2).sum() - ((p * left_out).sum(1) ** 2).sum())
        new = float(np.clip(slope - gradient / max(curvature, 1e-12), slope / 8, slope * 8))
        if new < 1e-6:
            return log_prior, 0.0
        if abs(new - slope) <= 1e-7 * slope:
            break
        slope = min(new, 1e6)  # separable: the cross-entropy falls for ever
    return log_prior, slope


def _softmax(logits: Float[np.ndarray, "n labels"]) -> Float[np.ndarray, "n labels"]:
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)
