"""Regression in context by a stack of decoders: pairs (x, y) as tokens, the prediction of each y at its x."""

from collections.abc import Sequence
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

from metasepia.stacked.decoder import DecoderShape

Layout = Literal["separate", "shared"]


class StackedRegressor(nn.Module):
    """`separate`: Raventos et al., x-token [0, x], y-token [y, 0...], no bias in and out.
    `shared`: TART's causal module, both share coordinate 0, biases in and out."""

    def __init__(self, shape: DecoderShape, dims: int, seeds: Sequence[int], layout: Layout) -> None:
        super().__init__()

    def forward(
        self, x: Float[Tensor, "models batch points dims"], y: Float[Tensor, "models batch points"]
    ) -> Float[Tensor, "models batch points"]:
        raise NotImplementedError
