"""The surrogate made to answer as a task does, before its Fisher information is taken: a head, then perhaps layers.

The head is fitted to the frozen vectors first (Task2Vec, arXiv:1902.03545, stops there); tuning then starts from it.
Tasks are tuned side by side: their weights are stacked, and one batch goes through all of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from metasepia.embedding.fisher_sketch import random_signs
from metasepia.embedding.surrogate import FrozenLinear, Layer, Padded, Surrogate

Loss = Literal["softmax", "sigmoid", "gaussian"]
"""How answers are read: one label of several; each label for itself, as the reference; a vector with unit noise."""
Expectation = Literal["model", "answers", "loss"]


@dataclass(frozen=True, kw_only=True)
class Head:
    """What turns the surrogate's vector of a text into logits, or into the mean of a reply's vector."""

    weight: Float[Tensor, "outputs width"]
    bias: Float[Tensor, " outputs"]
    loss: Loss

    def to(self, device: str) -> "Head":
        return Head(weight=self.weight.to(device), bias=self.bias.to(device), loss=self.loss)

    def outputs(self, vectors: Float[Tensor, "*texts width"]) -> Float[Tensor, "*texts outputs"]:
        return vectors @ self.weight.t() + self.bias

    def gradients(
        self,
        vectors: Float[Tensor, "texts width"],
        answers: Float[Tensor, "texts outputs"] | None,
        expectation: Expectation,
        most: int,
        signs: Sequence[int],
    ) -> Float[Tensor, "texts at_most_most width"]:
        """Gradients v_k of the loss at the vectors, such that the sum of v_k v_k^T is E_y[g g^T] over answers y.

        `model`: y drawn from the head itself, the Fisher information; `answers`: y drawn from `answers`, the empirical
        one; `loss`: the one gradient of the loss on the soft answers, what the reference squares. Of more than `most`
        gradients, `most` sums with random signs (by `signs`, a seed a text) take the place, unbiased for E_y[g g^T].
        The scale is that of a head of unit norm.
        """
        factors = self._factors(self.outputs(vectors), answers, expectation)
        count = factors.shape[1]
        if count > most:
            drawn = [random_signs((most, count), "directions", seed) for seed in signs]
            factors = torch.stack(drawn).to(factors) @ factors / most**0.5
        return factors @ (self.weight / self.weight.norm().clamp(min=1e-30))

    def _factors(
        self, outputs: Tensor, answers: Tensor | None, expectation: Expectation
    ) -> Float[Tensor, "texts factors outputs"]:
        """Rows b_k with the sum of b_k b_k^T = E_y[gradient gradient^T] at the outputs."""
        if self.loss == "gaussian":
            if expectation == "model":
                return torch.eye(outputs.shape[1], device=outputs.device).expand(len(outputs), -1, -1)
            assert answers is not None
            return (outputs - answers)[:, None]
        mean = outputs.softmax(-1) if self.loss == "softmax" else outputs.sigmoid()
        spread = _multinomial_factors if self.loss == "softmax" else _bernoulli_factors
        if expectation == "model":
            return spread(mean)
        assert answers is not None
        residual = (mean - answers)[:, None]
        if expectation == "loss":
            return residual
        if self.loss == "sigmoid":
            return torch.diag_embed((answers * (1 - answers) + (mean - answers).square()).sqrt())
        return torch.cat([spread(answers), residual], dim=1)


def _multinomial_factors(p: Float[Tensor, "texts labels"]) -> Float[Tensor, "texts labels_less_one labels"]:
    """The rows of a Cholesky factor of diag(p) - p p^T, by breaking the stick label after label."""
    labels = p.shape[1]
    after = p.flip(1).cumsum(1).flip(1)  # what is left of the stick before each label is broken off
    left, rest = after[:, :-1], after[:, 1:].clamp(min=1e-30)
    here, safe = p[:, :-1], left.clamp(min=1e-30)
    own = (here * rest / safe).sqrt()
    others = -(here / (safe * rest)).sqrt()[..., None] * p[:, None]
    later = torch.ones(labels - 1, labels, device=p.device).triu(1)
    return others * later + torch.diag_embed(F.pad(own, (0, 1)))[:, :-1]


def _bernoulli_factors(p: Float[Tensor, "texts labels"]) -> Float[Tensor, "texts labels labels"]:
    return torch.diag_embed((p * (1 - p)).sqrt())


def fit_head(
    vectors: Float[np.ndarray, "texts width"],
    answers: Float[np.ndarray, "texts outputs"],
    loss: Loss,
    ridge: float,
) -> Head:
    """The head of least loss, mean over texts, plus ridge / 2 |weight|^2; the bias is free. Convex, so there is one.

    In float64 by L-BFGS from zero; in closed form for a vector's mean.
    """
    x, y = torch.from_numpy(vectors).double(), torch.from_numpy(answers).double()
    if loss == "gaussian":
        centre, mean = x.mean(0), y.mean(0)
        inner = (x - centre).t() @ (x - centre) / len(x)
        inner.diagonal().add_(ridge)
        weight = torch.linalg.solve(inner, (x - centre).t() @ (y - mean) / len(x)).t()
        return Head(weight=weight.float().contiguous(), bias=(mean - weight @ centre).float(), loss=loss)
    from scipy.optimize import minimize

    extended = torch.cat([x, x.new_ones(len(x), 1)], dim=1)

    def value_and_gradient(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weight = torch.from_numpy(flat).view(y.shape[1], -1)
        logits = extended @ weight.t()
        if loss == "softmax":
            value = -(y * logits.log_softmax(1)).sum(1).mean()
            error = logits.softmax(1) - y
        else:
            value = F.binary_cross_entropy_with_logits(logits, y, reduction="sum") / len(x)
            error = logits.sigmoid() - y
        gradient = error.t() @ extended / len(x)
        gradient[:, :-1] += ridge * weight[:, :-1]
        return float(value + ridge / 2 * weight[:, :-1].square().sum()), gradient.flatten().numpy()

    start = np.zeros(y.shape[1] * extended.shape[1])
    options = {"maxiter": 500, "gtol": 1e-7, "ftol": 1e-14}
    found = minimize(value_and_gradient, start, jac=True, method="L-BFGS-B", options=options).x
    weight = torch.from_numpy(found).view(y.shape[1], -1).float()
    return Head(weight=weight[:, :-1].contiguous(), bias=weight[:, -1].contiguous(), loss=loss)


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """As in FUTE: AdamW, a linear schedule with a warm-up, the norm of each task's gradients clipped."""

    epochs: int
    learning_rate: float
    batch_size: int
    weight_decay: float
    warm_up: float = 0.05
    clip: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Some of a set of texts, up to the first layer that is looked at."""

    places: list[int]
    """Which of the texts."""
    padded: Padded
    states: Float[Tensor, "rows seq width"]
    """What enters that layer."""


class StackedLinear(FrozenLinear):
    """Stands where a frozen linear layer stands, with weights of each task; rows lie task by task, as many of each."""

    def __init__(self, weight: Float[Tensor, "tasks out in"], bias: Float[Tensor, "tasks out"]) -> None:
        self.weight, self.bias = weight, bias

    @classmethod
    def copies(cls, linear: FrozenLinear, tasks: int) -> "StackedLinear":
        assert linear.bias is not None
        weight = linear.weight.expand(tasks, -1, -1).clone().requires_grad_()
        return cls(weight, linear.bias.expand(tasks, -1).clone().requires_grad_())

    def __call__(self, x: Float[Tensor, "rows seq in"]) -> Float[Tensor, "rows seq out"]:
        rows, seq, _ = x.shape
        by_task = x.reshape(len(self.weight), -1, x.shape[-1])
        return torch.baddbmm(self.bias[:, None], by_task, self.weight.transpose(1, 2)).view(rows, seq, -1)

    def of(self, task: int) -> FrozenLinear:
        return FrozenLinear(self.weight[task].detach().clone(), self.bias[task].detach().clone())


LINEARS = ("query_key_value", "attended", "up", "down")
"""Parts of a surrogate's layer that have weights."""


