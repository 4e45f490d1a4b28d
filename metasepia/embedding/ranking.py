"""Ranking by task embeddings: candidate prompts of a model without the target's labels, source tasks for a target.

Rankings of prompts, by what there is:

- `by_data_set`: the cosine of a prompt's embedding to that of a labelled data set which asks the same question, of
  other texts (FUTE's choice, arXiv:2402.14522, section 5).
- `by_consensus`: nothing but the prompts themselves. Prompts that do the task agree with each other, and those that do
  not fail each in its own way, so the leading factor of their similarities tells how much of the common task each
  holds; for two labels and independent errors its entries are proportional to balanced accuracy less chance (Parisi et
  al., PNAS 2014). It fails where most prompts fail alike.
- `common_answers`: the same of the answers themselves, label by label.

An embedding tells direction alone: a prompt that answers almost alike whatever the text has one of full length. Given
the answers, the first two weigh each prompt by its `strength`. Embeddings know no label names, so a prompt that mixes
up two labels all the time ranks high in both; only `common_answers` notices, where most prompts do not.

numpy only. Everything compares embeddings of one space and raises DifferentSpaces otherwise.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from metasepia.embedding.agreement import u_centred
from metasepia.embedding.answers import Answers
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


def by_data_set(
    prompts: Sequence[TaskEmbedding], data_set: TaskEmbedding, answers: Sequence[Answers] | None = None
) -> list[Ranked]:
    """Candidates by cosine to the embedding of a data set that asks the same question, the best first.

    `answers`: what each prompt said of the same texts; the cosine is then multiplied by the prompt's strength.
    """
    return _ranked(prompts, cosines(data_set, list(prompts)).astype(np.float64) * _strengths(prompts, answers))


def by_consensus(prompts: Sequence[TaskEmbedding], answers: Sequence[Answers] | None = None) -> list[Ranked]:
    """Candidates by how much they share with the others, the best first; no label and no data set is needed.

    `answers`: what each said of the same texts; a prompt's share is then multiplied by its strength. Raises
    InvalidRequest for fewer than `FEWEST_FOR_CONSENSUS`.
    """
    if len(prompts) < FEWEST_FOR_CONSENSUS:
        raise InvalidRequest(
            "prompts", f"{FEWEST_FOR_CONSENSUS} or more are needed to tell who agrees with whom, got {len(prompts)}"
        )
    similarity = np.stack([cosines(one, list(prompts)) for one in prompts]).astype(np.float64)
    return _ranked(prompts, consensus(similarity) * _strengths(prompts, answers))


def rank_sources(target: TaskEmbedding, sources: Sequence[TaskEmbedding]) -> list[Ranked]:
    """Tasks to transfer from, by cosine to the target, the best first. The target itself is left out."""
    others = [one for one in sources if one.digest != target.digest]
    return _ranked(others, cosines(target, others).astype(np.float64))


def strength(answers: Answers) -> float:
    """How much the answers differ from text to text: root mean square over pairs of texts of the U-centred Gram matrix.

    0 where every text gets the same answer. Raises InvalidRequest for open answers, which have no probabilities.
    """
    if answers.is_open:
        raise InvalidRequest("answers", "open answers have no strength; leave `answers` out")
    return float(np.sqrt((u_centred(answers.probabilities) ** 2).mean()))


def common_answers(answers: Sequence[Answers]) -> Float[np.ndarray, " prompts"]:
    """A score for each of several prompts' answers to the same texts with the same labels, the larger the better.

    Of the centred answers Z (probabilities less their mean over texts) the similarity is <Z_i, Z_j> / (|Z_i| |Z_j|);
    the score is the loading on its leading factor times |Z_i| per text. A prompt that mixes up labels which the others
    do not has a negative one. Raises InvalidRequest where texts or labels differ, or for fewer than
    `FEWEST_FOR_CONSENSUS`.
    """
    if len(answers) < FEWEST_FOR_CONSENSUS:
        raise InvalidRequest("answers", f"of {FEWEST_FOR_CONSENSUS} prompts or more are needed, got {len(answers)}")
    for i, one in enumerate(answers):
        if one.is_open or (one.texts, one.labels) != (answers[0].texts, answers[0].labels):
            raise InvalidRequest(f"answers[{i}]", "must be of the same texts and labels as the first's, and no replies")
    centred = np.stack([(one.probabilities - one.probabilities.mean(0)).ravel() for one in answers]).astype(np.float64)
    norms = np.linalg.norm(centred, axis=1)
    unit = centred / np.where(norms > 1e-9, norms, 1)[:, None]
    return consensus(unit @ unit.T) * norms / np.sqrt(answers[0].num_texts)


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


def _strengths(prompts: Sequence[TaskEmbedding], answers: Sequence[Answers] | None) -> np.ndarray:
    if answers is None:
        return np.ones(len(prompts))
    if len(answers) != len(prompts) or any(one.texts != answers[0].texts for one in answers):
        raise InvalidRequest(
            "answers", f"one a prompt, to the same texts: {len(prompts)} prompts, {len(answers)} answers"
        )
    return np.array([strength(one) for one in answers])


def _ranked(candidates: Sequence[TaskEmbedding], scores: Float[np.ndarray, " candidates"]) -> list[Ranked]:
    """Best first; equal scores in the order given."""
    order = np.argsort(-scores, kind="stable")
    return [Ranked(candidates[int(i)], float(scores[i]), place) for place, i in enumerate(order)]
