"""Noisy linear and logistic regression whose tasks come from a finite pool or from the true Gaussian prior.

The data of Raventos et al. (arXiv:2306.15063): a task is a vector w; then x ~ N(0, I), and y = w . x + eps with
eps ~ N(0, noise_variance), or, for `logistic`, y is 1 with probability sigmoid(w . x). A pool of M tasks is the first M
of one endless list, so pools are nested in M, where the paper draws each anew. A batch is a pure function of the pool's
seed, the three seeds and the step, bit for bit the same on CPU and GPU; fewer sequences, points or dims give a prefix
of the larger batch.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from metasepia.errors import InvalidSettings
from metasepia.synthetic import sampling
from metasepia.synthetic.tasks import Seeds

Kind = Literal["linear", "logistic"]
Of = Literal["pretraining", "new"]
Stream = Literal["training", "evaluation"]

# Strides of the numbering: fewer dims or points are a prefix of more. Those of `tasks`, so that logistic regression
# without a pool is that family, number for number.
_MAX_DIMS, _MAX_POINTS, _MAX_TASKS = 1 << 10, 1 << 12, 1 << 24
MIN_NOISE_VARIANCE = 1e-8
"""Below it the oracles' float64 no longer tells noise from rounding."""


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

    def __post_init__(self) -> None:
        require_whole("dims", self.dims, 1, _MAX_DIMS)
        if self.num_tasks is not None:
            require_whole("num_tasks", self.num_tasks, 1, _MAX_TASKS, "none (a fresh task for each sequence) or ")
        if not (self.scale > 0 and math.isfinite(self.scale)):  # written so that NaN fails too
            raise InvalidSettings("scale", self.scale, "a finite number above 0")

    def tasks(
        self, first: int = 0, last: int | None = None, device: torch.device | str = "cpu"
    ) -> Float[Tensor, "tasks dims"]:
        """Tasks first .. last - 1 of the pool, drawn when asked for, so that a pool never need be held whole.

        Raises InvalidSettings for the true prior, which has no list, and for a range outside the pool.
        """
        if self.num_tasks is None:
            raise InvalidSettings("num_tasks", None, "a number: the true prior has no list of tasks")
        last = self.num_tasks if last is None else last
        if not 0 <= first < last <= self.num_tasks:
            raise InvalidSettings("tasks", (first, last), f"a range of at least one within 0 .. {self.num_tasks}")
        return self.at(torch.arange(first, last, device=device))

    def at(self, index: Int[Tensor, " tasks"]) -> Float[Tensor, "tasks dims"]:
        """The tasks of these places of the list, on the index's device; nothing else of the pool is drawn."""
        coordinate = index[:, None] * _MAX_DIMS + torch.arange(self.dims, device=index.device)
        return sampling.normal(self._key, coordinate) * torch.tensor(self.scale, device=index.device)

    @property
    def _key(self) -> int:
        return sampling.key_of("pool", self.seed, 0)


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

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "logistic"):
            raise InvalidSettings("kind", self.kind, "linear or logistic")
        require_whole("points", self.points, 1, _MAX_POINTS)
        if self.kind == "linear":
            require_noise(self.noise_variance)
        elif self.noise_variance != 0:
            raise InvalidSettings(
                "noise_variance", self.noise_variance, "0 for logistic, whose labels are random anyway"
            )

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
        stack = batch_of_many([self], [seeds], step, num_sequences=num_sequences, device=device, of=of, stream=stream)
        return _mapped(stack, lambda tensor: tensor[0])

    def batch_of_tasks(
        self,
        w: Float[Tensor, "batch dims"],
        seeds: Seeds,
        step: int,
        *,
        stream: Stream = "evaluation",
    ) -> RegressionBatch:
        """Sequence i has task w[i], whatever the pool, and the x and noise of `batch`; on w's device."""
        if w.shape[1] != self.pool.dims:
            raise InvalidSettings("dims", w.shape[1], f"that of the pool, {self.pool.dims}")
        drawing = _Drawing.of((self,), (seeds,), len(w), w.device, "pretraining", stream)
        keys = drawing.keys_at([step])
        task = torch.full((1, 1, len(w)), -1, device=w.device)
        stack = drawing.labelled(keys, w.to(torch.float32)[None, None], task)
        return _mapped(stack, lambda tensor: tensor[0, 0])


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
    stack = batches_of_many(problems, seeds, [step], num_sequences=num_sequences, device=device, of=of, stream=stream)
    return _mapped(stack, lambda tensor: tensor[0])


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

    One copy of keys to the device for all of them: on a GPU, ask for some tens of steps at a time.
    """
    if not steps:
        raise InvalidSettings("steps", [], "at least one")
    drawing = _Drawing.of(tuple(problems), tuple(seeds), num_sequences, torch.device(device), of, stream)
    keys = drawing.keys_at(steps)
    w, task = drawing.tasks(keys)
    return drawing.labelled(keys, w, task)


def path_between(
    first: Float[Tensor, "*batch dims"], second: Float[Tensor, "*batch dims"], alphas: Float[Tensor, " alphas"]
) -> Float[Tensor, "alphas *batch dims"]:
    """The paper's interpolation between tasks: alpha first + (1 - alpha) second, at the mean of the two norms.

    Zero where the sum is: half way between a task and its negative.
    """
    alpha = alphas.view(-1, *[1] * first.ndim)
    mixed = alpha * first + (1 - alpha) * second
    norm = (first.norm(dim=-1, keepdim=True) + second.norm(dim=-1, keepdim=True)) / 2
    return norm * mixed / mixed.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(mixed.dtype).tiny)


class _Drawing:
    """Everything about a stack of batches that does not change with the step; kept on the device between steps."""

    def __init__(
        self,
        problems: tuple[PooledRegression, ...],
        seeds: tuple[Seeds, ...],
        num_sequences: int,
        device: torch.device,
        of: Of,
        stream: Stream,
    ) -> None:
        if not problems or len(problems) != len(seeds):
            raise InvalidSettings("seeds", len(seeds), f"one for each of the problems, {len(problems)}, at least one")
        for name, values in (
            ("kind", {problem.kind for problem in problems}),
            ("dims", {problem.pool.dims for problem in problems}),
            ("points", {problem.points for problem in problems}),
        ):
            if len(values) > 1:
                raise InvalidSettings(name, sorted(values), "the same for all problems of a stack")
        require_whole("num_sequences", num_sequences, 1, 1 << 40)
        self._kind, self._device = problems[0].kind, device
        self._prefix = "" if stream == "training" else "evaluation/"

        # Models that share a seed share its numbers, drawn once: `_columns` are the distinct (name, seed) to draw,
        # and each name's `places` say which of them is a model's.
        columns: dict[tuple[str, int], int] = {}
        self._places: dict[str, Tensor | None] = {}
        self._slices: dict[str, slice] = {}
        pools = [problem.pool if of == "pretraining" else None for problem in problems]
        self._pooled = [pool is not None and pool.num_tasks is not None for pool in pools]
        named = {"x": "data", "y": "noise", "task": "task", "w": "task"}
        for name, field in named.items():
            start = len(columns)
            values = [getattr(one, field) for one in seeds]
            places = [columns.setdefault((name, value), len(columns)) - start for value in values]
            self._slices[name] = slice(start, len(columns))
            alone = len(columns) - start == len(problems)
            self._places[name] = None if alone else torch.tensor(places, device=device)
        self._columns = tuple(columns)

        sequence = torch.arange(num_sequences, device=device)
        dim = torch.arange(problems[0].pool.dims, device=device)
        self._sequence, self._dim = sequence, dim
        self._point = sequence[:, None] * _MAX_POINTS + torch.arange(problems[0].points, device=device)
        self._coordinate = self._point[..., None] * _MAX_DIMS + dim

        def per_model(values: list[float] | list[int] | list[bool], num_axes: int) -> Tensor:
            return torch.tensor(values, device=device).view(-1, *[1] * num_axes)

        self._scale = per_model([problem.pool.scale for problem in problems], 2)
        self._noise = per_model([math.sqrt(problem.noise_variance) for problem in problems], 2)
        self._is_pooled = per_model(self._pooled, 1)
        self._num_tasks = per_model([(pool.num_tasks if pool else None) or 1 for pool in pools], 1)
        self._pool_key = per_model([pool._key if pool else 0 for pool in pools], 2)

    @staticmethod
    @functools.lru_cache(maxsize=32)
    def of(
        problems: tuple[PooledRegression, ...],
        seeds: tuple[Seeds, ...],
        num_sequences: int,
        device: torch.device,
        of: Of,
        stream: Stream,
    ) -> "_Drawing":
        return _Drawing(problems, seeds, num_sequences, device, of, stream)

    def keys_at(self, steps: Sequence[int]) -> Int[Tensor, "steps columns"]:
        keys = [[sampling.key_of(self._prefix + name, seed, step) for name, seed in self._columns] for step in steps]
        table = torch.tensor(keys)
        if self._device.type == "cuda":  # pageable memory would wait for all that was queued there
            return table.pin_memory().to(self._device, non_blocking=True)
        return table.to(self._device)

    def _keys(self, name: str, keys: Tensor, num_axes: int) -> Tensor:
        """The distinct keys of a name, [steps, distinct, 1 ...]."""
        mine = keys[:, self._slices[name]]
        return mine.view(*mine.shape, *[1] * num_axes)

    def _for_models(self, name: str, drawn: Tensor) -> Tensor:
        places = self._places[name]
        return drawn if places is None else drawn.index_select(1, places)

    def tasks(self, keys: Tensor) -> tuple[Float[Tensor, "steps models batch dims"], Int[Tensor, "steps models batch"]]:
        """w of each sequence, and its index in the pool or -1."""
        fresh = self._for_models("w", self._keys("w", keys, 2))
        if not any(self._pooled):
            w = sampling.normal(fresh, self._sequence[:, None] * _MAX_DIMS + self._dim) * self._scale
            return w, torch.full(w.shape[:3], -1, device=self._device)
        chosen = sampling.choice(self._num_tasks, self._for_models("task", self._keys("task", keys, 1)), self._sequence)
        row = torch.where(self._is_pooled, chosen, self._sequence)
        key = torch.where(self._is_pooled[..., None], self._pool_key, fresh)
        w = sampling.normal(key, row[..., None] * _MAX_DIMS + self._dim) * self._scale
        return w, torch.where(self._is_pooled, chosen, -1)

    def labelled(
        self, keys: Tensor, w: Float[Tensor, "steps models batch dims"], task: Int[Tensor, "steps models batch"]
    ) -> RegressionBatch:
        x = self._for_models("x", sampling.normal(self._keys("x", keys, 3), self._coordinate))
        scores = scores_of(x, w)
        noise = sampling.normal if self._kind == "linear" else sampling.logistic
        drawn = self._for_models("y", noise(self._keys("y", keys, 2), self._point))
        if self._kind == "linear":
            return RegressionBatch(x=x, y=scores + self._noise * drawn, w=w, task=task, target=scores)
        y = (scores > drawn).to(torch.float32)
        return RegressionBatch(x=x, y=y, w=w, task=task, target=_probability(scores))


def _probability(scores: Tensor) -> Tensor:
    # By way of float64: the vector and scalar sigmoids of float32 differ in their last bit, so that a number would
    # depend on its place in the batch.
    return torch.sigmoid(scores.to(torch.float64)).to(torch.float32)


def scores_of(
    x: Float[Tensor, "*stack points dims"], w: Float[Tensor, "*stack dims"]
) -> Float[Tensor, "*stack points"]:
    """w . x as one product and one sum after another: a matrix product would round differently on each device."""
    products = (x * w[..., None, :]).unbind(-1)
    return functools.reduce(torch.add, products)


def require_whole(name: str, value: object, low: int, high: int, before: str = "") -> None:
    if not (isinstance(value, int) and not isinstance(value, bool) and low <= value <= high):
        raise InvalidSettings(name, value, f"{before}a whole number from {low} to {high}")


def require_noise(noise_variance: float) -> None:
    if not (noise_variance >= MIN_NOISE_VARIANCE and math.isfinite(noise_variance)):
        raise InvalidSettings("noise_variance", noise_variance, f"a finite number from {MIN_NOISE_VARIANCE:g}")


def _mapped(batch: RegressionBatch, function: Callable[[Tensor], Tensor]) -> RegressionBatch:
    return RegressionBatch(**{field.name: function(getattr(batch, field.name)) for field in dataclasses.fields(batch)})
