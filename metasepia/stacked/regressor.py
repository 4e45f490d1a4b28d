"""Regression in context by a stack of decoders: pairs (x, y) as tokens, the prediction of each y at its x's token."""

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from metasepia.errors import InvalidSettings
from metasepia.stacked.block import stacked_linear
from metasepia.stacked.decoder import DecoderShape, StackedDecoder, StackedLinear, StackOfModels
from metasepia.synthetic.sampling import bits, key_of

Layout = Literal["separate", "shared"]
_EVERY_X = slice(0, None, 2)


class StackedRegressor(StackOfModels):
    """Predicts y_k from x_k and the pairs before it, for every k in one causal forward.

    `separate` (Raventos et al., arXiv:2306.15063): x-token [0, x], y-token [y, 0...]; no bias in and out, both
    initialised N(0, 0.02) as in the authors' code. `shared` (TART, arXiv:2306.07536): x and y share coordinate 0,
    biases, in and out initialised as nn.Linear; weights go to and from `metasepia.reasoning.module.ReasoningModule` of
    the same shape by `model_state` and `load_model`.
    """

    def __init__(self, shape: DecoderShape, dims: int, seeds: Sequence[int], layout: Layout) -> None:
        super().__init__()
        if layout not in get_args(Layout):
            raise InvalidSettings("layout", layout, f"one of {', '.join(get_args(Layout))}")
        if not dims >= 1:
            raise InvalidSettings("dims", dims, "at least 1")
        if shape.tokens % 2:
            raise InvalidSettings("tokens", shape.tokens, "even: two for each point")
        self.shape, self.dims, self.layout, self.seeds = shape, dims, layout, tuple(seeds)
        biases, models = layout == "shared", len(seeds)
        self.read_in = StackedLinear(models, dims if biases else dims + 1, shape.width, bias=biases)
        self.decoder = StackedDecoder(shape, seeds)
        self.read_out = StackedLinear(models, shape.width, 1, bias=biases)
        for of, layer in (("read_in", self.read_in), ("read_out", self.read_out)):
            if layout == "separate":
                self._draw(f"{of}.weight", layer.weight, 0.02)
                continue
            for name, parameter in layer.named_parameters():
                self._draw_uniform(f"{of}.{name}", parameter, 1 / math.sqrt(layer.weight.shape[2]))

    @torch.no_grad()
    def _draw_uniform(self, name: str, parameter: Tensor, bound: float) -> None:
        index = torch.arange(parameter[0].numel())
        for model, seed in enumerate(self.seeds):
            uniform = (bits(key_of(f"stacked.{name}", seed, 0), index) >> 40).float() / (1 << 23)  # in [-1, 1)
            parameter[model].copy_(uniform.view(parameter.shape[1:]) * bound)

    def forward(
        self, x: Float[Tensor, "models batch points dims"], y: Float[Tensor, "models batch points"]
    ) -> Float[Tensor, "models batch points"]:
        """The prediction, or logit, of each y given the pairs before it and its own x."""
        hidden = stacked_linear(self._tokens(x, y), self.read_in.weight, self.read_in.bias)
        final = self.decoder(hidden, reads=_EVERY_X)
        return stacked_linear(final, self.read_out.weight, self.read_out.bias).squeeze(-1)

    def _tokens(self, x: Tensor, y: Tensor) -> Tensor:
        zeros_before = 1 if self.layout == "separate" else 0
        x_tokens = F.pad(x, (zeros_before, 0))
        y_tokens = F.pad(y.unsqueeze(-1), (0, x_tokens.shape[-1] - 1))
        return torch.stack([x_tokens, y_tokens], dim=3).flatten(2, 3)
