"""Part `prompts`: ten prompts of a task on SmolLM2, ranked without a label of the task, against their true accuracy.

True accuracy is over held-out texts; every score sees the same texts (and nothing of their labels), and all come from
the same log-probabilities. What else a score uses:

- `ours, data set`: labels of another data set that asks the same question of other texts (RELATED). The prompt's
  embedding is of its answers to the held-out texts, which are the space's probe texts; the data set's, of what the
  surrogate learnt from it.
- `ours, consensus`: nothing else; the leading factor of the prompts' similarities.
- `ours, common answers`: nothing else and no embedding; the same of the answers, label by label.
  The first two are weighed by the prompts' strength (`metasepia.embedding.ranking`); without it: `direction alone`.
- `mutual information` (Sorensen et al., ACL 2022), `global entropy`, `local entropy` (Lu et al., ACL 2022),
  `perplexity` of the prompts with their texts (SPELL; Gonen et al., EMNLP Findings 2023), negated, `MDL` (Wu et al.
  ACL 2023: the mean entropy of a text's own answer, negated: local entropy's order, reversed),
  and zero-label prompt selection (ZPS, Liao et al., 2022): agreement with the majority of all prompts, with the mean
  probability, and with the mean log-probability. None uses anything else.
"""

from argparse import Namespace
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.stats import rankdata

from benchmarks import datasets, report
from benchmarks.task_embeddings_answers import NUM_PERPLEXITY, NUM_TEST, PlainScorer, cut
from benchmarks.task_embeddings_tasks import LabelledTask, read_tasks
from benchmarks.task_embeddings_vectors import Bench, gram
from benchmarks.task_embeddings_wordings import TEN
from metasepia.embedding.answers import Answers
from metasepia.embedding.probes import ProbeTexts
from metasepia.embedding.ranking import common_answers, consensus, strength

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


def correlation(scores: np.ndarray, accuracy: np.ndarray) -> float:
    """Spearman's: of the ranks, equal values sharing theirs."""
    return float(np.corrcoef(rankdata(scores), rankdata(accuracy))[0, 1])


def entropy(probabilities: np.ndarray) -> np.ndarray:
    """Of each row, in nats."""
    return -(probabilities * np.log(np.clip(probabilities, 1e-12, 1))).sum(1)


OURS_DATA, OURS_CONSENSUS, OURS_ANSWERS = "ours, data set", "ours, consensus", "ours, common answers"
EXACT_CONSENSUS = "exact Gram, consensus"


def scores_of(
    name: str, bench: Bench, scorer: PlainScorer, arguments: Namespace
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Every score of the ten prompts of a data set, and their true accuracy."""
    one = datasets.read(arguments.data / f"{name}.parquet")
    assert one is not None, name
    test = one.sample_test(NUM_TEST)
    texts, labels = [text for text, _ in test], sorted(TEN[name][0].words)
    truth = np.array([labels.index(label) for _, label in test])
    found = [scorer.scores(wording, texts, num_perplexity=NUM_PERPLEXITY) for wording in TEN[name]]
    logprobs = [each["logprobs"] for each in found]
    accuracy = np.array([(one.argmax(1) == truth).mean() for one in logprobs])
    scores = baselines(logprobs, [float(each["perplexity"].mean()) for each in found])
    shown = [cut(text) for text in texts]
    place = {text: i for i, text in enumerate(dict.fromkeys(shown))}
    first = [shown.index(text) for text in place]  # a text once: they are the space's probes
    probes = ProbeTexts.of_texts(list(place))
    answers = [Answers.of_probabilities(probes.texts, labels, normalised(each[first])) for each in logprobs]
    related = related_to(name, arguments)
    strengths = np.array([strength(one) for one in answers])
    everything = [*answers, *([related] if related else [])]
    for method in bench.methods:
        vectors = bench.embed(method, everything, probes=probes).astype(np.float64)
        own = vectors[: len(answers)]
        scores[f"{OURS_CONSENSUS}, {method}"] = consensus(own @ own.T) * strengths
        scores[f"direction alone, consensus, {method}"] = consensus(own @ own.T)
        if related:
            scores[f"{OURS_DATA}, {method}"] = own @ vectors[-1] * strengths
            scores[f"direction alone, data set, {method}"] = own @ vectors[-1]
    scores[EXACT_CONSENSUS] = consensus(gram(answers)) * strengths
    scores[OURS_ANSWERS] = common_answers(answers)
    return scores, accuracy


def related_to(name: str, arguments: Namespace) -> Answers | None:
    """The labelled data set of RELATED, without any text that the target has."""
    other = RELATED.get(name)
    if other is None or not (arguments.data / f"{other}.parquet").is_file():
        return None
    task: LabelledTask = next(t for t in read_tasks(arguments.data, rules=False) if t.name == other)
    return Answers.of_labelled([text for text, _ in task.train], [label for _, label in task.train])


def prompts(bench: Bench, arguments: Namespace) -> list[report.Row]:
    """The part."""
    scorer = PlainScorer(arguments.home, arguments.runs)
    names = [name for name in TEN if (name in DEV_TASKS) == arguments.dev]
    names = [name for name in names if (arguments.data / f"{name}.parquet").is_file()]
    if not names:
        raise SystemExit(f"{arguments.data} holds none of {', '.join(f'{name}.parquet' for name in TEN)}")
    correlations: dict[str, dict[str, float]] = {}
    chosen: dict[str, dict[str, float]] = {}
    for name in names:
        scores, accuracy = scores_of(name, bench, scorer, arguments)
        print(f"  {name}: accuracies {np.round(np.sort(accuracy)[::-1], 2).tolist()}", flush=True)
        for side, each in scores.items():
            value = correlation(each, accuracy) if np.ptp(each) > 0 else 0.0
            correlations.setdefault(side, {})[name] = value
            chosen.setdefault(side, {})[name] = float(accuracy[int(np.argmax(each))])
        chosen.setdefault("the best prompt", {})[name] = float(accuracy.max())
        chosen.setdefault("a prompt at random", {})[name] = float(accuracy.mean())
    return [row for side in correlations for row in _rows(side, correlations, chosen, names)]


def _rows(
    side: str,
    correlations: Mapping[str, Mapping[str, float]],
    chosen: Mapping[str, Mapping[str, float]],
    names: Sequence[str],
) -> list[report.Row]:
    """Ours against the better of mutual information and perplexity on the same tasks; others stand alone."""
    own = correlations[side]
    where = [name for name in names if name in own]
    against = max(
        float(np.mean([correlations[other][name] for name in where])) for other in ("mutual information", "perplexity")
    )
    ours = side.startswith("ours")
    best, mean = (float(np.mean([chosen[of][n] for n in where])) for of in ("the best prompt", "a prompt at random"))
    picked = float(np.mean([chosen[side][name] for name in where]))
    each = ", ".join(f"{name} {own[name]:+.2f}" for name in where)
    note = f"{each}; accuracy of the prompt it picks {picked:.3f}, best {best:.3f}, mean {mean:.3f}"
    return [
        report.rate(
            f"prompts-{side.replace(', ', '-').replace(' ', '-').lower()}",
            f"ten prompts of a task on SmolLM2: Spearman with true accuracy, {side}",
            float(np.mean([own[name] for name in where])),
            against if ours else None,
            "Spearman",
            note,
            detail=side in ("global entropy", "local entropy", "MDL", "ZPS, mean probability", EXACT_CONSENSUS)
            or side.startswith("direction alone"),
            extra={"by_task": dict(own), "picked": dict(chosen[side])},
        )
    ]
