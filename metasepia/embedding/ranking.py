"""Ranking by task embeddings: candidate prompts of a model without the target's labels, source tasks for a target.

Two rankings of prompts, by what there is:

- `by_data_set`: the cosine of a prompt's embedding to that of a labelled data set which asks the same question, of
  other texts (FUTE's choice, arXiv:2402.14522, section 5).
- `by_consensus`: nothing but the prompts themselves. Prompts that do the task agree with each other, and those that do
  not fail each in its own way, so the leading eigenvector of their similarities tells how much of the common task each
  holds; for two labels and independent errors its entries are proportional to balanced accuracy less chance (Parisi et
  al., PNAS 2014). It fails where most prompts fail alike.

numpy only. Everything compares embeddings of one space and raises DifferentSpaces otherwise.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from metasepia.embedding.space import TaskEmbedding, cosines
from metasepia.errors import InvalidRequest

FEWEST_FOR_CONSENSUS = 3
"""Two agree with each other equally, whichever is right."""


@dataclass(frozen=True)
class Ranked:
    """A candidate in its place."""

    embedding: TaskEmbedding
    score: float
    """The larger, the better; of use within one ranking."""
    place: int
    """0 is the best."""


def by_data_set(prompts: Sequence[TaskEmbedding], data_set: TaskEmbedding) -> list[Ranked]:
    """Candidates by cosine to the embedding of a data set that asks the same question, the best first."""
    return _ranked(prompts, cosines(data_set, list(prompts)).astype(np.float64))


def by_consensus(prompts: Sequence[TaskEmbedding]) -> list[Ranked]:
    """Candidates by how much they share with the others, the best first; no label and no data set is needed.

    Raises InvalidRequest for fewer than `FEWEST_FOR_CONSENSUS`.
    """
    if len(prompts) < FEWEST_FOR_CONSENSUS:
        raise InvalidRequest(
            "prompts", f"{FEWEST_FOR_CONSENSUS} or more are needed to tell who agrees with whom, got {len(prompts)}"
        )
    similarity = np.stack([cosines(one, list(prompts)) for one in prompts]).astype(np.float64)
    return _ranked(prompts, consensus(similarity))


def rank_sources(target: TaskEmbedding, sources: Sequence[TaskEmbedding]) -> list[Ranked]:
    """Tasks to transfer from, by cosine to the target, the best first. The target itself is left out."""
    others = [one for one in sources if one.digest != target.digest]
    return _ranked(others, cosines(target, others).astype(np.float64))


def consensus(similarity: Float[np.ndarray, "tasks tasks"]) -> Float[np.ndarray, " tasks"]:
    """The loading of each on what all share: the rank-one part v v^T nearest to the similarities off the diagonal.

    The diagonal says nothing (everything is like itself), so it is filled in by v_i^2 and v found again until it stands
    (principal factor analysis). Entries sum to at least 0; negative ones are against the others.
    """
    number = len(similarity)
    symmetric = (similarity + similarity.T) / 2
    loading = np.zeros(number)
    filled = symmetric.copy()
    np.fill_diagonal(filled, np.abs(symmetric - np.diag(np.diag(symmetric))).max(1, initial=0.0))
    for _ in range(200):
        values, vectors = np.linalg.eigh(filled)
        found = vectors[:, -1] * np.sqrt(max(float(values[-1]), 0.0))
        found = -found if found.sum() < 0 else found
        moved = float(np.abs(found - loading).max(initial=0.0))
        loading = found
        np.fill_diagonal(filled, np.minimum(loading**2, 1.0))
        if moved < 1e-9:
            break
    return loading


def _ranked(candidates: Sequence[TaskEmbedding], scores: Float[np.ndarray, " candidates"]) -> list[Ranked]:
    """Best first; equal scores in the order given."""
    order = np.argsort(-scores, kind="stable")
    return [Ranked(candidates[int(i)], float(scores[i]), place) for place, i in enumerate(order)]
