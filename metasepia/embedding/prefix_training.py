"""Prefixes of many tasks tuned at once on one frozen surrogate: rows of all tasks in shared padded batches.

What does not depend on the prefixes is computed once for each distinct text: tokens, the layers below the first one
that has a prefix, and that layer's queries, keys and values. Each task has its own prefix, head, schedule, clipping
and exit, so it ends where it would end alone, beyond rounding.
"""

import math
from collections.abc import Iterator, Sequence
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
) -> list[Int[np.ndarray, " _"]]:
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
) -> Float[Tensor, "tasks layers 2 heads prefix head_dim"]:
    """The tuned prefix of each task; heads that train are changed in place.

    In the first step all prefixes are the initial one, so tasks whose texts are the same share that step's forward.
    """
    prefixes = initial[None].repeat(len(tasks), *[1] * initial.ndim)
    states = [_State(task, initial, schedule, seed) for task in tasks]
    active, step = list(range(len(tasks))), 0
    while active:
        mask = _dropout_mask(initial, schedule.dropout, seed, step)
        members = [tasks[t] for t in active]
        picked = [states[t].next_rows() for t in active]
        if step == 0:
            slopes = _first_slopes(kept, members, picked, initial, mask)
        else:
            slopes = _slopes(kept, members, picked, prefixes[active], mask)
        for t, slope in zip(active, slopes, strict=True):
            prefixes[t] = states[t].step(prefixes[t], slope)
        active, step = [t for t in active if not states[t].ended], step + 1
    return prefixes


@dataclass(kw_only=True, eq=False)
class _Slope:
    """Gradients of a task's mean loss over some of its rows."""

    prefix: Tensor
    weight: Tensor
    bias: Tensor
    loss: float = 0.0


def _slopes(
    kept: KeptTexts,
    tasks: Sequence[Tuned],
    picked: Sequence[Int[np.ndarray, " _"]],
    prefixes: Float[Tensor, "tasks layers 2 heads prefix head_dim"],
    mask: Float[Tensor, "layers 2 heads prefix head_dim"],
) -> list[_Slope]:
    """Of tasks with prefixes of their own: rows of several tasks share each forward and its backward."""
    texts = np.concatenate([task.texts[some] for task, some in zip(tasks, picked, strict=True)])
    owners = np.repeat(np.arange(len(tasks)), [len(some) for some in picked])
    rows = np.concatenate(picked)
    found = [_nothing(task, prefixes[0]) for task in tasks]
    for some in chunks(kept.lengths[texts], owners, BATCH_TOKENS[kept.surrogate.device]):
        present, counts = np.unique(owners[some], return_counts=True)
        leaf = prefixes[torch.from_numpy(present)].requires_grad_()
        vectors = kept.vectors(texts[some], leaf * mask, counts.tolist())
        ends = np.cumsum(counts).tolist()
        heads, losses = [], []
        for t, begin, end in zip(present.tolist(), [0, *ends], ends, strict=False):
            head, loss = _loss(tasks[t], vectors[begin:end], rows[some[begin:end]], len(picked[t]))
            heads.append(head)
            losses.append(loss)
        gradients = torch.autograd.grad(torch.stack(losses).sum(), [leaf, *(part for head in heads for part in head)])
        of_heads = iter(gradients[1:])
        for place, t in enumerate(present.tolist()):
            _add(found[t], gradients[0][place], of_heads, losses[place], bool(heads[place]))
    return found


def _first_slopes(
    kept: KeptTexts,
    tasks: Sequence[Tuned],
    picked: Sequence[Int[np.ndarray, " _"]],
    initial: Float[Tensor, "layers 2 heads prefix head_dim"],
    mask: Float[Tensor, "layers 2 heads prefix head_dim"],
) -> list[_Slope]:
    """Of tasks that all have the initial prefix: one forward for each set of texts, a backward a task."""
    found = [_nothing(task, initial) for task in tasks]
    sharing: dict[bytes, list[int]] = {}
    for t, task in enumerate(tasks):
        sharing.setdefault(task.texts[picked[t]].tobytes(), []).append(t)
    for members in sharing.values():
        rows = picked[members[0]]
        texts = tasks[members[0]].texts[rows]
        for some in chunks(kept.lengths[texts], np.zeros(len(texts), np.int64), BATCH_TOKENS[kept.surrogate.device]):
            leaf = initial.clone().requires_grad_()
            vectors = kept.vectors(texts[some], (leaf * mask)[None], [len(some)])
            for t in members:
                head, loss = _loss(tasks[t], vectors, picked[t][some], len(rows))
                gradients = torch.autograd.grad(loss, [leaf, *head], retain_graph=t != members[-1])
                _add(found[t], gradients[0], iter(gradients[1:]), loss, bool(head))
    return found


