"""What a task says of texts: a labelled data set, or a black box's answers. All that an embedding is made of.

A data set, a model and a prompt on a model are embedded by behaviour alone (FUTE, arXiv:2402.14522), so they meet here
in one form: texts, and for each of them a distribution over labels or an open reply.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float

from metasepia.digests import digest_of
from metasepia.errors import InvalidRequest

MAX_EXAMPLES = 20_000
"""Texts that one embedding is made of at most; of a larger data set a part is drawn, where the caller says so."""
MAX_LABELS = 1_000
ROUNDING = 1e-3
"""How far a row of probabilities may be from summing to one; rows are then divided by their sums."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Answers:
    """Texts and what a task says of each. `of_...` puts things into this form; the constructor only checks it.

    Raises InvalidRequest for what cannot be embedded, naming the field.
    """

    texts: tuple[str, ...]
    """At least two; a text may be there twice."""
    labels: tuple[str, ...]
    """Sorted, so that their order carries nothing; () for open answers."""
    probabilities: Float[np.ndarray, "texts labels"]
    """float32, rows on the simplex; one-hot for a data set, [texts, 0] for open answers."""
    standard_error: Float[np.ndarray, "texts labels"] | None = None
    """Of the probabilities, by sampling; None: they are exact."""
    replies: tuple[str, ...] = ()
    """Open answers, one a text."""
    notes: tuple[str, ...] = ()
    """How the answers came about where not all is as given, for people to read; no part of the digest."""

    def __post_init__(self) -> None:
        if len(self.texts) < 2:
            raise InvalidRequest("texts", f"a task is told by two texts or more, got {len(self.texts)}")
        if len(self.texts) > MAX_EXAMPLES:
            raise InvalidRequest("texts", _too_many(len(self.texts)))
        for name, given in (("texts", self.texts), ("labels", self.labels), ("replies", self.replies)):
            _check_strings(name, given)
        for i, text in enumerate(self.texts):
            if not text.strip():
                raise InvalidRequest(f"texts[{i}]", "it is empty")
        if self.is_open:
            _check_open(self)
        else:
            _check_labelled(self)

    @classmethod
    def of_labelled(
        cls, texts: Sequence[str], labels: Sequence[str], *, most: int | None = None, seed: int = 0
    ) -> "Answers":
        """A labelled data set, one label a text.

        Of more than `most` examples that many are drawn by `seed`, each label's share kept and no label lost; None
        takes all, and raises InvalidRequest beyond MAX_EXAMPLES. Raises InvalidRequest also for an empty data set, one
        that has a single label, or that has more than MAX_LABELS.
        """
        if len(texts) != len(labels):
            raise InvalidRequest("labels", f"one a text is needed: there are {len(texts)} texts, {len(labels)} labels")
        if not texts:
            raise InvalidRequest("texts", "the data set is empty")
        _check_strings("labels", labels)
        names: tuple[str, ...] = tuple(sorted(set(labels)))
        if len(names) == 1:
            raise InvalidRequest(
                "labels",
                f"every text has the label {names[0]!r}; a task is what tells texts apart, so two labels are needed",
            )
        _check_num_labels(names)
        if most is not None and not len(names) <= most <= MAX_EXAMPLES:
            raise InvalidRequest("most", f"must be between the {len(names)} labels and {MAX_EXAMPLES}, got {most}")
        if most is None and len(texts) > MAX_EXAMPLES:
            raise InvalidRequest("texts", _too_many(len(texts)))
        notes: tuple[str, ...] = ()
        if most is not None and len(texts) > most:
            chosen = _stratified(labels, most, seed)
            notes = (f"{most} of {len(texts)} examples, drawn by seed {seed} with each label's share kept",)
            texts, labels = [texts[i] for i in chosen], [labels[i] for i in chosen]
        places = {name: i for i, name in enumerate(names)}
        probabilities = np.zeros((len(texts), len(names)), np.float32)
        probabilities[np.arange(len(texts)), [places[label] for label in labels]] = 1
        return cls(texts=tuple(texts), labels=names, probabilities=probabilities, notes=notes)

    @classmethod
    def of_probabilities(
        cls,
        texts: Sequence[str],
        labels: Sequence[str],
        probabilities: Float[np.ndarray, "texts labels"],
        standard_error: Float[np.ndarray, "texts labels"] | None = None,
    ) -> "Answers":
        """Soft answers with the labels in any order; rows are divided by their sums, which ROUNDING bounds."""
        if probabilities.ndim != 2 or probabilities.shape != (len(texts), len(labels)):
            raise InvalidRequest(
                "probabilities", f"must be of shape [{len(texts)}, {len(labels)}], got {list(probabilities.shape)}"
            )
        order = sorted(range(len(labels)), key=lambda i: labels[i])
        given = np.asarray(probabilities, np.float64)[:, order]
        _check_simplex(given)
        return cls(
            texts=tuple(texts),
            labels=tuple(labels[i] for i in order),
            probabilities=(given / given.sum(1, keepdims=True)).astype(np.float32),
            standard_error=None if standard_error is None else standard_error[:, order].astype(np.float32),
        )

    @classmethod
    def of_counts(
        cls, texts: Sequence[str], labels: Sequence[str], counts: Float[np.ndarray, "texts labels"]
    ) -> "Answers":
        """Soft answers out of how often each label was drawn: mean and deviation under Jeffreys' prior.

        With k of n draws and L labels, p = (k + 1/2) / (n + L/2) and se^2 = p (1 - p) / (n + L/2 + 1). A text with no
        valid draw says nothing: uniform, and its error is that of the prior. Raises InvalidRequest for counts that are
        negative or not finite.
        """
        if not (np.isfinite(counts).all() and (counts >= 0).all()):
            raise InvalidRequest("counts", "must be finite and not negative")
        weights = counts.astype(np.float64) + 0.5
        total = weights.sum(1, keepdims=True)
        mean = weights / total
        return cls.of_probabilities(texts, labels, mean, np.sqrt(mean * (1 - mean) / (total + 1)))

    @classmethod
    def of_replies(cls, texts: Sequence[str], replies: Sequence[str]) -> "Answers":
        """Open answers, one a text."""
        return cls(
            texts=tuple(texts),
            labels=(),
            probabilities=np.zeros((len(texts), 0), np.float32),
            replies=tuple(replies),
        )

    @property
    def is_open(self) -> bool:
        return not self.labels

    @property
    def num_texts(self) -> int:
        return len(self.texts)

    @property
    def is_constant(self) -> bool:
        """Every text gets the same answer, so the task tells no two texts apart and has no place in any space."""
        if self.is_open:
            return len(set(self.replies)) == 1
        return bool(np.ptp(self.probabilities, axis=0).max() < 1e-6)

    @cached_property
    def digest(self) -> str:
        header = {
            "kind": "answers",
            "texts": list(self.texts),
            "labels": list(self.labels),
            "replies": list(self.replies),
        }
        tensors = {"probabilities": self.probabilities}
        if self.standard_error is not None:
            tensors["standard_error"] = self.standard_error
        return digest_of(header, tensors)

    def redrawn(self, seed: int) -> "Answers":
        """One draw from the uncertainty: for each text a Dirichlet distribution with the row's mean and total variance.

        The same answers where they are exact.
        """
        if self.standard_error is None:
            return self
        mean = self.probabilities.astype(np.float64)
        spread = (mean * (1 - mean)).sum(1)
        variance = (self.standard_error.astype(np.float64) ** 2).sum(1)
        sure = variance <= 1e-12
        concentration = np.maximum(spread / np.where(sure, 1, variance) - 1, 1e-3)
        # A Dirichlet draw is independent gammas over their sum.
        gammas = np.random.default_rng(seed).standard_gamma(concentration[:, None] * mean) + 1e-30 * (mean > 0)
        drawn = np.where(sure[:, None], mean, gammas / gammas.sum(1, keepdims=True)).astype(np.float32)
        return Answers(texts=self.texts, labels=self.labels, probabilities=drawn, notes=self.notes)

    def only(self, rows: Sequence[int]) -> "Answers":
        """The answers to some of the texts, in the order of `rows`; labels that are then never given stay."""
        chosen = np.asarray(rows, np.int64)
        return Answers(
            texts=tuple(self.texts[i] for i in rows),
            labels=self.labels,
            probabilities=self.probabilities[chosen],
            standard_error=None if self.standard_error is None else self.standard_error[chosen],
            replies=tuple(self.replies[i] for i in rows) if self.is_open else (),
            notes=self.notes,
        )


