"""Probabilistic logistic regression, the task family that the reasoning module learns from (TART, arXiv:2306.07536).

For each sequence w ~ alpha N(0, I); then x ~ N(0, I) and P(y = 1 | x) = sigmoid(w . x), with no bias. A large alpha
means nearly separable classes. A batch is a pure function of (task_seed, data_seed, noise_seed, step), bit for bit the
same on CPU and GPU; fewer sequences, pairs or dims give a prefix of the larger batch.
"""

import functools
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from metasepia.synthetic import sampling

_MAX_DIMS, _MAX_PAIRS = 1 << 10, 1 << 12


@dataclass(frozen=True, kw_only=True)
class Seeds:
    """What a batch is a function of, beside its step."""

    task: int = 0
    data: int = 1
    noise: int = 2


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Sequences of labelled points, and the weights that labelled them."""

    x: Float[Tensor, "batch pairs dims"]
    y: Float[Tensor, "batch pairs"]
    """0 or 1."""
    w: Float[Tensor, "batch dims"]

    @property
    def probabilities(self) -> Float[Tensor, "batch pairs"]:
        """P(y = 1 | x, w)."""
        return torch.sigmoid(_scores(self.x, self.w))


@dataclass(frozen=True, kw_only=True)
class ProbabilisticLogisticRegression:
    """The family: its dimension and how sharply labels follow w."""

    dims: int
    """From 1 to 1024."""
    alphas: tuple[float, ...] = (10.0,)
    """Each sequence takes one of them at random; the paper has 10 alone, its code's `variable_noise` 1 to 10."""

    def batch(
        self,
        seeds: Seeds,
        step: int,
        *,
        num_sequences: int,
        num_pairs: int,
        active_dims: int | None = None,
        device: torch.device | str = "cpu",
    ) -> Batch:
        """The batch of this step. Coordinates of x from `active_dims` on are zero; w keeps them all."""
        device = torch.device(device)
        assert self.dims <= _MAX_DIMS and num_pairs <= _MAX_PAIRS
        sequence = torch.arange(num_sequences, device=device)
        pair = sequence[:, None] * _MAX_PAIRS + torch.arange(num_pairs, device=device)
        dim = torch.arange(self.dims, device=device)

        alpha = _on_device(self.alphas, device)[
            sampling.choice(len(self.alphas), sampling.key_of("alpha", seeds.task, step), sequence)
        ]
        w = sampling.normal(sampling.key_of("w", seeds.task, step), sequence[:, None] * _MAX_DIMS + dim)
        w = alpha[:, None] * w
        x = sampling.normal(sampling.key_of("x", seeds.data, step), pair[..., None] * _MAX_DIMS + dim)
        if active_dims is not None and active_dims < self.dims:
            x = x * (dim < active_dims)
        noise = sampling.logistic(sampling.key_of("y", seeds.noise, step), pair)
        return Batch(x=x, y=(_scores(x, w) > noise).to(torch.float32), w=w)


@functools.cache
def _on_device(values: tuple[float, ...], device: torch.device) -> Tensor:
    # Once a device: a copy to a GPU waits for all that was queued there, and would do so at every step.
    return torch.tensor(values, device=device)


def _scores(x: Tensor, w: Tensor) -> Tensor:
    """w . x as one product and one sum after another: a matrix product would round differently on each device."""
    total = torch.zeros_like(x[..., 0])
    for d in range(x.shape[-1]):
        total = total + x[..., d] * w[:, None, d]
    return total
