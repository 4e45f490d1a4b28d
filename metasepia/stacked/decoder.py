"""A stack of GPT-2 decoders of one shape, each with its own weights: every parameter is [models, ...].

Pre-LN blocks, learned positions, GELU (tanh), biases, no dropout, LN eps 1e-5. Model i is a function of the shape and
`seeds[i]` alone: initial weights come from `metasepia.synthetic.sampling`, so that neighbours, device and pack do not
enter. Names of parameters are those of one model (`blocks.0.qkv.weight`), with the axis of models before.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, overload

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from metasepia.errors import InvalidSettings
from metasepia.stacked.block import BlockWeights, block, stacked_norm
from metasepia.synthetic.sampling import key_of, normal

Edit = Callable[[int, Tensor], Tensor]
"""Of a layer's number and its states [models, batch, tokens, width]: the states to go on with."""
Mask = Bool[Tensor, "tokens tokens"] | Bool[Tensor, "batch tokens tokens"]


@dataclass(frozen=True, kw_only=True)
class DecoderShape:
    """What every model of a stack has in common."""

    layers: int
    width: int
    heads: int
    tokens: int
    """Positions; a sequence may be shorter."""

    def __post_init__(self) -> None:
        for name in ("layers", "width", "heads", "tokens"):
            if not getattr(self, name) >= 1:
                raise InvalidSettings(name, getattr(self, name), "at least 1")
        if self.width % self.heads:
            raise InvalidSettings("heads", self.heads, f"a divisor of width = {self.width}")


class StackedLinear(nn.Module):
    """Holds the linear layers of all models, [models, out, in] and [models, out]."""

    def __init__(self, models: int, fan_in: int, fan_out: int, *, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(models, fan_out, fan_in))
        self.bias = nn.Parameter(torch.zeros(models, fan_out)) if bias else None


class StackedNorm(nn.Module):
    """Holds the LayerNorms of all models."""

    def __init__(self, models: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(models, width))
        self.bias = nn.Parameter(torch.zeros(models, width))


class StackedBlock(nn.Module):
    """Holds one block of all models; `metasepia.stacked.block` computes it."""

    def __init__(self, models: int, width: int) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = StackedNorm(models, width), StackedNorm(models, width)
        self.qkv, self.proj = StackedLinear(models, width, 3 * width), StackedLinear(models, width, width)
        self.up, self.down = StackedLinear(models, width, 4 * width), StackedLinear(models, 4 * width, width)

    @property
    def weights(self) -> BlockWeights:
        return BlockWeights(*(getattr(getattr(self, of), name) for of, name in _FIELDS))


_FIELDS = [field.rsplit("_", 1) for field in BlockWeights._fields]


class StackOfModels(nn.Module):
    """A module whose parameters all begin with the axis of models; what can be asked of any such stack."""

    shape: DecoderShape
    seeds: tuple[int, ...]

    @property
    def num_models(self) -> int:
        return len(self.seeds)

    @property
    def num_parameters(self) -> int:
        """Of one model."""
        return sum(parameter[0].numel() for parameter in self.parameters())

    def decayed(self) -> list[str]:
        """Names of the parameters that weight decay is for: the kernels inside the blocks."""
        return [name for name, parameter in self.named_parameters() if "blocks." in name and parameter.ndim == 3]

    def model_state(self, model: int) -> dict[str, Tensor]:
        """One model's parameters by name, without the axis of models; copies."""
        return {_single(name): parameter.detach()[model].clone() for name, parameter in self.named_parameters()}

    @torch.no_grad()
    def load_model(self, model: int, state: Mapping[str, Tensor]) -> None:
        """Fills one model from what `model_state` gave, or from a module of one model with the same names.

        Raises InvalidSettings for other names or shapes.
        """
        ours = {_single(name): parameter for name, parameter in self.named_parameters()}
        if ours.keys() != state.keys():
            raise InvalidSettings("state", sorted(state), f"of the parameters {', '.join(sorted(ours))}")
        for name, parameter in ours.items():
            if parameter.shape[1:] != state[name].shape:
                raise InvalidSettings(name, tuple(state[name].shape), f"of shape {tuple(parameter.shape[1:])}")
        for name, parameter in ours.items():
            parameter[model].copy_(state[name])

    @torch.no_grad()
    def _draw(self, prefix: str, parameter: nn.Parameter, std: float) -> None:
        """N(0, std) for each model from its own seed; the stream is named after the parameter."""
        index = torch.arange(parameter[0].numel())
        for model, seed in enumerate(self.seeds):
            drawn = normal(key_of(f"stacked.{prefix}", seed, 0), index)
            parameter[model].copy_(drawn.view(parameter.shape[1:]) * std)