def _check_strings(name: str, given: Sequence[str]) -> None:
    for i, one in enumerate(given):
        if not isinstance(one, str):
            raise InvalidRequest(f"{name}[{i}]", f"must be text, got {type(one).__name__}")
        try:
            one.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest(f"{name}[{i}]", f"not valid Unicode ({error.reason})") from None


def _check_open(answers: Answers) -> None:
    if len(answers.replies) != len(answers.texts):
        raise InvalidRequest("replies", f"one a text is needed: {len(answers.texts)} texts, {len(answers.replies)}")
    if answers.probabilities.shape != (len(answers.texts), 0) or answers.standard_error is not None:
        raise InvalidRequest("labels", "open answers have no labels, so they have no probabilities either")


def _check_labelled(answers: Answers) -> None:
    labels, probabilities, error = answers.labels, answers.probabilities, answers.standard_error
    if answers.replies:
        raise InvalidRequest("replies", "give labels with probabilities, or replies, not both")
    if len(labels) < 2:
        raise InvalidRequest("labels", f"two labels or more are needed, got {len(labels)}")
    if list(labels) != sorted(set(labels)):
        raise InvalidRequest("labels", "must be sorted, each once")
    _check_num_labels(labels)
    if probabilities.shape != (len(answers.texts), len(labels)):
        shape = [len(answers.texts), len(labels)]
        raise InvalidRequest("probabilities", f"must be of shape {shape}, got {list(probabilities.shape)}")
    if probabilities.dtype != np.float32:
        raise InvalidRequest(
            "probabilities", f"must be float32, got {probabilities.dtype}; use Answers.of_probabilities"
        )
    _check_simplex(probabilities.astype(np.float64))
    if error is None:
        return
    if error.shape != probabilities.shape or not (np.isfinite(error).all() and (error >= 0).all()):
        raise InvalidRequest("standard_error", "must be finite, not negative, and one a probability")
    spread = (probabilities.astype(np.float64) * (1 - probabilities)).sum(1)
    over = np.flatnonzero((error.astype(np.float64) ** 2).sum(1) > spread * (1 + ROUNDING) + 1e-9)
    if over.size:
        raise InvalidRequest(
            f"standard_error[{over[0]}]",
            "larger than any distribution with this mean has; a share of 0 or 1 out of few draws is not certain: use "
            "Answers.of_counts",
        )


