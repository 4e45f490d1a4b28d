"""One model of a task-diversity sweep: all that its weights and its rows of the table are a function of."""

import math
from dataclasses import dataclass
from typing import Literal

from metasepia.errors import InvalidSettings
from metasepia.stacked.decoder import DecoderShape
from metasepia.sweeps.trial import TrialSettings
from metasepia.synthetic.regression import PooledRegression, TaskPool
from metasepia.synthetic.tasks import Seeds

MAX_TASKS = 1 << 20
MAX_RATE, MAX_DECAY = 1e30, 1e6
"""Far beyond what diverges; float32 still holds an update's factors, so that a model fails and not its pack."""
SHARED_IN_PACK = (
    "problem",
    "dims",
    "points",
    "noise_variance",
    "scale",
    "layers",
    "width",
    "heads",
    "num_steps",
    "batch_size",
    "warmup_share",
    "measured_sequences",
    "measured_blocks",
    "num_measures",
)
"""What the models of one pack must have in common; tasks, seed, learning rate and weight decay are each model's own."""


@dataclass(frozen=True, kw_only=True)
class DiversityTrial(TrialSettings):
    """A model pretrained on `num_tasks` tasks. Defaults are the paper's base model."""

    problem: Literal["linear", "logistic"] = "linear"
    """Linear: the paper's, with its token layout. Logistic: the reasoning module's own problem, layout and loss."""
    num_tasks: int | None
    """M, from 1 to 2**20; None draws a fresh task for every sequence (the true prior)."""
    dims: int = 8
    """D, 1 or more."""
    points: int = 16
    """K: the pairs (x, y) of a sequence, all of them predicted; from 2 to the context's."""
    context: int | None = None
    """The pairs that the model has positions for; None: as many as points."""
    noise_variance: float = 0.25
    """Of y around w.x, not below zero; logistic labels are drawn from their probability and have none (0)."""
    scale: float = 1.0
    """Tasks are w ~ scale * N(0, I); above zero. For logistic problems: how sharply labels follow w."""
    layers: int = 8
    width: int = 128
    heads: int = 2
    weight_decay: float = 0.0
    """Of the kernels inside the blocks, decoupled from the gradient (AdamW)."""
    num_steps: int = 500_000
    batch_size: int = 256
    learning_rate: float = 1e-3
    """Peak of the triangle."""
    warmup_share: float = 0.5
    """Share of the steps in which the rate rises from zero; it falls to zero over the others. 0.5 is the paper's."""
    seed: int = 0
    """Numbers the four seeds of a run: initial weights, data, tasks, noise; 0 gives the paper's 100 to 103."""
    measured_sequences: int = 4096
    """Evaluation sequences of each kind (pretraining tasks, new tasks); the same for all M of a seed."""
    measured_blocks: int = 16
    """Equal parts of them whose means are kept after the last step, for intervals."""
    num_measures: int = 25
    """Evenly spaced measurements, each also a checkpoint; three more at 1/8, 1/4 and 1/2 of the first."""

    def __post_init__(self) -> None:
        if self.problem not in ("linear", "logistic"):
            raise InvalidSettings("problem", self.problem, "linear or logistic")
        for name in ("dims", "points", "layers", "width", "heads", "num_steps", "batch_size"):
            self._whole(name, least=1)
        for name, least in (("seed", 0), ("measured_sequences", 1), ("measured_blocks", 1), ("num_measures", 1)):
            self._whole(name, least=least)
        if self.num_tasks is not None:
            self._whole("num_tasks", least=1, most=MAX_TASKS, way_out=", or inf for a fresh task in every sequence")
        if self.context is not None:
            self._whole("context", least=1)
        if self.points < 2 or self.points > self.positions:
            allowed = (
                "2 or more" if self.points < 2 else f"at most the context of {self.positions} pairs; raise context"
            )
            raise InvalidSettings("points", self.points, allowed)
        if self.width % self.heads:
            raise InvalidSettings("width", self.width, f"a multiple of the {self.heads} heads")
        if self.measured_sequences % self.measured_blocks:
            allowed = f"a multiple of the {self.measured_blocks} blocks"
            raise InvalidSettings("measured_sequences", self.measured_sequences, allowed)
        self._within("noise_variance", 0.0, math.inf)
        self._within("weight_decay", 0.0, MAX_DECAY)
        self._within("warmup_share", 0.0, 1.0)
        for name, most in (("scale", math.inf), ("learning_rate", MAX_RATE)):
            if not (0 < getattr(self, name) <= most and getattr(self, name) < math.inf):
                allowed = "above 0 and finite" if most == math.inf else f"above 0, at most {most:g}"
                raise InvalidSettings(name, getattr(self, name), allowed)
        if self.problem == "logistic" and self.noise_variance:
            raise InvalidSettings("noise_variance", self.noise_variance, "0 for a logistic problem: labels are drawn")
        if self.problem == "linear" and not self.noise_variance:
            allowed = "above 0: without noise the posterior over a pool is a point, and dMMSE has no meaning"
            raise InvalidSettings("noise_variance", self.noise_variance, allowed)
        _ = self.tasks  # refuses here, not in a trial's process, what no pool or problem can have

    def _within(self, name: str, low: float, high: float) -> None:
        value = getattr(self, name)
        if not low <= value <= high or value == math.inf:  # written so that NaN fails too
            allowed = f"{low:g} or more, and finite" if high == math.inf else f"from {low:g} to {high:g}"
            raise InvalidSettings(name, value, allowed)

    @property
    def positions(self) -> int:
        """Pairs that the model has positions for."""
        return self.context or self.points

    @property
    def shape(self) -> DecoderShape:
        return DecoderShape(layers=self.layers, width=self.width, heads=self.heads, tokens=2 * self.positions)

    @property
    def layout(self) -> Literal["separate", "shared"]:
        """Of tokens: the paper's for linear regression, the reasoning module's for logistic."""
        return "separate" if self.problem == "linear" else "shared"

    @property
    def tasks(self) -> PooledRegression:
        """What it is pretrained on."""
        pool = TaskPool(dims=self.dims, num_tasks=self.num_tasks, seed=self._seed(102), scale=self.scale)
        return PooledRegression(kind=self.problem, pool=pool, points=self.points, noise_variance=self.noise_variance)

    @property
    def model_seed(self) -> int:
        return self._seed(100)

    @property
    def seeds(self) -> Seeds:
        """Of the training batches."""
        return Seeds(task=self._seed(102), data=self._seed(101), noise=self._seed(103))

    @property
    def measured_seeds(self) -> Seeds:
        """Of the evaluation sequences; never training's."""
        return Seeds(task=self._seed(104), data=self._seed(105), noise=self._seed(106))

    def _seed(self, first: int) -> int:
        return 1000 * self.seed + first

    @property
    def stops(self) -> tuple[int, ...]:
        """Steps at which it is measured and checkpointed, ascending; the last is the end."""
        even = [round(self.num_steps * i / self.num_measures) for i in range(1, self.num_measures + 1)]
        return tuple(sorted({step for step in (even[0] // 8, even[0] // 4, even[0] // 2, *even) if step > 0}))
