"""From what was answered to distributions over labels, with what is not known of them.

Teacher-forced: p(label) is the softmax over labels of log p(verbaliser | prompt), summed or by length. First token:
masses of the tokens that begin one verbaliser; where a list of the likeliest tokens does not say, bounds become
standard errors. Sampling: counts under Jeffreys' prior (`Answers.of_counts`). No penalties, no floors.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from metasepia.blackbox.settings import Normalise
from metasepia.embedding.answers import Answers

DRAWS = 512
"""From the uncertainty of sampled labels, for the errors of calibrated ones."""
TINY = 1e-12


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Labels' probabilities for some texts, before calibration."""

    probabilities: Float[np.ndarray, "texts labels"]
    standard_error: Float[np.ndarray, "texts labels"] | None = None


def of_log_probabilities(
    sums: Float[np.ndarray, "texts labels"], num_tokens: np.ndarray, verbalisers: Sequence[str], by: Normalise
) -> Scores:
    """The softmax over labels of log p(verbaliser), `sums`, or of that by token or character; natural logarithms.

    `num_tokens`: of each verbaliser, broadcast to `sums`.
    """
    lengths = {
        "sum": np.ones(1),
        "token": np.maximum(num_tokens, 1),
        "character": np.array([max(len(one.strip()), 1) for one in verbalisers]),
    }[by]
    return Scores(probabilities=softmax(sums / lengths))


def softmax(logits: Float[np.ndarray, "texts labels"]) -> Float[np.ndarray, "texts labels"]:
    shifted = np.exp(logits - logits.max(1, keepdims=True))
    return shifted / shifted.sum(1, keepdims=True)


def of_first_tokens(tops: Sequence[Sequence[tuple[str, float]]], verbalisers: Sequence[str]) -> tuple[Scores, float]:
    """From each text's likeliest first tokens with log p; and the mean mass that named a label.

    A token counts for the verbalisers that it begins. One that begins several counts for each in equal parts, with the
    error of not knowing which. A label that no token of the list begins has at most the mass of the last one listed,
    and of all that is unlisted: it gets half of that bound, and the error of a uniform distribution up to it.
    """
    words = [one.strip().casefold() for one in verbalisers]
    means = np.zeros((len(tops), len(words)))
    variances = np.zeros_like(means)
    named = np.zeros(len(tops))
    for row, top in enumerate(tops):
        unlisted = max(0.0, 1.0 - math.fsum(math.exp(logprob) for _, logprob in top))
        bound = min(unlisted, min((math.exp(logprob) for _, logprob in top), default=1.0))
        seen = np.zeros(len(words), bool)
        for token, logprob in top:
            begun = begins(token, words)
            if not begun:
                continue
            mass, share = math.exp(logprob), 1 / len(begun)
            named[row] += mass
            seen[begun] = True
            means[row, begun] += mass * share
            variances[row, begun] += mass**2 * share * (1 - share)
        means[row, ~seen] = bound / 2
        variances[row, ~seen] = bound**2 / 12
    total = means.sum(1, keepdims=True)
    prior = 1 / len(words)
    lost = total[:, 0] < TINY
    probabilities = np.where(lost[:, None], prior, means / np.maximum(total, TINY))
    errors = np.where(lost[:, None], 1.0, np.sqrt(variances) / np.maximum(total, TINY))
    if not errors.any():
        return Scores(probabilities=probabilities), float(named.mean())
    return Scores(probabilities=probabilities, standard_error=_possible(probabilities, errors)), float(named.mean())


def begins(token: str, words: Sequence[str]) -> list[int]:
    """Of which words (stripped, case folded) the token is a beginning; spaces alone begin nothing."""
    said = token.strip().casefold()
    return [i for i, word in enumerate(words) if said and word.startswith(said)]


def _possible(probabilities: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """Errors no larger than that of no information: a uniform prior over the simplex with the same mean."""
    most = np.sqrt(probabilities * (1 - probabilities) / (probabilities.shape[1] / 2 + 1))
    return np.minimum(errors, most)


def of_counts(counts: Float[np.ndarray, "texts labels"]) -> Scores:
    """Mean and standard deviation of each label's share, k of n draws, under Jeffreys' prior."""
    labels = [str(i).zfill(6) for i in range(counts.shape[1])]
    answers = Answers.of_counts([str(i) for i in range(max(len(counts), 2))], labels, _at_least_two(counts))
    assert answers.standard_error is not None
    n = len(counts)
    return Scores(probabilities=answers.probabilities[:n].astype(float), standard_error=answers.standard_error[:n])


def _at_least_two(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([counts, counts]) if len(counts) == 1 else counts


def calibrated(scores: Scores, nothing: Scores, *, seed: int = 0) -> Scores:
    """Contextual calibration (Zhao et al. 2021, arXiv:2102.09690): p(label | text) over its mean for texts that say
    nothing, `nothing`, made to sum to one. Errors are those of draws from both uncertainties.
    """
    if scores.standard_error is None and nothing.standard_error is None:
        return Scores(probabilities=_divided(scores.probabilities, nothing.probabilities.mean(0)))
    rng = np.random.default_rng(seed)
    drawn = np.stack(
        [_divided(_draw(scores, rng), _draw(nothing, rng).mean(0)) for _ in range(DRAWS)],
    )
    mean = drawn.mean(0)
    return Scores(probabilities=mean / mean.sum(1, keepdims=True), standard_error=drawn.std(0))


def _divided(probabilities: np.ndarray, nothing: np.ndarray) -> np.ndarray:
    ratio = probabilities / np.maximum(nothing, TINY)
    return ratio / ratio.sum(1, keepdims=True)


def _draw(scores: Scores, rng: np.random.Generator) -> np.ndarray:
    if scores.standard_error is None:
        return scores.probabilities
    mean, variance = scores.probabilities, (scores.standard_error**2).sum(1)
    spread = (mean * (1 - mean)).sum(1)
    concentration = np.maximum(spread / np.maximum(variance, TINY) - 1, 1e-3)
    gammas = rng.standard_gamma(concentration[:, None] * mean) + 1e-30
    return gammas / gammas.sum(1, keepdims=True)