def _check_simplex(probabilities: np.ndarray) -> None:
    if not np.isfinite(probabilities).all():
        row = int(np.flatnonzero(~np.isfinite(probabilities).all(1))[0])
        raise InvalidRequest(f"probabilities[{row}]", "not finite")
    if (probabilities < 0).any():
        row = int(np.flatnonzero((probabilities < 0).any(1))[0])
        raise InvalidRequest(f"probabilities[{row}]", f"negative: {float(probabilities[row].min()):g}")
    sums = probabilities.sum(1)
    off = np.flatnonzero(np.abs(sums - 1) > ROUNDING)
    if off.size:
        raise InvalidRequest(f"probabilities[{off[0]}]", f"sums to {sums[off[0]]:.6g}; it must sum to 1")


def _check_num_labels(labels: Sequence[str]) -> None:
    if len(labels) > MAX_LABELS:
        raise InvalidRequest(
            "labels", f"{len(labels)} labels are more than {MAX_LABELS}; give them as open answers (replies) instead"
        )


def _too_many(count: int) -> str:
    return (
        f"{count} examples are more than the {MAX_EXAMPLES} that an embedding is made of; pass most=1000, say, to have "
        "that many drawn by a seed with each label's share kept"
    )


def _stratified(labels: Sequence[str], most: int, seed: int) -> list[int]:
    """Indices, ascending: `most` in all, from each label its share by largest remainders, and one at least."""
    counts = Counter(labels)
    exact = {name: max(1.0, count * most / len(labels)) for name, count in sorted(counts.items())}
    taken = {name: int(share) for name, share in exact.items()}
    while sum(taken.values()) > most:  # the floor of one took too many; they come off the largest
        taken[max(taken, key=lambda name: (taken[name], name))] -= 1
    by_remainder = sorted(taken, key=lambda name: (taken[name] - exact[name], name))
    for name in by_remainder[: most - sum(taken.values())]:
        taken[name] += 1
    rng = np.random.default_rng(seed)
    order: list[int] = rng.permutation(len(labels)).tolist()
    left = dict(taken)
    chosen: list[int] = []
    for i in order:
        if left[labels[i]]:
            left[labels[i]] -= 1
            chosen.append(i)
    return sorted(chosen)
