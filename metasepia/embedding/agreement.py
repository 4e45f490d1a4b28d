"""Task embedding by agreement: which probe texts a task answers alike, label names and their order left out.

The Gram matrix K = P P^T of a task's answers P [probes, labels] on the probe texts says how alike it answers each two
of them. It does not change when labels are renamed or permuted, and has one shape whatever the label set; the cosine of
two such matrices, centred, is their kernel alignment (Cristianini et al., NIPS 2001; CKA, arXiv:1905.00414). It is
U-centred, as in the unbiased HSIC of Song et al. (JMLR 2012; Szekely and Rizzo, 2014): a diagonal of zeros, and rows
that sum to zero. So unrelated tasks have cosine 0 in expectation, not about labels / probes; and the noise of sampled
answers, which is independent from text to text, adds nothing in expectation, for only the diagonal would hold it.

What all tasks share is that like texts get like answers. So the encoder's own U-centred Gram matrix of the probe texts
is projected out, which leaves the partial alignment beyond text similarity (partial distance correlation: Szekely and
Rizzo, Annals of Statistics 2014).

The matrix is sketched: its entries are dealt at random to `dims` coordinates, with random signs, and added up (the
count sketch of Charikar et al., 2002, with equal shares). Dot products are those of the matrices in expectation, with a
standard error of cosines c of about (1 - c^2) / sqrt(dims).

What is no answer to the probe texts (a data set's labels, answers to other texts, open replies to them) goes through
the surrogate: a head on the frozen encoder's vectors is fitted to it and answers the probes in its place (`heads`).
Open replies are vectors of that encoder; beside which texts get like replies, an embedding of open answers holds what
replies are like: the direction of their mean, in coordinates of its own, which are zero for answers with labels.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int

from metasepia.embedding.answers import Answers
from metasepia.embedding.heads import Features, Ridge
from metasepia.embedding.probes import ProbeTexts
from metasepia.embedding.space import Space
from metasepia.errors import InvalidRequest, InvalidSettings, WindowExceeded
from metasepia.kinds import check_kinds

VERSION = 1
"""Of the arithmetic; part of the space."""
MOST_PROBES = 8192
"""A Gram matrix of them takes half a gibibyte."""


@runtime_checkable
class Encoder(Protocol):
    """What is used of `metasepia.encoders.TextEncoder`."""

    @property
    def digest(self) -> str: ...
    @property
    def width(self) -> int: ...
    def embed(self, texts: Sequence[str]) -> Float[np.ndarray, "texts width"]: ...


@dataclass(frozen=True, kw_only=True)
class AgreementSettings:
    """Part of the space."""

    dims: int = 4096
    """64 to 65,536; fewer where there are fewer pairs of probe texts, and then nothing is lost. Measured at 4096: an
    error of 0.015, and nearest neighbours change only where exact cosines differ by 0.013 or less."""
    imitate: Literal["needed", "always", "half"] = "needed"
    """Whose answers count. needed: the task's own where it answered the probe texts, else the head's. always: the
    head's, so that models and data sets pass through one filter, and what the encoder does not see is lost. half: of a
    task that answered the probe texts the mean of both Gram matrices, each at unit norm."""
    partial: bool = True
    """Leaves out what similarity of the texts explains."""
    replies: float = 0.5
    """In [0, 1): share of the squared norm of an embedding of open answers that their mean reply has."""
    sketch_seed: int = 0

    def __post_init__(self) -> None:
        check_kinds(self)
        if not 64 <= self.dims <= 65_536:
            raise InvalidSettings("dims", self.dims, "between 64 and 65536")
        if not 0 <= self.replies < 1:
            raise InvalidSettings("replies", self.replies, "at least 0 and below 1")
        if self.sketch_seed < 0:
            raise InvalidSettings("sketch_seed", self.sketch_seed, "0 or more")


class AgreementMethod:
    """Agreement in one space. Vectors are the same bits on one machine, whatever tasks are beside them."""

    def __init__(self, encoder: Encoder, probes: ProbeTexts, settings: AgreementSettings | None = None) -> None:
        self.settings = settings or AgreementSettings()
        self.probes = probes
        self.space = Space(
            surrogate=encoder.digest,
            method="agreement",
            settings={**asdict(self.settings), "version": VERSION},
            probes=probes.digest,
        )
        if len(probes) > MOST_PROBES:
            raise InvalidSettings("probes", len(probes), f"at most {MOST_PROBES} texts")
        self._encoder = encoder
        self._rows = {text: i for i, text in enumerate(probes.texts)}
        self._sketch = Sketch.of(len(probes), self.settings.dims, self.settings.sketch_seed)
        self.dims = len(self._sketch.begins) + encoder.width

    def embed(
        self, tasks: Sequence[Answers], *, seed: int = 0, told: Callable[[int, int], None] | None = None
    ) -> Float[np.ndarray, "tasks dims"]:
        """Unit-norm float32 vectors; nothing is drawn, so `seed` changes nothing.

        Raises InvalidRequest for a task that answers every text alike, or whose answers the head makes out to do so,
        and WindowExceeded for a text or reply beyond the encoder's window.
        """
        vectors = np.empty((len(tasks), self.dims), np.float32)
        groups: dict[tuple[str, ...], list[int]] = {}
        for i, task in enumerate(tasks):
            if task.is_constant:
                raise InvalidRequest(_named(i, tasks), "it answers every text alike, so it tells no two texts apart")
            groups.setdefault(task.texts, []).append(i)
        done = 0
        for texts, members in groups.items():
            features: Features | None = None
            for i in members:
                own = None if self.settings.imitate == "always" else self._own(tasks[i])
                parts = [] if own is None else [own]
                if own is None or self.settings.imitate == "half":
                    if features is None:
                        features = Features.of(self._vectors(texts))
                    parts.append(self._imitated(tasks[i], features))
                vectors[i] = self._embedded(tasks[i], parts, _named(i, tasks))
                done += 1
                if told is not None:
                    told(done, len(tasks))
        return vectors

    def answers_to_probes(self, task: Answers) -> Float[np.ndarray, "probes outputs"]:
        """What is compared: a row a probe text, of probabilities, or of reply vectors for open answers."""
        own = None if self.settings.imitate == "always" else self._own(task)
        return self._imitated(task, Features.of(self._vectors(task.texts))) if own is None else own

    def _own(self, task: Answers) -> np.ndarray | None:
        """The task's own answers in the order of the probe texts; None where it answered not all of them.

        The mean, where a text is there several times.
        """
        rows = [self._rows.get(text, -1) for text in task.texts]
        counts = np.bincount([row for row in rows if row >= 0], minlength=len(self.probes))
        if not counts.all():
            return None
        kept = [i for i, row in enumerate(rows) if row >= 0]
        answers = self._targets(task)[kept]
        summed = np.zeros((len(self.probes), answers.shape[1]))
        np.add.at(summed, [rows[i] for i in kept], answers)
        return summed / counts[:, None]

    def _imitated(self, task: Answers, features: Features) -> np.ndarray:
        """The answers of a head to the probe texts."""
        targets = self._targets(task)
        used = np.ptp(targets, axis=0) > 0  # a label that is never given has nothing to be fitted to
        head = Ridge.fit(features, targets[:, used])
        if task.is_open:
            return head.scores(self._probe_vectors)
        return head.probabilities(self._probe_vectors, targets[:, used])

    def _targets(self, task: Answers) -> np.ndarray:
        if not task.is_open:
            return task.probabilities.astype(np.float64)
        distinct = {reply: i for i, reply in enumerate(dict.fromkeys(task.replies))}
        try:
            vectors = self._encoder.embed(list(distinct)).astype(np.float64)
        except WindowExceeded as error:
            place = task.replies.index(list(distinct)[int(error.param.removeprefix("texts[").removesuffix("]"))])
            way_out = "ask for shorter replies (max_tokens)"
            raise WindowExceeded(f"replies[{place}]", error.num_tokens, error.window, way_out) from None
        return vectors[[distinct[reply] for reply in task.replies]]

    def _vectors(self, texts: tuple[str, ...]) -> np.ndarray:
        return self._probe_vectors if texts == self.probes.texts else self._encoder.embed(texts)

    @cached_property
    def _probe_vectors(self) -> np.ndarray:
        return self._encoder.embed(self.probes.texts)

    @cached_property
    def _similarity(self) -> np.ndarray:
        """The encoder's own matrix, at unit norm."""
        matrix = u_centred(self._probe_vectors)
        return matrix / np.linalg.norm(matrix)

    def _embedded(self, task: Answers, parts: Sequence[np.ndarray], name: str) -> np.ndarray:
        total = np.zeros(len(self._sketch.begins))
        for answers in parts:
            matrix = u_centred(answers)
            if (whole := np.linalg.norm(matrix)) <= 1e-12:
                raise InvalidRequest(name, "nothing of its answers can be told from its texts")
            if self.settings.partial:
                matrix -= (matrix * self._similarity).sum() * self._similarity
                if np.linalg.norm(matrix) <= 1e-6 * whole:
                    raise InvalidRequest(name, "its answers are the similarity of texts itself, and nothing beyond")
            sketched = self._sketch.of_matrix(matrix)
            total += sketched / np.linalg.norm(sketched)
        total /= np.linalg.norm(total)
        reply = np.zeros(self._encoder.width)
        if task.is_open and self.settings.replies:
            reply = self._targets(task).mean(0) - self._probe_vectors.mean(0)
            total *= np.sqrt(1 - self.settings.replies)
            reply *= np.sqrt(self.settings.replies) / max(float(np.linalg.norm(reply)), 1e-12)
        joined = np.concatenate([total, reply])
        return (joined / np.linalg.norm(joined)).astype(np.float32)


