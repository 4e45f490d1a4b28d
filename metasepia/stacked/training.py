"""Training a stack: AdamW with a rate, decay and clip for each model, and a loop in which one may fail alone.

All parameters of a stack lie in one buffer [models, parameters], so that the optimiser is a few sweeps over memory.
What happens to a model depends on nothing of its neighbours: not on their losses, and not on whether they are there.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from metasepia.errors import CorruptArtefact, InvalidSettings
from metasepia.stacked.decoder import StackOfModels
from metasepia.stacked.memory import keep_freed_memory

Losses = Callable[[int], Float[Tensor, " models"]]
"""Of the step's number: each model's loss on this step's batch, with its graph."""
Schedule = Callable[[int], float]
"""Of the step's number: the factor of the peak rates."""
_TILE = 1 << 15
"""Numbers of one model that an update takes at once on a CPU, so that its four arrays stay in the core's cache."""


def triangle(num_steps: int, warmup: float = 0.5) -> Schedule:
    """A factor of the peak rate: up from near 0 over the share `warmup` of the steps, then down (Raventos et al.).

    No step within `num_steps` has the rate 0; those beyond have.
    """
    if not 0 <= warmup <= 1:
        raise InvalidSettings("warmup", warmup, "from 0 to 1")
    rise = round(num_steps * warmup)

    def factor(step: int) -> float:
        if step >= num_steps:
            return 0.0
        return (step + 1) / rise if step < rise else (num_steps - step) / (num_steps - rise)

    return factor


class StackedAdam:
    """AdamW (arXiv:1711.05101; without decay it is Adam) on all models of a stack at once.

    Decay is for the kernels inside the blocks alone. `clip_norm` bounds the norm of one model's whole gradient; 0 does
    not clip. The model's parameters become views of one buffer: move it to its device before.
    """

    def __init__(
        self,
        model: StackOfModels,
        *,
        learning_rate: Sequence[float] | float,
        weight_decay: Sequence[float] | float = 0.0,
        clip_norm: Sequence[float] | float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        models = model.num_models
        self.learning_rate = _each("learning_rate", learning_rate, models)
        self.weight_decay = _each("weight_decay", weight_decay, models)
        self.clip_norm = _each("clip_norm", clip_norm, models)
        if not (len(betas) == 2 and all(0 <= beta < 1 for beta in betas)):
            raise InvalidSettings("betas", betas, "two numbers, each at least 0 and below 1")
        self.betas, self.eps, self.step = betas, eps, 0
        decayed = set(model.decayed())
        named = sorted(model.named_parameters(), key=lambda one: one[0] not in decayed)
        self._names = [name for name, _ in named]
        self._parameters = [parameter for _, parameter in named]
        self._num_decayed = sum(parameter[0].numel() for name, parameter in named if name in decayed)
        self._weights = torch.cat([parameter.detach().flatten(1) for parameter in self._parameters], dim=1)
        self._gradients, self._first, self._second = (torch.zeros_like(self._weights) for _ in range(3))
        for parameter, view in zip(self._parameters, self._split(self._weights), strict=True):
            parameter.data = view
        self._gradient_views = self._split(self._gradients)
        self._columns = [
            torch.tensor(each, dtype=self._weights.dtype, device=self._weights.device)[:, None]
            for each in (self.learning_rate, self.weight_decay, self.clip_norm)
        ]

    def _split(self, flat: Tensor) -> list[Tensor]:
        sizes = [parameter[0].numel() for parameter in self._parameters]
        return [
            part.view(parameter.shape)
            for part, parameter in zip(flat.split(sizes, dim=1), self._parameters, strict=True)
        ]

    def update(self, factor: float, frozen: Bool[Tensor, " models"]) -> None:
        """One step from the parameters' gradients, which are taken away; rates are times `factor`.

        Frozen models stay as they are, whatever their gradients.
        """
        self.gather()
        if self._weights.device.type == "cpu":
            self._update_each(factor, frozen)
        else:
            self._update_all(factor, frozen)

    def gather(self) -> None:
        """Takes the parameters' gradients into the buffer."""
        for parameter, view in zip(self._parameters, self._gradient_views, strict=True):
            if parameter.grad is None:
                view.zero_()
            else:
                view.copy_(parameter.grad)
                parameter.grad = None

    def _corrections(self) -> tuple[float, float]:
        return 1 - self.betas[0] ** self.step, math.sqrt(1 - self.betas[1] ** self.step)

    @torch.no_grad()
    def _update_each(self, factor: float, frozen: Tensor) -> None:
        """Model by model, in pieces that stay in the core's cache."""
        self.step += 1
        for model, is_frozen in enumerate(frozen.tolist()):
            if not is_frozen:
                self._update_one(model, factor)

    def _update_one(self, model: int, factor: float) -> None:
        rate, clip = self.learning_rate[model] * factor, self.clip_norm[model]
        shrink = 1 - rate * self.weight_decay[model]
        of_first, of_second = self._corrections()
        arrays = [flat[model] for flat in (self._weights, self._gradients, self._first, self._second)]
        if clip:
            norm = float(torch.linalg.vector_norm(arrays[1]))
            if not norm <= clip:
                arrays[1].mul_(clip / norm)
        if shrink != 1:
            arrays[0][: self._num_decayed].mul_(shrink)
        spread = arrays[0].new_empty(min(_TILE, len(arrays[0])))
        for weights, gradients, first, second in zip(*(array.split(_TILE) for array in arrays), strict=True):
            first.lerp_(gradients, 1 - self.betas[0])
            second.mul_(self.betas[1]).addcmul_(gradients, gradients, value=1 - self.betas[1])
            roots = torch.sqrt(second, out=spread[: len(second)]).div_(of_second).add_(self.eps)
            weights.addcdiv_(first, roots, value=-rate / of_first)

    @torch.no_grad()
    def _update_all(self, factor: float, frozen: Tensor) -> None:
        """The same for all at once, without asking the device anything."""
        self.step += 1
        rates, decays, clips = self._columns
        rates = rates * factor
        gradients, moving = self._gradients, ~frozen[:, None]
        if any(self.clip_norm):
            norms = torch.linalg.vector_norm(gradients, dim=1, keepdim=True)
            gradients = torch.where((clips > 0) & ~(norms <= clips), gradients * (clips / norms), gradients)
        of_first, of_second = self._corrections()
        first = torch.lerp(self._first, gradients, 1 - self.betas[0])
        second = (self._second * self.betas[1]).addcmul_(gradients, gradients, value=1 - self.betas[1])
        weights = self._weights.clone()
        if any(self.weight_decay):
            weights[:, : self._num_decayed] *= 1 - rates * decays
        weights -= rates / of_first * (first / (second.sqrt() / of_second + self.eps))
        for now, then in ((self._weights, weights), (self._first, first), (self._second, second)):
            now.copy_(torch.where(moving, then, now))

    def state(self) -> dict[str, Tensor]:
        """Weights and both moments by the parameters' names, [models, ...]; copies."""
        made: dict[str, Tensor] = {}
        for prefix, flat in self._named_buffers():
            for name, view in zip(self._names, self._split(flat), strict=True):
                made[f"{prefix}.{name}"] = view.clone()
        return made

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor], step: int) -> None:
        """Raises CorruptArtefact unless names and shapes are this stack's."""
        wanted = {
            f"{prefix}.{name}": view
            for prefix, flat in self._named_buffers()
            for name, view in zip(self._names, self._split(flat), strict=True)
        }
        if wanted.keys() != state.keys():
            odd = sorted(wanted.keys() ^ state.keys())
            raise CorruptArtefact("state of a stack", f"of another stack: {odd[0]} is not in both")
        for name, view in wanted.items():
            if view.shape != state[name].shape:
                shapes = f"{tuple(state[name].shape)}, not {tuple(view.shape)}"
                raise CorruptArtefact("state of a stack", f"of another stack: {name} is {shapes}")
        for name, view in wanted.items():
            view.copy_(state[name])
        self.step = step

    def _named_buffers(self) -> list[tuple[str, Tensor]]:
        return [("weights", self._weights), ("first", self._first), ("second", self._second)]


