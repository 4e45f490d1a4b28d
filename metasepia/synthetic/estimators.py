"""The ideal learners of regression with a pool of tasks (Raventos et al., arXiv:2306.15063), in float64.

Each predicts y at every point of a sequence from the pairs before it. Of the true prior: `ridge` (linear) and
`gaussian_predictive` (logistic). Of the pool: `discrete_mmse` and `discrete_predictive`, posterior means over its M
tasks. The pool is read in chunks: residuals are summed along the points, and a maximum, a sum of weights and a weighted
sum (`PosteriorSums`) stand for all tasks seen so far, so neither 2**20 tasks nor points times tasks are ever held, and
shards of a pool may be summed in different processes and merged.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from metasepia.synthetic.oracles import Predictive
from metasepia.synthetic.regression import TaskPool


@dataclass(frozen=True)
class PosteriorSums:
    """What a set of tasks says about each point: sum over tasks of weight and of weight times prediction.

    Weights are likelihoods of the pairs before the point, divided by exp(log_max).
    """

    log_max: Float[Tensor, "batch points"]
    total: Float[Tensor, "batch points"]
    weighted: Float[Tensor, "batch points"]

    def merge(self, other: "PosteriorSums") -> "PosteriorSums":
        """The sums of both sets of tasks, which must not overlap. Associative and commutative but for rounding."""
        raise NotImplementedError

    @property
    def predictions(self) -> Float[Tensor, "batch points"]:
        """The posterior mean."""
        return self.weighted / self.total


def merge(shards: Sequence[PosteriorSums]) -> PosteriorSums:
    """The sums of all shards of one pool; the same shards in the same order give the same bits."""
    raise NotImplementedError


def ridge(
    x: Float[Tensor, "batch points dims"],
    y: Float[Tensor, "batch points"],
    noise_variance: float,
    task_variance: float = 1.0,
) -> Float[Tensor, "batch points"]:
    """Predictions of the posterior mean under w ~ N(0, task_variance I): lambda = noise_variance / task_variance.

    The first is 0. Float64, on x's device. Raises InvalidSettings unless both variances are above 0 and data finite.
    """
    raise NotImplementedError


def discrete_mmse(
    x: Float[Tensor, "batch points dims"],
    y: Float[Tensor, "batch points"],
    pool: TaskPool | Float[Tensor, "tasks dims"],
    noise_variance: float,
    *,
    chunk: int = 4096,
) -> Float[Tensor, "batch points"]:
    """Predictions of the posterior mean over the pool (dMMSE), linear regression. The first is the mean task's.

    Float64, on x's device; memory does not grow with the pool. Raises InvalidSettings for the true prior (its posterior
    mean is `ridge`), a variance that is not above 0, data that are not finite.
    """
    raise NotImplementedError


def discrete_mmse_sums(
    x: Float[Tensor, "batch points dims"],
    y: Float[Tensor, "batch points"],
    pool: TaskPool | Float[Tensor, "tasks dims"],
    noise_variance: float,
    *,
    first: int = 0,
    last: int | None = None,
    chunk: int = 4096,
) -> PosteriorSums:
    """Tasks first .. last - 1's part of `discrete_mmse`, for pools that are shared out among processes."""
    raise NotImplementedError


def discrete_predictive(
    x: Float[Tensor, "batch points dims"],
    y: Float[Tensor, "batch points"],
    pool: TaskPool | Float[Tensor, "tasks dims"],
    *,
    chunk: int = 4096,
) -> Float[Tensor, "batch points"]:
    """P(y = 1) at each point given the pairs before it, posterior mean over the pool; logistic regression, y 0 or 1."""
    raise NotImplementedError


def discrete_predictive_sums(
    x: Float[Tensor, "batch points dims"],
    y: Float[Tensor, "batch points"],
    pool: TaskPool | Float[Tensor, "tasks dims"],
    *,
    first: int = 0,
    last: int | None = None,
    chunk: int = 4096,
) -> PosteriorSums:
    """Tasks first .. last - 1's part of `discrete_predictive`."""
    raise NotImplementedError


def gaussian_predictive(
    x: Float[Tensor, "batch points dims"],
    y: Float[Tensor, "batch points"],
    scale: float,
    *,
    particles: int = 512,
    seed: int = 0,
) -> Predictive:
    """P(y = 1) at each point given the pairs before it, under the true prior w ~ scale N(0, I); logistic regression.

    By Monte Carlo; `standard_error` is measured on two halves of the particles. A function of the data and `seed`.
    """
    raise NotImplementedError