def tune(
    surrogate: Surrogate,
    first_layer: int,
    batches: Sequence[Batch],
    heads: Sequence[Head],
    answers: Sequence[Tensor],
    tuning: Tuning,
    seed: int,
) -> list[tuple[list[Layer], Head]]:
    """The layers from `first_layer` on and the head of each task, trained on the same texts and in the same order.

    The states of `batches` enter `first_layer`; `answers` are [texts, outputs]. All heads have the same loss.
    """
    tasks = len(heads)
    stacked = [
        {n: StackedLinear.copies(getattr(one, n), tasks) for n in LINEARS} for one in surrogate.layers[first_layer:]
    ]
    layers = [replace(one, **parts) for one, parts in zip(surrogate.layers[first_layer:], stacked, strict=True)]
    weights = [head.weight.clone().to(surrogate.device).requires_grad_() for head in heads]
    biases = [head.bias.clone().to(surrogate.device).requires_grad_() for head in heads]
    linears = [linear for parts in stacked for linear in parts.values()]
    decaying, free = [*(linear.weight for linear in linears), *weights], [*(one.bias for one in linears), *biases]
    optimiser = torch.optim.AdamW(
        [{"params": decaying, "weight_decay": tuning.weight_decay}, {"params": free, "weight_decay": 0.0}],
        lr=tuning.learning_rate,
    )
    steps = tuning.epochs * len(batches)
    warm_up = max(1, round(tuning.warm_up * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / warm_up, (steps - step) / max(1, steps - warm_up))
    )
    rng = np.random.default_rng(seed)
    for place in np.concatenate([rng.permutation(len(batches)) for _ in range(tuning.epochs)]):
        batch = batches[place]
        mask = batch.padded.mask.repeat(tasks, 1)
        hidden, bias = batch.states.repeat(tasks, 1, 1), surrogate.attention_bias(mask)
        with torch.enable_grad():
            for layer in layers:
                hidden = surrogate.forward_layer(layer, hidden, bias)
            vectors = surrogate.vectors(hidden, mask).view(tasks, len(batch.places), -1)
            losses = [
                _loss(vectors[t] @ weights[t].t() + biases[t], answers[t][batch.places].to(surrogate.device), head.loss)
                for t, head in enumerate(heads)
            ]
            optimiser.zero_grad()
            torch.stack(losses).sum().backward()
        _clip(linears, weights, biases, tuning.clip)
        optimiser.step()
        schedule.step()
    return [
        (
            [
                replace(one, **{name: linear.of(t) for name, linear in parts.items()})
                for one, parts in zip(surrogate.layers[first_layer:], stacked, strict=True)
            ],
            Head(weight=weights[t].detach(), bias=biases[t].detach(), loss=head.loss),
        )
        for t, head in enumerate(heads)
    ]


def _loss(outputs: Tensor, answers: Tensor, loss: Loss) -> Tensor:
    if loss == "softmax":
        return F.cross_entropy(outputs, answers)
    if loss == "sigmoid":
        return F.binary_cross_entropy_with_logits(outputs, answers)
    return F.mse_loss(outputs, answers, reduction="sum") / (2 * len(outputs))


def _clip(linears: Sequence[StackedLinear], weights: Sequence[Tensor], biases: Sequence[Tensor], most: float) -> None:
    """Scales each task's gradients to a norm of at most `most`."""
    grads = [grad for one in linears for grad in (one.weight.grad, one.bias.grad) if grad is not None]
    square = torch.stack([grad.flatten(1).square().sum(1) for grad in grads]).sum(0)
    own = [[part.grad for part in pair if part.grad is not None] for pair in zip(weights, biases, strict=True)]
    square = square + torch.stack([torch.stack([grad.square().sum() for grad in pair]).sum() for pair in own])
    scale = (most / square.sqrt().clamp(min=1e-30)).clamp(max=1)
    for grad in grads:
        grad.mul_(scale.view(-1, *[1] * (grad.dim() - 1)))
    for pair, by in zip(own, scale, strict=True):
        for grad in pair:
            grad.mul_(by)
