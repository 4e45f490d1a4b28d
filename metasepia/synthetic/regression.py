"""Noisy linear and logistic regression whose tasks come from a finite pool or from the true Gaussian prior.

The data of Raventos et al. (arXiv:2306.15063): a task is a vector w; then x ~ N(0, I), and y = w . x + eps with
eps ~ N(0, noise_variance), or, for `logistic`, y is 1 with probability sigmoid(w . x). A pool of M tasks is the first M
of one endless list, so pools are nested in M, where the paper draws each anew. A batch is a pure function of the pool's
seed, the three seeds and the step, bit for bit the same on CPU and GPU (but for `target` of logistic, whose sigmoid is
the device's own); fewer sequences, points or dims give a prefix of the larger batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from metasepia.synthetic.tasks import Seeds

Kind = Literal["linear", "logistic"]
Of = Literal["pretraining", "new"]
Stream = Literal["training", "evaluation"]


@dataclass(frozen=True, kw_only=True)
class TaskPool:
    """The tasks of pretraining: w ~ scale N(0, I), M of them drawn once, or a fresh one for each sequence."""

    dims: int
    """From 1 to 1024."""
    num_tasks: int | None
    """M, from 1 to 2**24; None is the true prior: a fresh w for each sequence."""
    seed: int = 102
    """Which endless list the pool is the beginning of; the default is the paper's."""
    scale: float = 1.0
    """Standard deviation of each coordinate, above 0. In logistic regression it says how sharply labels follow w."""

    def tasks(
        self, first: int = 0, last: int | None = None, device: torch.device | str = "cpu"
    ) -> Float[Tensor, "tasks dims"]:
        """Tasks first .. last - 1 of the pool, drawn when asked for, so that a pool never need be held whole.

        Raises InvalidSettings for the true prior, which has no list, and for a range outside the pool.
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class RegressionBatch:
    """Sequences of points; a stack of batches (`batch_of_many`) has axes of its own before `batch`."""

    x: Float[Tensor, "*stack batch points dims"]
    y: Float[Tensor, "*stack batch points"]
    """What the learner sees: noisy values, or 0 and 1."""
    w: Float[Tensor, "*stack batch dims"]
    task: Int[Tensor, "*stack batch"]
    """Index of w in the pool; -1 for a w that is in none."""
    target: Float[Tensor, "*stack batch points"]
    """Free of noise: w . x, or P(y = 1 | x, w). The paper's repository measures errors against it; an error against
    noisy y is larger by noise_variance."""


@dataclass(frozen=True, kw_only=True)
class PooledRegression:
    """One pretraining distribution: the pool, how long its sequences are, and how y follows w . x."""

    kind: Kind
    pool: TaskPool
    points: int
    """K, pairs (x, y) a sequence: from 1 to 4096."""
    noise_variance: float = 0.0
    """sigma squared of `linear`, above 0. `logistic` has none: it must be 0 there."""

    def batch(
        self,
        seeds: Seeds,
        step: int,
        *,
        num_sequences: int,
        device: torch.device | str = "cpu",
        of: Of = "pretraining",
        stream: Stream = "training",
    ) -> RegressionBatch:
        """The batch of this step. Each sequence takes a task of the pool, uniformly and with replacement.

        With `of="new"` w is fresh from the true prior, whatever the pool; x and noise are those of `pretraining`, and
        new tasks are the same for every M: comparisons are paired. `stream="evaluation"` shares no number with
        training; its steps count from 0 too.
        """
        raise NotImplementedError

    def batch_of_tasks(
        self,
        w: Float[Tensor, "batch dims"],
        seeds: Seeds,
        step: int,
        *,
        stream: Stream = "evaluation",
    ) -> RegressionBatch:
        """Sequence i has task w[i], whatever the pool, and the x and noise of `batch`; on w's device."""
        raise NotImplementedError


def batch_of_many(
    problems: Sequence[PooledRegression],
    seeds: Sequence[Seeds],
    step: int,
    *,
    num_sequences: int,
    device: torch.device | str = "cpu",
    of: Of = "pretraining",
    stream: Stream = "training",
) -> RegressionBatch:
    """One batch for each problem, stacked: x is [models, batch, points, dims]; equal to one by one, bit for bit.

    Problems must agree in kind, dims and points. Those that share seeds share the drawing of x and noise.
    """
    raise NotImplementedError


def batches_of_many(
    problems: Sequence[PooledRegression],
    seeds: Sequence[Seeds],
    steps: Sequence[int],
    *,
    num_sequences: int,
    device: torch.device | str = "cpu",
    of: Of = "pretraining",
    stream: Stream = "training",
) -> RegressionBatch:
    """`batch_of_many` of several steps in one go: x is [steps, models, batch, points, dims], the same bits.

    Fewer and larger operations, and one copy of keys to the device: on a GPU, ask for some tens of steps at a time.
    """
    raise NotImplementedError


def path_between(
    first: Float[Tensor, "*batch dims"], second: Float[Tensor, "*batch dims"], alphas: Float[Tensor, " alphas"]
) -> Float[Tensor, "alphas *batch dims"]:
    """The paper's interpolation between tasks: alpha first + (1 - alpha) second, at the mean of the two norms."""
    raise NotImplementedError
