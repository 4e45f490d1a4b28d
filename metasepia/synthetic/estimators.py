"""The ideal learners of regression with a pool of tasks (Raventos et al., arXiv:2306.15063), in float64.

Each predicts y at every point of a sequence from the pairs before it. Of the true prior: `ridge` (linear) and
`gaussian_predictive` (logistic). Of the pool: `discrete_mmse` and `discrete_predictive`, posterior means over its M
tasks. The pool is read in chunks: residuals are summed along the points, and a maximum, a sum of weights and a weighted
sum (`PosteriorSums`) stand for all tasks seen so far, so neither 2**20 tasks nor points times tasks are ever held, and
shards of a pool may be summed in different processes and merged.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from metasepia.errors import InvalidSettings
from metasepia.synthetic.oracles import Predictive
from metasepia.synthetic.regression import TaskPool, require_noise, require_whole
from metasepia.synthetic.sampling import key_of

# Numbers in one temporary of the inner loop: on a CPU it stays in the second-level cache, a GPU wants it large.
_TILE_NUMBERS = {"cpu": 1 << 16, "cuda": 1 << 24}
_PARTICLE_NUMBERS = 1 << 20
"""Particles times points at once in `gaussian_predictive`."""


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
        log_max = torch.maximum(self.log_max, other.log_max)
        ours, theirs = torch.exp(self.log_max - log_max), torch.exp(other.log_max - log_max)
        return PosteriorSums(
            log_max, self.total * ours + other.total * theirs, self.weighted * ours + other.weighted * theirs
        )

    @property
    def predictions(self) -> Float[Tensor, "batch points"]:
        """The posterior mean."""
        return self.weighted / self.total


def merge(shards: Sequence[PosteriorSums]) -> PosteriorSums:
    """The sums of all shards of one pool; the same shards in the same order give the same bits."""
    if not shards:
        raise InvalidSettings("shards", 0, "at least one")
    return functools.reduce(PosteriorSums.merge, shards)


def ridge(
    x: Float[Tensor, "batch points dims"],
    y: Float[Tensor, "batch points"],
    noise_variance: float,
    task_variance: float = 1.0,
) -> Float[Tensor, "batch points"]:
    """Predictions of the posterior mean under w ~ N(0, task_variance I): lambda = noise_variance / task_variance.

    The first is 0. Float64, on x's device. Raises InvalidSettings unless both variances are above 0 and data finite.

    All points come from one Cholesky factor of the covariance of y, task_variance x x' + noise_variance I = L L': with
    z = L^-1 y the mean of y_k given those before it is the sum over j < k of L_kj z_j.
    """
    require_noise(noise_variance)
    if not (task_variance > 0 and math.isfinite(task_variance)):
        raise InvalidSettings("task_variance", task_variance, "a finite number above 0")
    x, y = _checked(x, y)
    rows = max(1, _tile_numbers(x.device) * 8 // x.shape[1] ** 2)
    predictions = torch.empty_like(y)
    noise = noise_variance * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    for start in range(0, len(x), rows):
        some = slice(start, start + rows)
        factor = torch.linalg.cholesky(task_variance * x[some] @ x[some].mT + noise)
        z = torch.linalg.solve_triangular(factor, y[some, :, None], upper=False)
        predictions[some] = (factor.tril(-1) @ z)[..., 0]
    return predictions


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
    return discrete_mmse_sums(x, y, pool, noise_variance, chunk=chunk).predictions


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
    require_noise(noise_variance)
    precision = 1 / noise_variance

    def weigh(log_weights: Tensor, scores: Tensor, values: Tensor) -> None:
        scores -= values
        log_weights.addcmul_(scores, scores, value=-precision / 2)

    return _summed(*_checked(x, y), pool, first, last, chunk, weigh, None)


def discrete_predictive(
    x: Float[Tensor, "batch points dims"],
    y: Float[Tensor, "batch points"],
    pool: TaskPool | Float[Tensor, "tasks dims"],
    *,
    chunk: int = 4096,
) -> Float[Tensor, "batch points"]:
    """P(y = 1) at each point given the pairs before it, posterior mean over the pool; logistic regression, y 0 or 1."""
    return discrete_predictive_sums(x, y, pool, chunk=chunk).predictions


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
    _require_labels(y)

    def weigh(log_weights: Tensor, scores: Tensor, labels: Tensor) -> None:
        scores *= 2 * labels - 1
        log_weights += F.logsigmoid(scores)

    return _summed(*_checked(x, y), pool, first, last, chunk, weigh, torch.sigmoid)


def _summed(
    x: Tensor,
    y: Tensor,
    pool: TaskPool | Tensor,
    first: int,
    last: int | None,
    chunk: int,
    weigh: Callable[[Tensor, Tensor, Tensor], None],
    link: Callable[[Tensor], Tensor] | None,
) -> PosteriorSums:
    """The sums over tasks first .. last - 1. `weigh(log_weights, scores, y)` adds one point's log-likelihoods in place
    and may overwrite the scores; `link` makes predictions of scores, None if they are predictions themselves."""
    require_whole("chunk", chunk, 1, 1 << 24)
    num_tasks = pool.num_tasks if isinstance(pool, TaskPool) else len(pool)
    if num_tasks is None:
        raise InvalidSettings(
            "num_tasks", None, "a number: of the true prior the ideal is ridge or gaussian_predictive"
        )
    dims = pool.dims if isinstance(pool, TaskPool) else pool.shape[1]
    if dims != x.shape[2]:
        raise InvalidSettings("dims", dims, f"that of x, {x.shape[2]}")
    if isinstance(pool, Tensor):
        _require_finite("pool", pool)
    last = num_tasks if last is None else last
    if not 0 <= first < last <= num_tasks:
        raise InvalidSettings("tasks", (first, last), f"a range of at least one within 0 .. {num_tasks}")

    log_max = torch.full_like(y, -torch.inf)
    total, weighted = torch.zeros_like(y), torch.zeros_like(y)
    for start in range(first, last, chunk):
        stop = min(start + chunk, last)
        tasks = pool.tasks(start, stop, x.device) if isinstance(pool, TaskPool) else pool[start:stop].to(x.device)
        tasks = tasks.to(x.dtype).T.contiguous()
        rows = max(1, _tile_numbers(x.device) // (stop - start))
        for low in range(0, len(x), rows):
            some = slice(low, low + rows)
            part = _tile_sums(x[some], y[some], tasks, weigh, link)
            before = PosteriorSums(log_max[some], total[some], weighted[some])
            after = before.merge(part)
            log_max[some], total[some], weighted[some] = after.log_max, after.total, after.weighted
    return PosteriorSums(log_max, total, weighted)


def _tile_sums(
    x: Tensor,
    y: Tensor,
    tasks: Tensor,
    weigh: Callable[[Tensor, Tensor, Tensor], None],
    link: Callable[[Tensor], Tensor] | None,
) -> PosteriorSums:
    """The sums of some sequences over one chunk of tasks [dims, tasks]: log-weights grow from point to point."""
    log_weights = torch.zeros(len(x), tasks.shape[1], dtype=x.dtype, device=x.device)
    with_one = torch.cat((torch.ones_like(tasks[:1]), tasks)).T.contiguous()
    log_max, total, weighted = (torch.empty_like(y) for _ in range(3))
    for k in range(x.shape[1]):
        log_max[:, k] = log_weights.amax(1)
        weights = (log_weights - log_max[:, k, None]).exp_()
        if link is None:
            # The mean prediction is the prediction of the mean task: one product for the sum of weights and of tasks.
            sums = weights @ with_one
            total[:, k], weighted[:, k] = sums[:, 0], (sums[:, 1:] * x[:, k]).sum(1)
            if k + 1 < x.shape[1]:
                weigh(log_weights, x[:, k] @ tasks, y[:, k, None])
        else:
            scores = x[:, k] @ tasks
            total[:, k], weighted[:, k] = weights.sum(1), weights.mul_(link(scores)).sum(1)
            weigh(log_weights, scores, y[:, k, None])
    return PosteriorSums(log_max, total, weighted)


def _tile_numbers(device: torch.device) -> int:
    return _TILE_NUMBERS["cpu" if device.type == "cpu" else "cuda"]


def _checked(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float64."""
    _require_finite("x", x)
    _require_finite("y", y)
    return x.to(torch.float64), y.to(torch.float64)


