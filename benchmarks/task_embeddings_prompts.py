"""Part `prompts`: ten prompts of a task on SmolLM2, ranked without a label of the task, against their true accuracy.

True accuracy is over held-out texts; every score sees the same texts (and nothing of their labels), and all come from
the same log-probabilities. What else a score uses:

- `ours, data set`: labels of another data set that asks the same question of other texts (RELATED). The prompt's
  embedding is of its answers to the held-out texts, which are the space's probe texts; the data set's, of what the
  surrogate learnt from it.
- `ours, consensus`: nothing else; the leading factor of the prompts' similarities.
- `mutual information` (Sorensen et al., ACL 2022), `global entropy`, `local entropy` (Lu et al., ACL 2022),
  `perplexity` of the prompts with their texts (SPELL; Gonen et al., EMNLP Findings 2023), negated, `MDL` (Wu et al., ACL
  2023: the mean entropy of a text's own answer, negated; as a choice for all texts it orders as local entropy does),
  and zero-label prompt selection (ZPS, Liao et al., 2022): agreement with the majority of all prompts, with the mean
  probability, and with the mean log-probability. None uses anything else.
"""

from argparse import Namespace
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.stats import spearmanr

from benchmarks import datasets, report
from benchmarks.task_embeddings_answers import NUM_PERPLEXITY, NUM_TEST, PlainScorer, cut
from benchmarks.task_embeddings_tasks import FAMILY, LabelledTask, read_tasks
from benchmarks.task_embeddings_vectors import Bench, gram
from benchmarks.task_embeddings_wordings import TEN
from metasepia.embedding.answers import Answers
from metasepia.embedding.probes import ProbeTexts
from metasepia.embedding.ranking import consensus

DEV_TASKS = ("trec", "tweet_emotion")
"""For choosing between scores of ours."""
RELATED: Mapping[str, str] = {
    "sst2": "amazon_reviews_polarity",
    "tweet_offensive": "hate_speech_davidson",
    "tweet_emotion": "emotion6",
}
RESAMPLES = 10_000


def baselines(logprobs: Sequence[np.ndarray], perplexity: Sequence[float]) -> dict[str, np.ndarray]:
    """By name, a score a prompt, the larger the better. `logprobs`: [texts, labels] each, labels in one order."""
    probabilities = [normalised(one) for one in logprobs]
    local = np.array([entropy(one).mean() for one in probabilities])
    overall = np.array([entropy(one.mean(0, keepdims=True))[0] for one in probabilities])
    said = np.stack([one.argmax(1) for one in probabilities])  # [prompts, texts]
    counts = np.stack([(said == label).sum(0) for label in range(probabilities[0].shape[1])], axis=1)
    majority = counts.argmax(1)
    by_mean = np.mean(probabilities, axis=0).argmax(1)
    by_log = np.mean([np.log(one + 1e-12) for one in probabilities], axis=0).argmax(1)
    predicted = np.stack([np.bincount(one, minlength=probabilities[0].shape[1]) / said.shape[1] for one in said])
    return {
        "mutual information": overall - local,
        "global entropy": entropy(predicted),
        "local entropy": local,
        "MDL": -local,
        "perplexity": -np.asarray(perplexity),
        "ZPS, majority": (said == majority).mean(1),
        "ZPS, mean probability": (said == by_mean).mean(1),
        "ZPS, mean log-probability": (said == by_log).mean(1),
    }


def normalised(logprobs: np.ndarray) -> np.ndarray:
    shifted = np.exp(logprobs - logprobs.max(1, keepdims=True))
    return shifted / shifted.sum(1, keepdims=True)


def entropy(probabilities: np.ndarray) -> np.ndarray:
    """Of each row, in nats."""
    return -(probabilities * np.log(np.clip(probabilities, 1e-12, 1))).sum(1)
