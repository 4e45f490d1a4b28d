"""Prefixes of many tasks tuned at once on one frozen surrogate: rows of all tasks in shared padded batches.

What does not depend on the prefixes is computed once for each distinct text: tokens, the layers below the first one
that has a prefix, and that layer's queries, keys and values. Each task has its own prefix, head, schedule, clipping
and exit, so it ends where it would end alone, beyond rounding.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from metasepia.embedding.surrogate import Surrogate

Loss = Literal["bce", "ce", "mse"]
BATCH_TOKENS = {"cpu": 2048, "cuda": 65_536}
"""Padded tokens in a forward of prefixed rows."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Of one tuning: AdamW with a linear rise over `warm_up` of the steps and a linear fall to zero."""

    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    warm_up: float
    clip: float
    dropout: float
    patience: int
    optimiser: Literal["adamw", "descent"] = "adamw"


@dataclass(kw_only=True, eq=False)
class Tuned:
    """One task on its way: what it asks of the surrogate, and its head."""

    texts: Int[np.ndarray, " rows"]
    """Of each row, its place in `KeptTexts`."""
    targets: Float[Tensor, "rows outputs"]
    weights: Float[Tensor, " rows"]
    """Mean 1."""
    loss: Loss
    weight: Float[Tensor, "width outputs"]
    bias: Float[Tensor, " outputs"]
    head_trains: bool = False
    losses: tuple[float, ...] = ()
    """Mean loss of each epoch, as it was before each step."""


class KeptTexts:
    """Distinct texts, and what enters the first prefixed layer for them: states and their products, token by token."""

    def __init__(self, surrogate: Surrogate, token_ids: Sequence[Sequence[int]], first_layer: int) -> None:
        self.surrogate, self.first_layer = surrogate, first_layer
        self.lengths = np.array([len(ids) for ids in token_ids], np.int64)
        self.begins = np.concatenate([[0], np.cumsum(self.lengths)])
        layer = surrogate.layers[first_layer]
        width, tokens = surrogate.width, int(self.lengths.sum())
        self.hidden = torch.empty(tokens, width, device=surrogate.device)
        self.projected = torch.empty(tokens, 3 * width, device=surrogate.device)
        with torch.no_grad():
            for group in surrogate.encoder.plan(self.lengths.tolist()):
                batch = surrogate.padded([token_ids[i] for i in group])
                states = surrogate.hidden_states(batch, first_layer)[-1][batch.mask]
                places = torch.cat([torch.arange(self.begins[i], self.begins[i + 1]) for i in group])
                self.hidden[places] = states
                self.projected[places] = layer.query_key_value(states)

    def rows(
        self, texts: Int[np.ndarray, " rows"]
    ) -> tuple[Float[Tensor, "rows seq width"], Float[Tensor, "rows seq 3*width"], Bool[Tensor, "rows seq"]]:
        lengths = self.lengths[texts]
        steps = np.arange(int(lengths.max()))
        mask = steps[None] < lengths[:, None]
        places = torch.from_numpy(np.where(mask, self.begins[texts][:, None] + steps[None], 0))
        return self.hidden[places], self.projected[places], torch.from_numpy(mask).to(self.hidden.device)

    def vectors(
        self,
        texts: Int[np.ndarray, " rows"],
        prefixes: Float[Tensor, "tasks layers 2 heads prefix head_dim"],
        rows_of_tasks: Sequence[int],
    ) -> Float[Tensor, "rows width"]:
        """Sentence vectors of rows that lie task by task, under each task's prefix."""
        surrogate = self.surrogate
        hidden, projected, mask = self.rows(texts)
        bias = surrogate.attention_bias(mask, prefixes.shape[4])
        for place, layer in enumerate(surrogate.layers[self.first_layer :]):
            hidden = surrogate.forward_layer(
                layer, hidden, bias, prefixes[:, place], rows_of_tasks, projected=projected if place == 0 else None
            )
        return surrogate.vectors(hidden, mask)


