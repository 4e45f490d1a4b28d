"""Ways in which examples and queries go wrong, each with levels; what `jobs.evaluate_robustness` measures under.

Level `LEVELS[kind][0]` of every kind changes nothing. All draws come from the seed alone, and the examples drawn for a
seed are the same in every kind: a figure falls because of the perturbation and not because of other examples.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

LEVELS: dict[str, tuple[float, ...]] = {
    "label noise": (0, 0.1, 0.2, 0.3, 0.4),
    "embedding noise": (0, 0.5, 1, 2),
    "covariate shift": (0, 0.5, 1, 2),
    "class imbalance": (1, 3, 7, 15),
    "duplicates": (1, 2, 4, 8),
    "typos": (0, 0.1, 0.3, 0.6),
    "prefixes": (0, 1, 2, 4),
    "distractors": (0, 1, 2, 4),
}
MEANING = {
    "label noise": "share of the examples whose label is another class's, drawn at random",
    "embedding noise": "length of Gaussian noise on examples and queries, in root-mean-square distances from the mean",
    "covariate shift": "examples of a class favoured by exp(-level z), queries weighted by exp(+level z); z is the "
    "standardised leading principal component",
    "class imbalance": "examples of the most frequent class over those of the rarest; queries as they were",
    "duplicates": "times that a random quarter of the examples is given",
    "typos": "share of the queries' words of four letters or more with two letters swapped, one lost or one doubled",
    "prefixes": "phrases without content in front of each query",
    "distractors": "sentences about something else, before or behind each query",
}
AXIS = {
    "label noise": "share of labels",
    "embedding noise": "noise / spread",
    "covariate shift": "strength",
    "class imbalance": "most : fewest",
    "duplicates": "times given",
    "typos": "share of words",
    "prefixes": "phrases",
    "distractors": "sentences",
}
"""What a level is, in few words."""
TEXT_KINDS = ("typos", "prefixes", "distractors")
"""Change the queries' wording, so they need texts; the examples stay as they were."""

PREFIXES = (
    *("To be honest,", "Well,", "As I said before,", "Let me put it this way:", "You know,"),
    *("Here is the thing:", "If you ask me,", "So,", "For what it is worth,"),
)
DISTRACTORS = (
    "The train leaves at nine from platform four.",
    "My cousin has lived in that street since spring.",
    "The shop around the corner closes at six.",
    "There are two chairs and a table in the room.",
    "She wrote the number down on a piece of paper.",
    "The bus was almost empty this morning.",
    "He keeps his keys in the left pocket.",
    "It has rained in the north since Tuesday.",
)
_MAX_Z = 2.5
"""Weights of the covariate shift stop growing here, so that no single query decides."""


