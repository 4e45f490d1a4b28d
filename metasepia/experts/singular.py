"""All factored layers' singular values laid out flat, and what an expert vector makes of them.

W' = n U diag(s z) Vh is served in one of two ways. Whole: `scaled` is n s z (below fp32 the difference n s z - s). For
vectors that change the leading values only: W' = n W + U_r diag(n s_r (z_r - 1)) Vh_r, where n takes in the values
beyond, whose z is 1.
"""

from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from metasepia.experts.factors import FactorSet
from metasepia.experts.selection import Place
from metasepia.experts.vectors import ExpertVectors


class SingularLayout:
    """Where each layer's values lie in a flat row, whole or of the leading `rank` of each layer."""

    def __init__(self, factors: FactorSet, rank: int, device: torch.device) -> None:
        self.index = factors.index
        self.places: dict[str, Place] = {}
        begin = leading_begin = 0
        for number, (name, length) in enumerate(self.index.lengths.items()):
            end, leading_end = begin + length, leading_begin + min(rank, length)
            self.places[name] = Place(number, slice(begin, end), slice(leading_begin, leading_end))
            begin, leading_begin = end, leading_end
        self.s = torch.cat([factors[name].s for name in self.places]).to(device, torch.float32)
        self._leading_at = torch.cat(
            [
                torch.arange(p.whole.start, p.whole.start + p.leading.stop - p.leading.start)
                for p in self.places.values()
            ]
        ).to(device)
        lengths = torch.tensor(list(self.index.lengths.values()))
        self._layer = torch.repeat_interleave(torch.arange(len(lengths)), lengths).to(device)
        self._layer_leading = self._layer[self._leading_at]
        self._s_leading = self.s[self._leading_at]
        self._totals = self._by_layer(self.s, self._layer)

    def spans(self, leading: bool) -> Mapping[str, slice]:
        """Where each layer's values lie in a flat z."""
        return {name: place.leading if leading else place.whole for name, place in self.places.items()}

    def flat(self, expert: ExpertVectors, leading: bool = False) -> Float[Tensor, " values"]:
        """An expert's multipliers; 1 where it has none. `leading`: none may lie beyond the leading ones."""
        z = torch.ones_like(self._s_leading if leading else self.s)
        for name, vector in expert.z.items():
            begin = (self.places[name].leading if leading else self.places[name].whole).start
            z[begin : begin + len(vector)] = torch.from_numpy(np.ascontiguousarray(vector)).to(z.device)
        return z

    def whole(self, leading_z: Float[Tensor, " leading"]) -> Float[Tensor, " singular"]:
        return torch.ones_like(self.s).index_copy(0, self._leading_at, leading_z)

    def nuclear_sums(self, z: Float[Tensor, "*batch values"], leading: bool) -> Float[Tensor, "*batch layers"]:
        """sum(s z) of each layer, in float64."""
        if leading:
            return self._totals + self._by_layer(self._s_leading * (z - 1), self._layer_leading)
        return self._by_layer(self.s * z, self._layer)

    def scaled(self, z: Float[Tensor, "*batch singular"], renormalise: bool) -> Float[Tensor, "*batch singular"]:
        """n s z. Differentiable in z."""
        scaled = self.s * z
        if not renormalise:
            return scaled
        norm = (self._totals / self.nuclear_sums(z, leading=False)).float()
        return scaled * norm[..., self._layer]

    def changed(
        self, z: Float[Tensor, "*batch leading"], renormalise: bool
    ) -> tuple[Float[Tensor, "*batch leading"], Float[Tensor, "*batch layers"] | None]:
        """n s (z - 1) of the leading values, and n; None where it is 1 throughout. Differentiable in z."""
        changed = self._s_leading * (z - 1)
        if not renormalise:
            return changed, None
        norm = (self._totals / self.nuclear_sums(z, leading=True)).float()
        return changed * norm[..., self._layer_leading], norm

    def by_layer(self, weights: tuple[float, ...], leading: bool) -> Float[Tensor, " values"]:
        """One number a layer, given to each of its values."""
        return torch.tensor(weights, device=self.s.device)[self._layer_leading if leading else self._layer]

    def _by_layer(self, values: Float[Tensor, "*batch values"], layer: Tensor) -> Float[Tensor, "*batch layers"]:
        sums = torch.zeros(*values.shape[:-1], len(self.places), dtype=torch.float64, device=values.device)
        return sums.index_add(-1, layer, values.double())
