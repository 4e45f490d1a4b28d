"""Part `transfer`: which other task helps a target most, by the embeddings, against what helped when it was tried.

What helps: a source's linear head, a logistic regression on the encoder's frozen vectors of all its training texts,
is frozen too, and its standardised logits stand beside the vectors when the target is learnt from `PER_CLASS` examples
a class (fewer of many classes). The gain is the target's accuracy on held-out texts less that of the vectors alone,
over the same draws. SCALE was chosen on the targets in DEV_TARGETS among 0.3, 1 and 3, by two things: at 0.3 two halves
of the draws hardly agree on the sources' order, and at 3 they agree best, but because nearly every source harms; at 1
they agree and the best sources still gain. PER_CLASS was set without a trial.
Texts that the source and the target's held-out examples share are left out of the source.

A ranking is judged by NDCG, relevance being the gain less the smallest gain of that target, and by the rank of the best
source. Random is the expectation over all orders.
"""

import json
import os
import time
import warnings
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from sklearn.linear_model import LogisticRegression

from benchmarks import report
from benchmarks.datasets import balanced_order
from benchmarks.task_embeddings_tasks import EMBEDDED, LabelledTask, plain, read_tasks
from benchmarks.task_embeddings_vectors import Bench
from metasepia.digests import digest_of
from metasepia.embedding.answers import Answers

TARGETS = (
    *("sst2", "sst5", "rotten_tomatoes", "mpqa", "amazon_reviews_polarity", "sms_spam", "ag_news", "trec"),
    *("clinc150", "tweet_offensive", "hate_speech_davidson", "cola"),
)
DEV_TARGETS = ("tweet_emotion", "emotion6", "snips", "banking77", "mrpc", "rte")
PER_CLASS = 8
MOST_EXAMPLES = 160
"""Of a draw; classes get fewer where there are many, one at least."""
SCALE = 1.0
"""Norm of a source's standardised logits beside the unit-norm vector, root mean square over texts."""
DRAWS = 24
RESAMPLES = 10_000


Embed = Callable[[list[str]], np.ndarray]


@dataclass(frozen=True)
class Gains:
    """By target: the sources and what each gained, a row a draw."""

    sources: Mapping[str, tuple[str, ...]]
    draws: Mapping[str, np.ndarray]
    """[draws, sources] accuracy points as fractions."""
    alone: Mapping[str, float]

    def of(self, target: str) -> np.ndarray:
        return self.draws[target].mean(0)

    def reliability(self, target: str) -> float:
        """Correlation of the sources' gains between even and odd draws."""
        each = self.draws[target]
        return float(np.corrcoef(each[::2].mean(0), each[1::2].mean(0))[0, 1])


def head(vectors: np.ndarray, labels: Sequence[str], strength: float = 10.0) -> LogisticRegression:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of convergence: 1000 steps are enough to rank by
        return LogisticRegression(C=strength, max_iter=1000).fit(vectors, labels)


def truths(
    tasks: Sequence[LabelledTask],
    vectors_of: Embed,
    targets: Sequence[str],
    folder: Path,
    *,
    per_class: int = PER_CLASS,
    scale: float = SCALE,
    draws: int = DRAWS,
) -> Gains:
    """What every source gains every target; each target from its file where it was measured before."""
    by_name = {task.name: task for task in tasks}
    sources: dict[str, tuple[str, ...]] = {}
    found: dict[str, np.ndarray] = {}
    alone: dict[str, float] = {}
    for target in targets:
        names = tuple(name for name in by_name if name != target)
        header = {
            "kind": "transfer gains",
            "target": _digest(by_name[target]),
            "sources": [_digest(by_name[name]) for name in names],
            "settings": [per_class, scale, draws, MOST_EXAMPLES],
        }
        path = folder / f"transfer-{target}-{digest_of(header)[:12]}.json"
        if not path.is_file():
            began = time.process_time()
            base, gains = _measure(by_name[target], [by_name[n] for n in names], vectors_of, per_class, scale, draws)
            kept = {"target": target, "sources": names, "alone": base, "gains": gains.tolist()}
            scratch = path.with_suffix(f".{os.getpid()}.part")
            scratch.write_text(json.dumps(kept) + "\n")
            scratch.replace(path)
            print(f"  {target}: alone {base:.3f}, {time.process_time() - began:.0f} s CPU", flush=True)
        kept = json.loads(path.read_text())
        sources[target], found[target] = names, np.asarray(kept["gains"])
        alone[target] = kept["alone"]
    return Gains(sources, found, alone)