def _nothing(task: Tuned, prefix: Tensor) -> _Slope:
    return _Slope(
        prefix=torch.zeros_like(prefix), weight=torch.zeros_like(task.weight), bias=torch.zeros_like(task.bias)
    )


def _add(slope: _Slope, prefix: Tensor, of_head: Iterator[Tensor], loss: Tensor, head_trains: bool) -> None:
    slope.prefix += prefix
    if head_trains:
        slope.weight += next(of_head)
        slope.bias += next(of_head)
    slope.loss += loss.item()


def _loss(
    task: Tuned, vectors: Float[Tensor, "some width"], rows: Int[np.ndarray, " some"], num_rows: int
) -> tuple[tuple[Tensor, ...], Float[Tensor, ""]]:
    """What these rows add to the mean over `num_rows`, and the head's leaves if it trains."""
    weight, bias = task.weight, task.bias
    leaves: tuple[Tensor, ...] = ()
    if task.head_trains:
        leaves = weight, bias = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    at = torch.from_numpy(rows)
    losses = row_losses(vectors @ weight + bias, task.targets[at], task.loss) * task.weights[at]
    return leaves, losses.sum() / num_rows


def _dropout_mask(like: Tensor, dropout: float, seed: int, step: int) -> Tensor:
    """One mask a step, for all rows of all tasks, so that a task has the same alone and among others."""
    if dropout == 0:
        return torch.ones_like(like)
    drawn = np.random.default_rng([seed, 2, step]).random(tuple(like.shape), np.float32)
    return torch.from_numpy(np.where(drawn >= dropout, 1 / (1 - dropout), 0).astype(np.float32)).to(like.device)


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
        self.ended = False
        self._moments = {"prefix": _Moments(initial), "weight": _Moments(task.weight), "bias": _Moments(task.bias)}
        self._epoch_losses: list[float] = []

    def next_rows(self) -> Int[np.ndarray, " batch"]:
        epoch, part = divmod(self.done, self.steps_an_epoch)
        order = np.random.default_rng([self.seed, 1, epoch]).permutation(self.num_rows)
        size = self.schedule.batch_size
        return order[part * size : (part + 1) * size]

    def step(self, prefix: Tensor, slope: _Slope) -> Tensor:
        """The prefix after one step; the head's, if it trains, is taken in place."""
        schedule, task = self.schedule, self.task
        parts = [slope.prefix, *([slope.weight, slope.bias] if task.head_trains else [])]
        norm = math.sqrt(sum(float(part.square().sum(dtype=torch.float64)) for part in parts))
        warm = max(1, round(schedule.warm_up * self.steps))
        left = (self.steps - self.done) / max(1, self.steps - warm)
        rate = schedule.learning_rate * min((self.done + 1) / warm, left, 1.0)
        self.done += 1
        changed = self._moved("prefix", prefix, slope.prefix, norm, rate, schedule.weight_decay)
        if task.head_trains:
            task.weight = self._moved("weight", task.weight, slope.weight, norm, rate, schedule.weight_decay)
            task.bias = self._moved("bias", task.bias, slope.bias, norm, rate, 0.0)
        self._end_of_step(slope.loss)
        return changed

    def _moved(self, name: str, old: Tensor, gradient: Tensor, norm: float, rate: float, decay: float) -> Tensor:
        if self.schedule.optimiser == "descent":
            return old - rate / max(norm, 1e-30) * gradient
        clipped = gradient * min(1.0, self.schedule.clip / (norm + 1e-6))
        return old * (1 - rate * decay) - rate * self._moments[name].direction(clipped, self.done)

    def _end_of_step(self, loss: float) -> None:
        self._epoch_losses.append(loss)
        if self.done % self.steps_an_epoch == 0:
            self.task.losses += (math.fsum(self._epoch_losses) / len(self._epoch_losses),)
            self._epoch_losses.clear()
            best = int(np.argmin(self.task.losses))
            self.ended = len(self.task.losses) - 1 - best >= self.schedule.patience
        self.ended = self.ended or self.done == self.steps


class _Moments:
    """Adam's (arXiv:1412.6980), betas 0.9 and 0.999."""

    def __init__(self, like: Tensor) -> None:
        self.mean, self.square = torch.zeros_like(like), torch.zeros_like(like)

    def direction(self, gradient: Tensor, step: int) -> Tensor:
        self.mean.mul_(0.9).add_(gradient, alpha=0.1)
        self.square.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
        corrected = (self.square / (1 - 0.999**step)).sqrt_().add_(1e-8)
        return self.mean / (1 - 0.9**step) / corrected
