"""Synthetic classification problems with the geometry of embeddings: few strong directions, many weak, signal in both.

Vectors are Gaussian with eigenvalues that fall as a shifted power law, perhaps with heavy tails, in clusters that have
nothing to do with the labels, about a common mean and on the unit sphere. Labels come from class means, perhaps
several a class, or from a random function of the vector. How much of the signal lies in weak directions, how far
classes are apart, how many there are, how uneven, and how noisy their labels, is drawn anew for each problem or batch:
a module that has seen enough of them must find out from the examples. No real data enters.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from metasepia.synthetic.sampling import key_of
from metasepia.synthetic.tasks import Seeds

MEANS_SHARE = 0.6
"""Of the batches whose labels come from class means; the others' are drawn from a function of the vector."""
MAX_EXAMPLES = 480
"""Of one problem with many classes."""


@dataclass(frozen=True)
class EmbeddingBatch:
    """Problems of one size; `hidden_labels` are those of the unlabelled vectors, then of the queries."""

    x: Float[Tensor, "problems examples dims"]
    y: Int[Tensor, "problems examples"]
    unlabelled: Float[Tensor, "problems unlabelled dims"] | None
    queries: Float[Tensor, "problems queries dims"]
    hidden_labels: Int[Tensor, "problems _"]
    num_classes: int


@dataclass(frozen=True, kw_only=True)
class EmbeddingLikeTasks:
    """The distribution of problems; pairs are the ends of a range, drawn log-uniformly unless said otherwise."""

    dims: tuple[int, int] = (40, 512)
    examples: tuple[int, int] = (4, 320)
    unlabelled: tuple[int, int] = (30, 300)
    unlabelled_share: float = 0.35
    """Of the batches that have unlabelled vectors, in [0, 1]."""
    classes: tuple[int, int] = (3, 12)
    binary_share: float = 0.5
    """Of the batches of two classes, in [0, 1]."""
    many_classes: tuple[int, int] = (13, 160)
    many_share: float = 0.05
    """Of the batches with so many classes, in [0, 1]; they have `many_examples` a class, whatever `examples` says."""
    many_examples: tuple[int, int] = (2, 8)
    balanced_share: float = 0.6
    """Of the batches whose examples are drawn as people draw them, as many of each class; queries likewise."""
    queries: int = 48
    heavy_share: float = 0.1
    """Of the batches whose vectors have heavy tails, in [0, 1]; and so on for the next five."""
    topics_share: float = 0.25
    """Clusters that have nothing to do with the labels."""
    sphere_share: float = 0.65
    """Vectors on the unit sphere."""
    widths_share: float = 0.3
    """Classes of different widths."""
    parts_share: float = 0.2
    """Classes of several parts."""
    bent_share: float = 0.1
    """Labels that are no linear function of the vector, nor by class means."""
    decay: tuple[float, float] = (0.4, 1.6)
    """Uniform: exponent of the eigenvalues, (1 + i / shift) ** -decay."""
    shift: tuple[float, float] = (2.0, 40.0)
    alignment: tuple[float, float] = (1.0, 3.2)
    """Uniform: the signal's variance in a direction goes as the eigenvalue to this power."""
    concentration: tuple[float, float] = (0.0, 1.0)
    """Uniform: standard deviation of the logarithm of each direction's share in the signal; 0 is even."""
    distance: tuple[float, float] = (0.3, 16.0)
    """Between class means, in standard deviations within a class."""
    slope: tuple[float, float] = (0.5, 12.0)
    """Of labels that are a function of the vector, in logits a standard deviation."""
    states: int = 6_000
    """Tokens times classes that a batch has, about: its number of problems follows; at most 64."""

    def batch(self, seeds: Seeds, step: int) -> EmbeddingBatch:
        """A pure function of the seeds and the step, on the CPU."""
        return _Draw(self, seeds, step).batch()