def chunks(
    lengths: Int[np.ndarray, " rows"], owners: Int[np.ndarray, " rows"], most_tokens: int
) -> list[Int[np.ndarray, " some"]]:
    """Rows that share a forward, by place: of similar length, within `most_tokens` padded tokens, task by task."""
    order = np.lexsort((np.arange(len(lengths)), owners, -lengths))
    found, begin = [], 0
    while begin < len(order):
        longest = int(lengths[order[begin]])
        end = min(len(order), begin + max(1, most_tokens // longest))
        some = order[begin:end]
        found.append(some[np.argsort(owners[some], kind="stable")])
        begin = end
    return found


def tune(
    kept: KeptTexts,
    tasks: Sequence[Tuned],
    initial: Float[Tensor, "layers 2 heads prefix head_dim"],
    schedule: Schedule,
    *,
    seed: int,
    told: Callable[[int], None] | None = None,
) -> Float[Tensor, "tasks layers 2 heads prefix head_dim"]:
    """The tuned prefix of each task. `told(n)` hears of n tasks that have ended."""
    prefixes = initial[None].repeat(len(tasks), *[1] * initial.ndim)
    states = [_State(task, initial, schedule, seed) for task in tasks]
    active = list(range(len(tasks)))
    while active:
        picked = [states[t].next_rows() for t in active]
        leaf = prefixes[active].clone().requires_grad_()
        gradients = _gradients(kept, [tasks[t] for t in active], picked, leaf, schedule.dropout, states[active[0]])
        still = []
        for place, t in enumerate(active):
            prefixes[t] = states[t].step(prefixes[t], *(part[place] for part in gradients))
            if not states[t].ended:
                still.append(t)
        if told is not None and len(still) < len(active):
            told(len(active) - len(still))
        active = still
    return prefixes


def _gradients(
    kept: KeptTexts,
    tasks: Sequence[Tuned],
    picked: Sequence[Int[np.ndarray, " batch"]],
    leaf: Float[Tensor, "tasks layers 2 heads prefix head_dim"],
    dropout: float,
    clock: "_State",
) -> tuple[Tensor, list[Tensor | None], list[Tensor | None], list[float]]:
    """Of each task's mean loss over its own rows: to its prefix, its head's weight and bias; and the losses."""
    rows = np.concatenate([task.texts[some] for task, some in zip(tasks, picked, strict=True)])
    owners = np.repeat(np.arange(len(tasks)), [len(some) for some in picked])
    places = np.concatenate(picked)
    heads = [
        (task.weight.clone().requires_grad_(), task.bias.clone().requires_grad_()) if task.head_trains else None
        for task in tasks
    ]
    kept_part = clock.dropout_mask(leaf.shape[1:], dropout)
    losses = np.zeros(len(tasks))
    for some in chunks(kept.lengths[rows], owners, BATCH_TOKENS[kept.surrogate.device]):
        mine, counts = np.unique(owners[some], return_counts=True)
        prefixes = leaf[torch.from_numpy(mine)] * kept_part
        vectors = kept.vectors(rows[some], prefixes, counts.tolist())
        total, begin = torch.zeros((), device=vectors.device), 0
        for t, count in zip(mine.tolist(), counts.tolist(), strict=True):
            task, head = tasks[t], heads[t]
            weight, bias = head if head is not None else (task.weight, task.bias)
            at = torch.from_numpy(places[some[begin : begin + count]])
            outputs = vectors[begin : begin + count] @ weight + bias
            loss = (row_losses(outputs, task.targets[at], task.loss) * task.weights[at]).sum() / len(picked[t])
            losses[t] += loss.item()
            total = total + loss
            begin += count
        total.backward()
    assert leaf.grad is not None
    return (
        leaf.grad,
        [None if head is None else head[0].grad for head in heads],
        [None if head is None else head[1].grad for head in heads],
        losses.tolist(),
    )


def row_losses(
    outputs: Float[Tensor, "rows outputs"], targets: Float[Tensor, "rows outputs"], loss: Loss
) -> Float[Tensor, " rows"]:
    """Of each row; `bce` is the reference's, a mean over the labels on soft targets."""
    if loss == "bce":
        return F.binary_cross_entropy_with_logits(outputs, targets, reduction="none").mean(dim=1)
    if loss == "ce":
        return -(targets * outputs.log_softmax(dim=1)).sum(dim=1)
    return (outputs - targets).square().sum(dim=1)


class _State:
    """A task's clock, order of rows and moments."""

    def __init__(self, task: Tuned, initial: Tensor, schedule: Schedule, seed: int) -> None:
        self.task, self.schedule, self.seed = task, schedule, seed
        self.num_rows = len(task.texts)
        self.steps_an_epoch = math.ceil(self.num_rows / schedule.batch_size)
        self.steps = schedule.epochs * self.steps_an_epoch
        self.done = 0
        self.ended = self.steps == 0
        self._moments = {"prefix": _Moments(initial), "weight": _Moments(task.weight), "bias": _Moments(task.bias)}
        self._epoch_losses: list[float] = []

    def next_rows(self) -> Int[np.ndarray, " batch"]:
        epoch, part = divmod(self.done, self.steps_an_epoch)
        order = np.random.default_rng([self.seed, 1, epoch]).permutation(self.num_rows)
        size = self.schedule.batch_size
        return order[part * size : (part + 1) * size]

    def dropout_mask(self, shape: Sequence[int], dropout: float) -> Tensor | float:
        """One mask a step for all rows, drawn by seed and step, so that it is the same alone and among others."""
        if dropout == 0:
            return 1.0
        generator = np.random.default_rng([self.seed, 2, self.done])
        keep = torch.from_numpy(generator.random(tuple(shape), np.float32) >= dropout)
        return (keep / (1 - dropout)).to(self.task.weight.device)

    def step(self, prefix: Tensor, gradient: Tensor, weight: Tensor | None, bias: Tensor | None, loss: float) -> Tensor:
        schedule, task = self.schedule, self.task
        parts = [part for part in (gradient, weight, bias) if part is not None]
        norm = math.sqrt(sum(float(part.square().sum(dtype=torch.float64)) for part in parts))
        scale = min(1.0, schedule.clip / (norm + 1e-6)) if schedule.optimiser == "adamw" else 1 / (norm + 1e-12)
        warm = max(1, round(schedule.warm_up * self.steps))
        left = (self.steps - self.done) / max(1, self.steps - warm)
        rate = schedule.learning_rate * min((self.done + 1) / warm, left, 1.0)
        self.done += 1

        def moved(name: str, old: Tensor, slope: Tensor, decay: float) -> Tensor:
            if schedule.optimiser == "descent":
                return old - rate * scale * slope
            return old * (1 - rate * decay) - rate * self._moments[name].direction(slope * scale, self.done)

        if weight is not None and bias is not None:
            task.weight = moved("weight", task.weight, weight, schedule.weight_decay)
            task.bias = moved("bias", task.bias, bias, 0.0)
        self._epoch_losses.append(loss)
        if self.done % self.steps_an_epoch == 0:
            task.losses += (math.fsum(self._epoch_losses) / len(self._epoch_losses),)
            self._epoch_losses.clear()
            best = int(np.argmin(task.losses))
            self.ended = len(task.losses) - 1 - best >= schedule.patience
        self.ended = self.ended or self.done == self.steps
        return moved("prefix", prefix, gradient, schedule.weight_decay)


class _Moments:
    """Adam's (arXiv:1412.6980), betas 0.9 and 0.999."""

    def __init__(self, like: Tensor) -> None:
        self.mean, self.square = torch.zeros_like(like), torch.zeros_like(like)

    def direction(self, gradient: Tensor, step: int) -> Tensor:
        self.mean.mul_(0.9).add_(gradient, alpha=0.1)
        self.square.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
        corrected = (self.square / (1 - 0.999**step)).sqrt_().add_(1e-8)
        return self.mean / (1 - 0.9**step) / corrected
