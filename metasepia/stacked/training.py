"""Training a stack: AdamW with a rate, decay and clip for each model, and a loop in which one may fail alone."""

from collections.abc import Callable, Mapping, Sequence

from jaxtyping import Float, Int
from torch import Tensor, nn

Losses = Callable[[int], Float[Tensor, " models"]]
Schedule = Callable[[int], float]


def triangle(num_steps: int, warmup: float = 0.5) -> Schedule:
    """A factor of the peak rate at each step: from 0 up over the share `warmup` of the steps, then down to 0."""
    raise NotImplementedError


class StackedAdam:
    def __init__(
        self,
        model: nn.Module,
        *,
        learning_rate: Sequence[float] | float,
        weight_decay: Sequence[float] | float = 0.0,
        clip_norm: Sequence[float] | float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        """One number for all models or one for each; `clip_norm` 0 does not clip. Move the model to its device first."""


class StackedTraining:
    diverged: Int[Tensor, " models"]
    """The step at which a model's loss was first no number; -1 while it trains."""

    def __init__(self, model: nn.Module, adam: StackedAdam, loss_of: Losses, schedule: Schedule) -> None:
        self.step = 0

    def advance(self, until_step: int) -> None: ...

    def state(self) -> dict[str, Tensor]:
        raise NotImplementedError

    def restore(self, state: Mapping[str, Tensor]) -> None: ...