def _single(name: str) -> str:
    return name.removeprefix("decoder.")


class StackedDecoder(StackOfModels):
    """The decoders without what turns inputs to states and states to answers."""

    def __init__(self, shape: DecoderShape, seeds: Sequence[int]) -> None:
        """As GPT-2: kernels and positions N(0, 0.02), residual projections 0.02 / sqrt(2 layers), biases 0."""
        super().__init__()
        if not seeds:
            raise InvalidSettings("seeds", list(seeds), "one for each model, at least one")
        self.shape, self.seeds = shape, tuple(seeds)
        self.positions = nn.Parameter(torch.zeros(len(seeds), shape.tokens, shape.width))
        self.blocks = nn.ModuleList([StackedBlock(len(seeds), shape.width) for _ in range(shape.layers)])
        self.norm = StackedNorm(len(seeds), shape.width)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 3:
                residual = name.endswith(("proj.weight", "down.weight"))
                self._draw(name, parameter, 0.02 / math.sqrt(2 * shape.layers) if residual else 0.02)

    @overload
    def forward(
        self,
        hidden: Tensor,
        *,
        mask: Mask | None = None,
        edit: Edit | None = None,
        reads: slice | None = None,
        keep: Literal[False] = False,
    ) -> Tensor: ...
    @overload
    def forward(
        self,
        hidden: Tensor,
        *,
        mask: Mask | None = None,
        edit: Edit | None = None,
        reads: slice | None = None,
        keep: Literal[True],
    ) -> tuple[Tensor, list[Tensor]]: ...
    def forward(
        self,
        hidden: Float[Tensor, "models batch tokens width"],
        *,
        mask: Mask | None = None,
        edit: Edit | None = None,
        reads: slice | None = None,
        keep: bool = False,
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Final states after the last LayerNorm; with `keep` also the states of layers 0 to `layers`.

        `mask`: True where a token (row) may attend to another (column); it is taken as it is, so a causal one is
        already causal. None is causal. A token that may attend to none, itself included, attends to nothing.
        `edit(layer, states)` may replace the states after a block; layer 0 is embeddings and positions.
        `reads`: the final states of these tokens alone, all that the last block then computes.
        """
        if hidden.shape[2] > self.shape.tokens:
            raise InvalidSettings("tokens", hidden.shape[2], f"at most the stack's {self.shape.tokens} positions")
        hidden = hidden + self.positions[:, None, : hidden.shape[2]]
        if edit:
            hidden = edit(0, hidden)
        states = [hidden]
        for layer, one in enumerate(self.blocks, start=1):
            assert isinstance(one, StackedBlock)
            last_reads = reads if layer == len(self.blocks) and not keep and not edit else None
            hidden = block(hidden, mask, self.shape.heads, last_reads, one.weights)
            if edit:
                hidden = edit(layer, hidden)
            if keep:
                states.append(hidden)
        if reads is not None and (keep or edit):
            hidden = hidden[:, :, reads]
        final = stacked_norm(hidden, self.norm.weight, self.norm.bias)
        return (final, states) if keep else final