def _measure(
    target: LabelledTask, sources: Sequence[LabelledTask], vectors_of: Embed, per_class: int, scale: float, draws: int
) -> tuple[float, np.ndarray]:
    train, labels = vectors_of([text for text, _ in target.train]), [label for _, label in target.train]
    test, truth = vectors_of([text for text, _ in target.held_out]), np.array([label for _, label in target.held_out])
    known = {plain(text) for text, _ in (*target.held_out, *target.train)}
    beside: list[tuple[np.ndarray, np.ndarray]] = []
    for source in sources:
        own = [(text, label) for text, label in source.train if plain(text) not in known]
        vectors = vectors_of([text for text, _ in own])
        fitted = head(vectors, [label for _, label in own])
        seen = logits(fitted, vectors)
        centre, spread = seen.mean(0), seen.std(0) + 1e-9
        weight = scale / np.sqrt(seen.shape[1])
        beside.append(tuple((logits(fitted, v) - centre) / spread * weight for v in (train, test)))  # pyright: ignore
    classes = len(target.labels)
    number = classes * max(1, min(per_class, MOST_EXAMPLES // classes))
    gains = np.empty((draws, len(sources)))
    base = np.empty(draws)
    for draw in range(draws):
        chosen = balanced_order(labels, seed=100 + draw)[:number]
        few = [labels[int(i)] for i in chosen]
        base[draw] = np.mean(np.asarray(head(train[chosen], few).predict(test)) == truth)
        for place, (a, b) in enumerate(beside):
            fitted = head(np.hstack([train[chosen], a[chosen]]), few)
            gains[draw, place] = np.mean(np.asarray(fitted.predict(np.hstack([test, b]))) == truth) - base[draw]
    return float(base.mean()), gains


def logits(fitted: LogisticRegression, vectors: np.ndarray) -> np.ndarray:
    """[texts, classes]; two classes have one column."""
    return vectors @ np.asarray(fitted.coef_).T + np.asarray(fitted.intercept_)


def _digest(task: LabelledTask) -> str:
    return digest_of({"train": [list(one) for one in task.train], "held_out": [list(one) for one in task.held_out]})


def ndcg(scores: np.ndarray, gains: np.ndarray) -> float:
    """Of the order of `scores`, relevance being gains less the smallest; 1 where no source differs from another."""
    relevance = gains - gains.min()
    discounts = 1 / np.log2(np.arange(len(gains)) + 2)
    ideal = np.sort(relevance)[::-1] @ discounts
    return float(relevance[np.argsort(-scores, kind="stable")] @ discounts / ideal) if ideal > 0 else 1.0


def random_ndcg(gains: np.ndarray) -> float:
    relevance = gains - gains.min()
    discounts = 1 / np.log2(np.arange(len(gains)) + 2)
    ideal = np.sort(relevance)[::-1] @ discounts
    return float(relevance.mean() * discounts.sum() / ideal) if ideal > 0 else 1.0


def rank_of_best(scores: np.ndarray, gains: np.ndarray) -> float:
    """1 is first; among equal scores the mean of their places."""
    best = scores[int(gains.argmax())]
    return float((scores > best).sum() + ((scores == best).sum() + 1) / 2)


CENTROID = "text centroid"


def transfer(bench: Bench, arguments: Namespace) -> list[report.Row]:
    """The part."""
    tasks = [task for task in read_tasks(arguments.data, rules=False) if task.name != "trec_fine"]
    names = [task.name for task in tasks]
    targets = [name for name in (DEV_TARGETS if arguments.dev else TARGETS) if name in names]
    gains = truths(tasks, bench.encoder.embed, targets, bench.folder)
    shown = [(*task.halves[0][:EMBEDDED], *task.halves[1][:EMBEDDED]) for task in tasks]
    answers = [Answers.of_labelled(*zip(*examples, strict=True)) for examples in shown]
    centroids = bench.centroids([one.texts for one in answers])
    similarities = {CENTROID: centroids @ centroids.T}
    for method in bench.methods:
        vectors = bench.embed(method, answers).astype(np.float64)
        similarities[method] = vectors @ vectors.T
    found: dict[str, dict[str, list[float]]] = {}
    for side, similarity in similarities.items():
        for target in targets:
            scores = np.array([similarity[names.index(target), names.index(one)] for one in gains.sources[target]])
            of = gains.of(target)
            found.setdefault(side, {})[target] = [
                ndcg(scores, of),
                rank_of_best(scores, of),
                float(of[scores.argmax()]),
            ]
    found["random"] = {
        target: [random_ndcg(of := gains.of(target)), (len(of) + 1) / 2, float(of.mean())] for target in targets
    }
    rows = [row for side in similarities for row in _rows(side, found, targets, gains)]
    reliable = ", ".join(f"{name} {gains.reliability(name):.2f}" for name in targets)
    best = float(np.mean([gains.of(name).max() for name in targets]))
    note = f"{len(tasks) - 1} sources each, {gains.draws[targets[0]].shape[0]} draws; agreement of two halves of the "
    note += f"draws on the sources: {reliable}"
    rows.append(
        report.figure("transfer-best-gain", "gain of the best source, mean over targets", best, "accuracy", note)
    )
    return rows


def _rows(
    side: str, found: Mapping[str, Mapping[str, Sequence[float]]], targets: Sequence[str], gains: Gains
) -> list[report.Row]:
    rows = []
    for place, (id, what, unit, make) in enumerate(
        (
            ("ndcg", "NDCG of the sources' order", "NDCG", report.rate),
            ("rank", "place of the best source", "place", report.duration),
            ("gain", "gain of the source it puts first", "accuracy", report.figure),
        )
    ):
        own, centroid, chance = (
            np.array([found[of][target][place] for target in targets]) for of in (side, CENTROID, "random")
        )
        each = ", ".join(f"{target} {value:.3g}" for target, value in zip(targets, own, strict=True))
        note = f"random {chance.mean():.3g}; {each}"
        if side != CENTROID:
            low, high = difference(own, centroid)
            note = (
                f"less the text centroid's {own.mean() - centroid.mean():+.3f}, 95 % {low:+.3f} to {high:+.3f}; {note}"
            )
        against = {} if id == "gain" else {"against": float(centroid.mean()) if side != CENTROID else None}
        rows.append(
            make(
                f"transfer-{id}-{side.replace(' ', '-')}",
                f"transfer, {what}, {len(targets)} targets: {side}",
                ours=float(own.mean()),
                **against,
                unit=unit,
                note=note,
                detail=id == "gain",
                extra={"by_target": dict(zip(targets, own.tolist(), strict=True)), "random": float(chance.mean())},
            )
        )
    return rows


def difference(ours: np.ndarray, against: np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean difference, a paired bootstrap over targets."""
    drawn = np.random.default_rng(0).integers(len(ours), size=(RESAMPLES, len(ours)))
    low, high = np.quantile((ours - against)[drawn].mean(1), [0.025, 0.975])
    return float(low), float(high)