class _Draw:
    """One batch in the making. `task` decides sizes and problems, `data` vectors, `noise` labels."""

    def __init__(self, tasks: EmbeddingLikeTasks, seeds: Seeds, step: int) -> None:
        self.tasks = tasks
        self.task, self.data, self.noise = (
            torch.Generator().manual_seed(key_of(f"embeddings/{name}", seed, step) & (2**63 - 1))
            for name, seed in (("task", seeds.task), ("data", seeds.data), ("noise", seeds.noise))
        )
        self.num_examples = self._size(tasks.examples)
        self.num_classes = self._num_classes()
        self.balanced = self._chance() < tasks.balanced_share
        self.dims = self._size(tasks.dims)
        self.num_unlabelled = self._size(tasks.unlabelled) if self._chance() < tasks.unlabelled_share else 0
        self.tokens = self.num_examples + self.num_unlabelled + tasks.queries
        self.problems = max(2, min(64, tasks.states // (self.num_classes * self.tokens)))

    def batch(self) -> EmbeddingBatch:
        eigenvalues = self._eigenvalues()
        vectors, labels = self._labelled(eigenvalues)
        if self._chance() < 0.3:
            wrong = self._uniform(self.problems, self.tokens) < 0.25 * self._uniform(self.problems, 1)
            other = torch.randint(0, self.num_classes, labels.shape, generator=self.noise)
            labels = torch.where(wrong, other, labels)
        vectors = vectors + self._normal(self.problems, 1, self.dims) * eigenvalues.sqrt()[:, None]
        if self._chance() < self.tasks.sphere_share:
            centre = F.normalize(self._normal(self.problems, 1, self.dims), dim=2)
            vectors = F.normalize(vectors + centre * (0.3 + self._uniform(self.problems, 1, 1)), dim=2)
        n, u = self.num_examples, self.num_unlabelled
        return EmbeddingBatch(
            x=vectors[:, :n],
            y=labels[:, :n],
            unlabelled=vectors[:, n : n + u] if u else None,
            queries=vectors[:, n + u :],
            hidden_labels=labels[:, n:],
            num_classes=self.num_classes,
        )

    def _num_classes(self) -> int:
        kind, tasks = self._chance(), self.tasks
        if kind < tasks.binary_share:
            return 2
        if kind > 1 - tasks.many_share:
            classes = self._size(tasks.many_classes)
            self.num_examples = min(MAX_EXAMPLES, classes * self._size(tasks.many_examples))
            return classes
        return max(2, min(self._size(tasks.classes), self.num_examples // 2))

    def _eigenvalues(self) -> Float[Tensor, "problems dims"]:
        """They sum to 1."""
        decay = self._uniform(self.problems, 1, ends=self.tasks.decay)
        shift = self._log_uniform(self.problems, 1, ends=self.tasks.shift)
        eigenvalues = (1 + torch.arange(self.dims) / shift) ** -decay
        eigenvalues = eigenvalues * (0.3 * self._normal(self.problems, self.dims, of=self.task)).exp()
        return eigenvalues / eigenvalues.sum(1, keepdim=True)

    def _vectors(self, eigenvalues: Tensor, tokens: int) -> Float[Tensor, "problems _ dims"]:
        scale = eigenvalues.sqrt()[:, None]
        vectors = self._normal(self.problems, tokens, self.dims) * scale
        if self._chance() < self.tasks.heavy_share:
            vectors = vectors * (0.35 * self._normal(self.problems, tokens, 1)).exp()
        if self._chance() < self.tasks.topics_share:
            count = int(torch.randint(2, 12, (1,), generator=self.task))
            size = 0.4 + 0.8 * self._uniform(self.problems, 1, 1)
            centres = self._normal(self.problems, count, self.dims, of=self.task) * scale * size
            member = torch.randint(0, count, (self.problems, tokens), generator=self.data)
            vectors = vectors + _rows(centres, member)
        return vectors

    def _labelled(self, eigenvalues: Tensor) -> tuple[Tensor, Int[Tensor, "problems tokens"]]:
        alignment = self._uniform(self.problems, 1, ends=self.tasks.alignment)
        uneven = self._uniform(self.problems, 1, ends=self.tasks.concentration)
        uneven = (uneven * self._normal(self.problems, self.dims, of=self.task)).exp()
        signal = eigenvalues ** (alignment / 2) * uneven
        signal = signal / signal.square().sum(1, keepdim=True).sqrt()
        if self._chance() < MEANS_SHARE:
            return self._by_class_means(self._vectors(eigenvalues, self.tokens), eigenvalues, signal)
        vectors = self._vectors(eigenvalues, self.tokens * (2 if self.balanced else 1))
        labels = self._by_function(vectors, eigenvalues, signal)
        if self.balanced:  # the first of each class, then the second of each, and so on, as far as they go
            one_hot = F.one_hot(labels, self.num_classes)
            turn = (one_hot.cumsum(1) * one_hot).sum(2)
            order = turn.argsort(dim=1, stable=True)[:, : self.tokens]
            vectors, labels = _rows(vectors, order), labels.gather(1, order)
        return vectors, labels

    def _by_class_means(self, vectors: Tensor, eigenvalues: Tensor, signal: Tensor) -> tuple[Tensor, Tensor]:
        classes, shape = self.num_classes, (self.problems, self.num_classes)
        if self.balanced:
            labels = (torch.arange(self.tokens) % classes).repeat(self.problems, 1)
        else:
            drawn = -self._uniform(*shape).clamp_min(1e-6).log()
            share = 0.15 / classes + 0.85 * drawn / drawn.sum(1, keepdim=True)
            labels = torch.multinomial(share, self.tokens, replacement=True, generator=self.noise)
        if self._chance() < self.tasks.widths_share:
            widths = 0.3 * self._uniform(self.problems, 1, 1) * self._normal(*shape, self.dims, of=self.task)
            widths = widths + 0.25 * self._uniform(self.problems, 1, 1) * self._normal(*shape, 1, of=self.task)
            vectors = vectors * _rows(widths.exp(), labels)
        parts = (
            1 if self._chance() < 1 - self.tasks.parts_share else int(torch.randint(2, 5, (1,), generator=self.task))
        )
        means = self._normal(self.problems, classes, parts, self.dims, of=self.task) * signal[:, None, None]
        if parts > 1:
            common = self._normal(self.problems, classes, 1, self.dims, of=self.task) * signal[:, None, None]
            kept = self._uniform(self.problems, 1, 1, 1)
            means = kept * common + (1 - kept) * means
        means = means.flatten(1, 2)
        apart = ((means[:, 0] - means[:, -1]).square() / eigenvalues).sum(1).sqrt()
        wanted = self._log_uniform(self.problems, ends=self.tasks.distance) * (1 + 0.25 * math.log(classes / 2))
        means = means * (wanted / apart.clamp_min(1e-9))[:, None, None]
        part = torch.randint(0, parts, labels.shape, generator=self.data)
        return vectors + _rows(means, labels * parts + part), labels

    def _by_function(self, vectors: Tensor, eigenvalues: Tensor, signal: Tensor) -> Tensor:
        """Labels drawn with the probabilities softmax(slope f(x)); f is linear or has a random hidden layer too."""
        white = vectors / eigenvalues.sqrt()[:, None]
        directions = (signal / eigenvalues.sqrt())[..., None]

        def weights(count: int) -> Tensor:
            drawn = self._normal(self.problems, self.dims, count, of=self.task) * directions
            return drawn / drawn.square().sum(1, keepdim=True).sqrt()

        scores = white @ weights(self.num_classes)
        if self._chance() < self.tasks.bent_share / (1 - MEANS_SHARE):
            hidden = torch.tanh(2 * (white @ weights(8)))
            bent = hidden @ self._normal(self.problems, 8, self.num_classes, of=self.task) / math.sqrt(8)
            scores = scores * self._uniform(self.problems, 1, 1) + 1.5 * bent
        slope = self._log_uniform(self.problems, 1, 1, ends=self.tasks.slope)
        chances = torch.softmax(slope * (scores - scores.mean(1, keepdim=True)), dim=2)
        drawn = torch.multinomial(chances.flatten(0, 1), 1, generator=self.noise)
        return drawn.view(vectors.shape[:2])

    def _chance(self) -> float:
        return float(torch.rand(1, generator=self.task))

    def _size(self, ends: tuple[int, int]) -> int:
        low, high = math.log(ends[0]), math.log(ends[1] + 1)
        return min(ends[1], int(math.exp(low + (high - low) * self._chance())))

    def _uniform(self, *shape: int, ends: tuple[float, float] = (0.0, 1.0)) -> Tensor:
        return ends[0] + (ends[1] - ends[0]) * torch.rand(*shape, generator=self.task)

    def _log_uniform(self, *shape: int, ends: tuple[float, float]) -> Tensor:
        return self._uniform(*shape, ends=(math.log(ends[0]), math.log(ends[1]))).exp()

    def _normal(self, *shape: int, of: torch.Generator | None = None) -> Tensor:
        return torch.randn(*shape, generator=of or self.data)


def _rows(of: Float[Tensor, "problems rows dims"], index: Int[Tensor, "problems tokens"]) -> Tensor:
    return torch.gather(of, 1, index[..., None].expand(-1, -1, of.shape[2]))