class StackedTraining:
    """Steps of a stack. A run is a pure function of its model, losses and schedule, whenever it was stopped between."""

    def __init__(self, model: StackOfModels, adam: StackedAdam, loss_of: Losses, schedule: Schedule) -> None:
        self.model, self.adam, self.step = model, adam, 0
        self._loss_of, self._schedule = loss_of, schedule
        device = next(model.parameters()).device
        if device.type == "cpu":
            keep_freed_memory()
        self._diverged = torch.full((model.num_models,), -1, dtype=torch.int64, device=device)
        self.losses = torch.full((model.num_models,), math.nan, device=device)
        """Of the last step."""

    @property
    def diverged(self) -> Int[Tensor, " models"]:
        """The step at which a model's loss was first no number, -1 while it trains; it keeps that step's weights."""
        return self._diverged

    def advance(self, until_step: int) -> None:
        """Trains up to, not including, this step; nothing to do is fine."""
        while self.step < until_step:
            self.losses = self._backward()
            failed = ~torch.isfinite(self.losses) & (self._diverged < 0)
            self._diverged = torch.where(failed, self.step, self._diverged)
            self.adam.update(self._schedule(self.step), self._diverged >= 0)
            self.step += 1

    def _backward(self) -> Tensor:
        """This step's losses; the graph ends here, so that its memory is free for the next one's."""
        losses = self._loss_of(self.step)
        # Each model's gradient is of its own loss alone: what is no number in one stays out of the others'.
        losses.sum().backward()
        return losses.detach()

    def state(self) -> dict[str, Tensor]:
        """All that a later run needs to go on to the same bytes."""
        return {**self.adam.state(), "diverged": self._diverged.clone(), "step": torch.tensor(self.step)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Raises CorruptArtefact for the state of another stack, and changes nothing then."""
        rest = dict(state)
        try:
            diverged, step = rest.pop("diverged"), int(rest.pop("step"))
        except KeyError as missing:
            raise CorruptArtefact("state of a stack", f"without {missing}") from missing
        if diverged.shape != self._diverged.shape:
            raise CorruptArtefact("state of a stack", f"of {len(diverged)} models, not {len(self._diverged)}")
        self.adam.restore(rest, step)
        self._diverged, self.step = diverged.to(self._diverged.device, copy=True), step


def _each(name: str, value: Sequence[float] | float, models: int) -> list[float]:
    each = [float(value)] * models if isinstance(value, int | float) else [float(one) for one in value]
    if len(each) != models:
        raise InvalidSettings(name, value, f"one number or {models}, one for each model")
    if not all(math.isfinite(one) and one >= 0 for one in each):
        raise InvalidSettings(name, value, "at least 0 and finite")
    return each
