"""Ranking of prompts and sources: against accuracies that are known because the answers are made."""

import numpy as np
import pytest

from metasepia.embedding import ranking
from metasepia.embedding.answers import Answers
from metasepia.embedding.space import Space, TaskEmbedding
from metasepia.errors import DifferentSpaces, InvalidRequest

TEXTS = tuple(f"text {i}" for i in range(200))
SPACE = Space(surrogate="0" * 64, method="agreement", settings={}, probes="1" * 64)


def embedding(vector: np.ndarray, name: str = "task", space: Space = SPACE) -> TaskEmbedding:
    unit = (vector / np.linalg.norm(vector)).astype(np.float32)
    return TaskEmbedding(space=space, vector=unit, kind="prompt", name=name, source={})


def noisy_answers(accuracies: list[float], *, task_seed: int = 0, noise_seed: int = 1) -> list[Answers]:
    """Two labels; each list entry a prompt that is right so often, its mistakes its own."""
    truth = np.random.default_rng(task_seed).integers(2, size=len(TEXTS))
    made = []
    for place, accuracy in enumerate(accuracies):
        right = np.random.default_rng([noise_seed, place]).random(len(TEXTS)) < accuracy
        said = np.where(right, truth, 1 - truth)
        made.append(Answers.of_probabilities(TEXTS, ["a", "b"], np.eye(2)[said] * 0.8 + 0.1))
    return made


def grams(answers: list[Answers]) -> list[TaskEmbedding]:
    return [embedding(ranking.u_centred(one.probabilities).ravel(), f"{i}") for i, one in enumerate(answers)]


ACCURACIES = [0.55, 0.95, 0.7, 0.85, 0.6, 0.78]


def test_consensus_puts_prompts_in_the_order_of_their_accuracy_without_a_label():
    found = ranking.by_consensus(grams(noisy_answers(ACCURACIES)))
    assert [one.embedding.name for one in found][:4] == ["1", "3", "5", "2"]
    assert [one.place for one in found] == list(range(6))
    assert sorted((one.score for one in found), reverse=True) == [one.score for one in found]


def test_consensus_loadings_of_one_common_factor_are_found_exactly():
    loadings = np.array([0.9, 0.7, 0.5, 0.3, 0.1])
    similarity = np.outer(loadings, loadings)
    np.fill_diagonal(similarity, 1)
    np.testing.assert_allclose(ranking.consensus(similarity), loadings, atol=1e-4)


def test_a_prompt_that_hardly_moves_ranks_last_once_its_answers_are_given():
    answers = noisy_answers([0.9, 0.85, 0.8, 0.75])
    flat = Answers.of_probabilities(TEXTS, ["a", "b"], answers[0].probabilities * 0.01 + 0.495)
    prompts = grams([*answers, flat])
    assert ranking.by_consensus(prompts)[-1].embedding.name != "4"
    assert ranking.by_consensus(prompts, [*answers, flat])[-1].embedding.name == "4"


def test_common_answers_notice_swapped_labels_and_embeddings_do_not():
    answers = noisy_answers([0.9, 0.85, 0.8, 0.95])
    swapped = Answers.of_probabilities(TEXTS, ["b", "a"], answers[3].probabilities)
    given = [*answers[:3], swapped]
    assert ranking.common_answers(given).argmin() == 3
    assert ranking.common_answers(given)[3] < 0
    assert ranking.by_consensus(grams(given), given)[-1].embedding.name != "3"


def test_a_related_data_set_puts_the_nearest_prompt_first_and_names_of_labels_play_no_part():
    answers = noisy_answers(ACCURACIES)
    truth = noisy_answers([1.0])[0]
    renamed = Answers.of_probabilities(TEXTS, ["zebra", "yak"], truth.probabilities)
    found = ranking.by_data_set(grams(answers), grams([renamed])[0])
    assert [one.embedding.name for one in found][:4] == ["1", "3", "5", "2"]


def test_sources_are_ranked_by_cosine_and_the_target_is_not_its_own_source():
    target = embedding(np.array([1.0, 0, 0]), "target")
    near, far = embedding(np.array([1.0, 0.2, 0]), "near"), embedding(np.array([0.1, 1, 0]), "far")
    found = ranking.rank_sources(target, [far, target, near])
    assert [one.embedding.name for one in found] == ["near", "far"]


def test_embeddings_of_different_spaces_are_not_ranked():
    other = Space(surrogate="2" * 64, method="agreement", settings={}, probes="1" * 64)
    prompts = [embedding(np.eye(3)[i], f"{i}") for i in range(2)]
    with pytest.raises(DifferentSpaces):
        ranking.by_consensus([*prompts, embedding(np.eye(3)[2], "2", other)])


@pytest.mark.parametrize("count", [0, 1, 2])
def test_too_few_for_a_consensus_are_refused_in_words(count: int):
    with pytest.raises(InvalidRequest, match="3 or more are needed"):
        ranking.by_consensus([embedding(np.eye(3)[i]) for i in range(count)])
    with pytest.raises(InvalidRequest, match="3 prompts or more are needed"):
        ranking.common_answers(noisy_answers([0.9] * count))


def test_answers_of_other_texts_or_too_few_are_refused():
    answers = noisy_answers([0.9, 0.8, 0.7])
    with pytest.raises(InvalidRequest, match="one a prompt"):
        ranking.by_consensus(grams(answers), answers[:2])
    other = Answers.of_probabilities(tuple(f"other {t}" for t in TEXTS), ["a", "b"], answers[0].probabilities)
    with pytest.raises(InvalidRequest, match=r"answers\[2\]"):
        ranking.common_answers([*answers[:2], other])


def test_open_answers_have_no_strength():
    replies = Answers.of_replies(TEXTS[:3], ["a", "b", "c"])
    with pytest.raises(InvalidRequest, match="no strength"):
        ranking.strength(replies)


def test_strength_is_the_root_mean_square_of_the_centred_gram():
    sure = noisy_answers([0.9])[0]
    half = Answers.of_probabilities(TEXTS, ["a", "b"], sure.probabilities * 0.5 + 0.25)
    assert ranking.strength(half) == pytest.approx(ranking.strength(sure) / 4, rel=1e-4)
