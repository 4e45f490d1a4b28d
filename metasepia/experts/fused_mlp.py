"""A gated feed-forward block, down(act(gate x) * up x), whose rows may each have other weights, in few products.

Rows are taken apart and put together once for the block instead of once a layer; gate and up, which share their input,
are multiplied as one matrix, and so are the Vh of both. The three layers inside stay `ExpertLinear`s under their names:
they hold the weights, and say what single rows add.
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metasepia.experts.expert_linear import ExpertLinear, rows_of, sums_first
from metasepia.experts.selection import Delta, Part, Selection
from metasepia.matrices import Matrix

GATED = ("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP")
"""transformers' blocks that compute exactly this."""


class FusedMLP(nn.Module):
    """Stands in the place of such a block, whole or cut: gate and up by outputs, down by inputs."""

    def __init__(
        self,
        gate: ExpertLinear,
        up: ExpertLinear,
        down: ExpertLinear,
        activation: Callable[[Tensor], Tensor],
        selection: Selection,
    ) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate, up, down
        self.act_fn = activation
        self._layers = (gate, up, down)  # reading a submodule of nn.Module is slow
        self._selection = selection
        self._widths = len(gate.weight), len(up.weight)
        self._silu = is_silu(activation)
        self._gate_up = Matrix(*[lambda one=one: one._parameters["weight"] for one in (gate, up)])  # pyright: ignore[reportArgumentType]
        self._down_vh = Matrix(*[one.down.weights[0] for one in (gate, up)], parameters=False)
        self._down_vh_leading = Matrix(*[one.down_leading.weights[0] for one in (gate, up)], parameters=False)
        self._pinned: Matrix | None = None

    def forward(self, x: Tensor) -> Tensor:
        self._selection.calls += len(self._layers)
        return self._layers[2].finished(self._selection.run(x, self._multiply))

    def pin(self, weights: Mapping[str, Tensor]) -> None:
        """Takes the dense weights of the replica's pinned adapter, by layer; none: forgets them."""
        gate, up, down = self._layers
        down.pin(weights)
        if gate.name in weights or up.name in weights:
            self._pinned = Matrix.owning(*[weights.get(one.name, one.weight.detach()) for one in (gate, up)])
        else:
            self._pinned = None

    def _multiply(self, x: Tensor, part: Part) -> Tensor:
        gate, up, down = self._layers
        if part.weights == "factors" and gate.place is not None:
            return down.multiply(self._gated_by_factors(x, part), part)
        matrix = self._pinned if part.weights == "pinned" and self._pinned is not None else self._gate_up
        bias = None if gate.bias is None or up.bias is None else torch.cat([gate.bias, up.bias])
        if part.deltas and sums_first(x, part):
            gates, ups = (x.new_zeros(*x.shape[:-1], width) for width in self._widths)
            for delta in part.deltas:
                gates, ups = self._with_delta(gates, ups, x, delta)
            gates, ups = matrix.plus(x, torch.cat([gates, ups], dim=-1), bias).split(self._widths, dim=-1)
            return down.multiply(self._gated(gates, ups), part)
        late = bias is not None and any(delta.norm for delta in part.deltas)  # n multiplies W x alone
        gates, ups = matrix(x, None if late else bias).split(self._widths, dim=-1)
        for delta in part.deltas:
            gates, ups = self._with_delta(gates, ups, x, delta)
        if late and gate.bias is not None and up.bias is not None:
            gates, ups = gates + gate.bias, ups + up.bias
        return down.multiply(self._gated(gates, ups), part)

    def _gated_by_factors(self, x: Tensor, part: Part) -> Tensor:
        """act(U (n s z Vh x)) * U (n s z Vh x) of gate and up."""
        gate, up, _ = self._layers
        assert part.table is not None and gate.place is not None and up.place is not None
        h = self._down_vh.times(x, part.table.at(x.ndim, gate.place.whole, up.place.whole))
        for_gate, for_up = h.split((_length(gate.place.whole), _length(up.place.whole)), dim=-1)
        gates = gate.up.silu(for_gate, gate.bias) if self._silu else self.act_fn(gate.up(for_gate, gate.bias))
        return up.up.times(for_up, gates, up.bias)

    def _with_delta(self, gates: Tensor, ups: Tensor, x: Tensor, delta: Delta) -> tuple[Tensor, Tensor]:
        gate, up, _ = self._layers
        if delta.low_rank is not None:
            return gate.low_rank_delta(gates, x, delta), up.low_rank_delta(ups, x, delta)
        if delta.table is None or gate.place is None or up.place is None:
            return gates, ups
        of_gate, of_up = (one.leading if delta.leading else one.whole for one in (gate.place, up.place))
        down = self._down_vh_leading if delta.leading else self._down_vh
        h = down.times(rows_of(x, delta), delta.table.at(x.ndim, of_gate, of_up))
        for_gate, for_up = h.split((_length(of_gate), _length(of_up)), dim=-1)
        return gate.singular_delta(gates, for_gate, delta), up.singular_delta(ups, for_up, delta)

    def _gated(self, gates: Tensor, ups: Tensor) -> Tensor:
        if self._silu and not torch.is_grad_enabled():
            return F.silu(gates).mul_(ups)
        return self.act_fn(gates) * ups


def is_silu(activation: object) -> bool:
    return isinstance(activation, nn.SiLU) or type(activation).__name__ == "SiLUActivation" or activation is F.silu


def _length(span: slice) -> int:
    return span.stop - span.start