@dataclass(frozen=True, kw_only=True)
class Pool:
    """What examples and queries are drawn from; labels are indices into the set's classes."""

    train: np.ndarray
    """float32 [examples, width]"""
    train_labels: np.ndarray
    test: np.ndarray
    test_labels: np.ndarray
    test_texts: tuple[str, ...] | None = None
    """None where the set is vectors."""

    @property
    def num_classes(self) -> int:
        return int(self.train_labels.max()) + 1


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One draw of examples, the queries, and what each query weighs in the accuracy."""

    examples: np.ndarray
    labels: np.ndarray
    queries: np.ndarray
    truth: np.ndarray
    weights: np.ndarray = field(repr=False)


def draw(pool: Pool, kind: str, level: float, k: int, seed: int) -> Trial:
    """k examples (two a class where k is less), the queries, and the perturbation. Not the wording: see `reworded`."""
    z = _shift_axis(pool) if kind == "covariate shift" else (np.zeros(len(pool.train)), np.zeros(len(pool.test)))
    favour = -level * z[0]
    noise = np.random.default_rng([seed, 0]).gumbel(size=len(pool.train))
    order = np.argsort(-(favour + noise), kind="stable")
    counts = _counts(pool.num_classes, max(k, 2 * pool.num_classes), level if kind == "class imbalance" else 1, seed)
    of_class = [order[pool.train_labels[order] == c][:count] for c, count in enumerate(counts)]
    chosen = np.concatenate(of_class)
    trial = Trial(
        examples=pool.train[chosen],
        labels=pool.train_labels[chosen],
        queries=pool.test,
        truth=pool.test_labels,
        weights=np.exp(level * z[1]) if kind == "covariate shift" else np.ones(len(pool.test)),
    )
    rng = np.random.default_rng([seed, 1])
    if kind == "label noise":
        return replace(trial, labels=_mislabelled(trial.labels, level, pool.num_classes, rng))
    if kind == "embedding noise":
        size = level * float(np.sqrt(((pool.train - pool.train.mean(0)) ** 2).sum(1).mean() / pool.train.shape[1]))
        examples, queries = (
            (x + size * rng.standard_normal(x.shape)).astype(np.float32) for x in (trial.examples, trial.queries)
        )
        return replace(trial, examples=examples, queries=queries)
    if kind == "duplicates":
        repeated = rng.permutation(len(chosen))[: max(1, len(chosen) // 4)]
        again = np.concatenate([np.arange(len(chosen)), np.repeat(repeated, int(level) - 1)])
        return replace(trial, examples=trial.examples[again], labels=trial.labels[again])
    return trial


def reworded(texts: Sequence[str], kind: str, level: float, seed: int) -> list[str]:
    """The queries in other words, one of `TEXT_KINDS`. Level 0 gives the texts back."""
    rng = np.random.default_rng([seed, 2])
    if kind == "typos":
        return [_with_typos(text, level, rng) for text in texts]
    return [_surrounded(text, PREFIXES if kind == "prefixes" else DISTRACTORS, int(level), rng) for text in texts]


def balanced_accuracy(said: np.ndarray, trial: Trial) -> float:
    """Mean over classes of the weighted share of their queries that are answered rightly."""
    recalls = []
    for c in np.unique(trial.truth):
        own = trial.truth == c
        recalls.append(np.average(said[own] == c, weights=trial.weights[own]))
    return float(np.mean(recalls))


def _counts(num_classes: int, k: int, ratio: float, seed: int) -> list[int]:
    """Examples of each class, k in all and one at least: shares fall evenly, on a log scale, from `ratio` to 1."""
    shares = ratio ** np.linspace(1, 0, num_classes) / ratio
    shares = np.random.default_rng([seed, 3]).permutation(shares)
    exact = k * shares / shares.sum()
    counts = np.maximum(1, np.floor(exact).astype(int))
    while counts.sum() < k:  # to those that lost most by rounding
        counts[np.argmax(exact - counts)] += 1
    return counts.tolist()


def _mislabelled(labels: np.ndarray, share: float, num_classes: int, rng: np.random.Generator) -> np.ndarray:
    """At least one example of every class that is there keeps its label."""
    order = rng.permutation(len(labels))
    kept = {c: next(i for i in order if labels[i] == c) for c in np.unique(labels)}
    free = [i for i in order if i not in kept.values()]
    wrong = np.array(free[: round(share * len(labels))], dtype=int)
    changed = labels.copy()
    changed[wrong] = (labels[wrong] + rng.integers(1, num_classes, size=len(wrong))) % num_classes
    return changed


def _shift_axis(pool: Pool) -> tuple[np.ndarray, np.ndarray]:
    """z of the train and test vectors, cut at +-2.5."""
    mean = pool.train.mean(0)
    axis = np.linalg.svd(pool.train - mean, full_matrices=False)[2][0]
    axis *= np.sign(axis[np.abs(axis).argmax()])  # its sign would otherwise be the machine's
    along = (pool.train - mean) @ axis
    spread = along.std()
    z_train, z_test = (np.clip(x / spread, -_MAX_Z, _MAX_Z) for x in (along, (pool.test - mean) @ axis))
    return z_train, z_test


def _with_typos(text: str, share: float, rng: np.random.Generator) -> str:
    def change(match: re.Match[str]) -> str:
        word, hit = match[0], rng.random() < share
        at, how = int(rng.integers(1, len(word) - 2)), int(rng.integers(3))
        if not hit:
            return word
        if how == 0:
            return word[:at] + word[at + 1] + word[at] + word[at + 2 :]
        return word[:at] + word[at + 1 :] if how == 1 else word[: at + 1] + word[at:]

    return re.sub(r"[^\W\d_]{4,}", change, text)


def _surrounded(text: str, phrases: Sequence[str], count: int, rng: np.random.Generator) -> str:
    for at in rng.permutation(len(phrases))[:count].tolist():
        in_front = phrases is PREFIXES or rng.random() < 0.5
        text = f"{phrases[at]} {text}" if in_front else f"{text} {phrases[at]}"
    return text