def _require_finite(name: str, values: Tensor) -> None:
    finite = values.isfinite()
    if not bool(finite.all()):
        raise InvalidSettings(name, f"{int((~finite).sum())} values that are not finite", "finite numbers")


def _require_labels(y: Tensor) -> None:
    if not bool(((y == 0) | (y == 1)).all()):
        raise InvalidSettings("y", "values other than 0 and 1", "0 or 1 at each point")


@torch.no_grad()
def gaussian_predictive(
    x: Float[Tensor, "batch points dims"],
    y: Float[Tensor, "batch points"],
    scale: float,
    *,
    particles: int | None = None,
    seed: int = 0,
) -> Predictive:
    """P(y = 1) at each point given the pairs before it, under the true prior w ~ scale N(0, I); logistic regression.

    Adaptive importance sampling along the points: quasi-random particles come from a Gaussian, widened, that has the
    moments of the posterior as the particles of the point before saw it, and one in eight from the prior, so that no
    weight is large (a defensive mixture: Hesterberg, Technometrics 1995). One pass gives every point, where
    `oracles.bayes_optimal` runs chains for each. `standard_error` is measured on two independent halves of the
    particles, 256 a dim if None: some 0.007 at 4 dims, scale 10 and 16 points, 0.017 at 8, 10 and 32, where it falls to
    0.01 with twice as many. Each sequence's answer is a function of it and `seed`; the first point's is 1/2 exactly.
    """
    _require_labels(y)
    _checked(x, y)
    if not (scale > 0 and math.isfinite(scale)):
        raise InvalidSettings("scale", scale, "a finite number above 0")
    particles = 256 * x.shape[2] if particles is None else particles
    require_whole("particles", particles, 16, 1 << 20)
    signed = (x * (2 * y - 1)[..., None]).to(torch.float32)
    rows = max(1, _PARTICLE_NUMBERS // (particles * x.shape[1]))
    halves = [
        torch.cat(
            [
                _adaptive(x[low : low + rows].to(torch.float32), signed[low : low + rows], scale, particles // 2, name)
                for low in range(0, len(x), rows)
            ]
        ).to(torch.float64)
        for name in (f"{seed}/0", f"{seed}/1")
    ]
    one, other = halves
    return Predictive((one + other) / 2, float((one - other).pow(2).mean().sqrt()) / 2)


def _adaptive(x: Tensor, signed: Tensor, scale: float, particles: int, name: str) -> Float[Tensor, "batch points"]:
    """Predictives of one set of particles; `signed` is x, negated where y is 0, `name` says which random numbers."""
    batch, points, dims = x.shape
    eye = torch.eye(dims, device=x.device)
    mean, factor = torch.zeros(batch, dims, device=x.device), scale * eye.expand(batch, dims, dims)
    predicted = torch.full((batch, points), 0.5, device=x.device)
    num_prior = particles // 8
    num_own = particles - num_prior
    for k in range(points):
        # Weights: prior times likelihood over the density of both sources; constants that all share are left out.
        own = _normals(num_own, dims, f"{name}/own", k, x.device)
        prior = scale * _normals(num_prior, dims, f"{name}/prior", k, x.device)
        w = torch.cat((mean[:, None] + own @ factor.mT, prior.expand(batch, -1, -1)), dim=1)
        back = torch.linalg.solve_triangular(factor, (prior - mean[:, None]).mT, upper=False).mT
        squares = torch.cat((own.pow(2).sum(1).expand(batch, -1), back.pow(2).sum(2)), dim=1)
        log_own = -squares / 2 - factor.diagonal(dim1=1, dim2=2).log().sum(1, keepdim=True)
        log_prior = -w.pow(2).sum(2) / (2 * scale**2) - dims * math.log(scale)
        density = torch.logaddexp(log_own + math.log(num_own / num_prior), log_prior)
        # The likelihood of this point's own label comes last: without it for this prediction, with it for the next.
        log_labels = F.logsigmoid(w @ signed[:, : k + 1].mT)
        log_weights = log_prior - density + log_labels[..., :k].sum(2)
        if k:
            weights = torch.softmax(log_weights, dim=1)
            predicted[:, k] = (weights * torch.sigmoid(w @ x[:, k, :, None])[..., 0]).sum(1)
        weights = torch.softmax(log_weights + log_labels[..., k], dim=1)[..., None]
        mean = (weights * w).sum(1)
        apart = w - mean[:, None]
        factor = torch.linalg.cholesky(1.5 * (weights * apart).mT @ apart + 1e-4 * scale**2 * eye)
    return predicted


def _normals(num: int, dims: int, name: str, k: int, device: torch.device) -> Float[Tensor, "num dims"]:
    """Normal numbers from a scrambled Sobol sequence, the same on every device."""
    scrambled = key_of(f"particles/{name}", k, 0) & 0x7FFF_FFFF
    uniform = torch.quasirandom.SobolEngine(dims, scramble=True, seed=scrambled).draw(num, dtype=torch.float64)
    return torch.special.ndtri(uniform.clamp(2**-32, 1 - 2**-32)).to(torch.float32).to(device)