@dataclass(frozen=True)
class Sketch:
    """Deals the pairs of probe texts to coordinates; with a coordinate for each pair nothing is added up."""

    places: Int[np.ndarray, " pairs"]
    """Of each pair in the flattened matrix, coordinate by coordinate."""
    signs: Float[np.ndarray, " pairs"]
    begins: Int[np.ndarray, " dims"]
    """Where each coordinate's pairs begin."""

    @classmethod
    def of(cls, num_probes: int, dims: int, seed: int) -> "Sketch":
        first, second = np.triu_indices(num_probes, 1)
        rng = np.random.default_rng([seed, num_probes])
        places = (first * num_probes + second)[rng.permutation(len(first))]
        signs = rng.integers(0, 2, len(first)) * 2.0 - 1
        begins = np.arange(min(dims, len(first))) * len(first) // min(dims, len(first))
        return cls(places, signs, begins)

    def of_matrix(self, matrix: Float[np.ndarray, "probes probes"]) -> Float[np.ndarray, " dims"]:
        """Of a symmetric matrix with a diagonal of zeros."""
        return np.add.reduceat(matrix.ravel()[self.places] * self.signs, self.begins)


def aligned(
    a: Float[np.ndarray, "probes outputs_a"],
    b: Float[np.ndarray, "probes outputs_b"],
    beyond: Float[np.ndarray, "probes width"] | None = None,
) -> float:
    """The exact cosine of two tasks' U-centred Gram matrices, which embeddings' cosines approach.

    With `beyond`, vectors of the probe texts, it is the partial one that leaves out their own Gram matrix.
    """
    x, y = u_centred(a), u_centred(b)
    if beyond is not None:
        z = u_centred(beyond)
        z /= np.linalg.norm(z)
        x, y = x - (x * z).sum() * z, y - (y * z).sum() * z
    return float((x * y).sum() / np.sqrt((x**2).sum() * (y**2).sum()))


def u_centred(answers: Float[np.ndarray, "probes outputs"]) -> Float[np.ndarray, "probes probes"]:
    """K_ij - a_i - a_j + c off the diagonal, zero on it, so that every row sums to zero."""
    given = answers.astype(np.float64)
    given = given - given.mean(0)  # changes nothing but rounding
    gram, count = given @ given.T, len(given)
    np.fill_diagonal(gram, 0)
    rows = gram.sum(1, keepdims=True) / (count - 2)
    centred = gram - rows - rows.T + gram.sum() / ((count - 1) * (count - 2))
    np.fill_diagonal(centred, 0)
    return centred


def _named(place: int, tasks: Sequence[Answers]) -> str:
    return "task" if len(tasks) == 1 else f"tasks[{place}]"
