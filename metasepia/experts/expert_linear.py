"""A linear layer whose rows may each have other weights; see `metasepia.experts.svf` for the ways they are applied."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from metasepia.experts.factors import SingularFactors
from metasepia.experts.selection import Delta, Part, Place, Selection
from metasepia.matrices import Matrix
from metasepia.models.shards import LayerShard
from metasepia.rows import Path as RowPath

Reduce = Callable[[Tensor], Tensor]
"""Sums a contiguous tensor over the ranks of the gang and returns it; in place or not."""


class ExpertLinear(nn.Module):
    """Stands in the place of one linear layer, or of one rank's shard of it; `factors` are cut as it is."""

    def __init__(
        self,
        name: str,
        inner: nn.Module,
        shard: LayerShard,
        reduce: Reduce | None,
        selection: Selection,
        factors: SingularFactors | None = None,
        place: Place | None = None,
    ) -> None:
        super().__init__()
        self.name, self.place = name, place
        self.weight: nn.Parameter = inner.weight  # pyright: ignore[reportAttributeAccessIssue]
        self.bias: nn.Parameter | None = getattr(inner, "bias", None)
        self.stored = Matrix(lambda: self._parameters["weight"])  # pyright: ignore[reportArgumentType]
        self._pinned: Matrix | None = None
        self.u: Tensor | None
        self.vh: Tensor | None
        # Not copied where they are in the weight's dtype and on its device.
        self.register_buffer("u", None if factors is None else factors.u.to(self.weight), persistent=False)
        self.register_buffer("vh", None if factors is None else factors.vh.to(self.weight), persistent=False)
        self.up = Matrix(lambda: self.u, parameters=False)  # pyright: ignore[reportArgumentType]
        self.down = Matrix(lambda: self.vh, parameters=False)  # pyright: ignore[reportArgumentType]
        rank = 0 if place is None else place.leading.stop - place.leading.start
        self.up_leading = Matrix(_Leading(lambda: self.u, 1, rank), parameters=False)
        self.down_leading = Matrix(_Leading(lambda: self.vh, 0, rank), parameters=False)
        self.is_row = shard.kind == "row"
        self._reduce = reduce if self.is_row else None
        self._selection = selection

    def forward(self, x: Tensor) -> Tensor:
        self.ran()
        return self.finished(self._selection.run(x, self.multiply))

    def ran(self) -> None:
        """Counts this layer as run; for a caller that multiplied by its stored weight because it `is_plain`."""
        self._selection.calls += 1

    @property
    def is_plain(self) -> bool:
        """Whether every row of the selection in force uses this layer's stored weight and nothing else."""
        selection = self._selection
        return not (selection.singular and self.place is not None) and self.name not in selection.layers

    # -- parts of the forward, for a caller that does several layers at once -------------------------------------------

    def multiply(self, x: Tensor, part: Part) -> Tensor:
        """One part's product, of this rank alone; a row-parallel layer's bias is added in `finished`."""
        bias = None if self.is_row else self.bias
        if part.weights == "factors" and self.place is not None:
            h = self.down.times(x, self.scale(part, x.ndim))
            return self.up(h, bias)
        if part.weights == "pinned" and self._pinned is not None:
            return self._pinned(x, bias)
        if not part.deltas:
            return self.stored(x, bias)
        if sums_first(x, part):
            return self.stored.plus(x, self.with_deltas(x.new_zeros(*x.shape[:-1], len(self.weight)), x, part), bias)
        if bias is None or not any(delta.norm for delta in part.deltas):
            return self.with_deltas(self.stored(x, bias), x, part)
        return self.with_deltas(self.stored(x), x, part) + bias

    def finished(self, y: Tensor) -> Tensor:
        """The sum over the ranks, and the bias that was kept until then; y itself for any but a row-parallel layer."""
        if self.is_row:
            y = self._reduce(y.contiguous()) if self._reduce else y
            y = y if self.bias is None else y + self.bias
        return y

    def scale(self, part: Part, num_dims: int) -> Tensor:
        assert part.table is not None and self.place is not None
        return part.table.at(num_dims, self.place.whole)

    def with_deltas(self, y: Tensor, x: Tensor, part: Part) -> Tensor:
        """y = x W^T, and what single rows add to it; y may be changed in place."""
        for delta in part.deltas:
            if delta.low_rank is not None:
                y = self.low_rank_delta(y, x, delta)
            elif self.place is not None:
                y = self.singular_delta(y, self.singular_values(rows_of(x, delta), delta), delta)
        return y

    def singular_values(self, x: Tensor, delta: Delta) -> Tensor:
        """diag(n s (z - 1)) Vh x for the rows of a delta."""
        assert delta.table is not None and self.place is not None
        span = self.place.leading if delta.leading else self.place.whole
        down = self.down_leading if delta.leading else self.down
        return down.times(x, delta.table.at(x.ndim, span))

    def singular_delta(self, y: Tensor, h: Tensor, delta: Delta) -> Tensor:
        """n y + U h on the rows of a delta, h as `singular_values` gives it."""
        up = self.up_leading if delta.leading else self.up
        norm = None
        if delta.norm is not None:
            assert self.place is not None
            norm = delta.norm.at(y.ndim, slice(self.place.number, self.place.number + 1))
        if delta.rows is None:
            if norm is None and y.dtype == torch.float32 and not torch.is_grad_enabled():
                return y.add_(up(h))  # y is often a part of a wider tensor, which `plus` would copy
            return up.plus(h, y if norm is None else (y * norm).to(y.dtype))
        if norm is None:
            return y.index_add(0, delta.rows, up(h)) if torch.is_grad_enabled() else y.index_add_(0, delta.rows, up(h))
        own = (y.index_select(0, delta.rows) * norm).to(y.dtype)
        return y.index_copy(0, delta.rows, up.plus(h, own))

    def low_rank_delta(self, y: Tensor, x: Tensor, delta: Delta) -> Tensor:
        """y + B A x on the rows of a delta."""
        if delta.low_rank is None or self.name not in delta.low_rank.layers:
            return y
        d = delta.low_rank(self.name, rows_of(x, delta))
        return y + d if delta.rows is None else y.index_add(0, delta.rows, d)

    # -- pinned weights ------------------------------------------------------------------------------------------------

    def pin(self, weights: Mapping[str, Tensor]) -> None:
        """Takes the dense weights of the replica's pinned adapter, by layer; none: forgets them."""
        weight = weights.get(self.name)
        self._pinned = None if weight is None else Matrix.owning(weight)

    def rebuilt(self, values: Tensor, norm: Tensor | None, path: RowPath) -> Tensor:
        """This rank's dense weights of an adapter: from n s z (fp32, all factors), or as the difference that is served.

        Below fp32 rounded once.
        """
        assert self.u is not None and self.vh is not None
        u, vh = self.u, self.vh
        if path == "truncated":
            u, vh = self.up_leading.weights[0](), self.down_leading.weights[0]()
        elif self.weight.dtype in (torch.float32, torch.float64):
            return (u * values) @ vh
        stored = self.weight.float() if norm is None else self.weight.float() * norm
        return (stored + (u.float() * values) @ vh.float()).to(self.weight.dtype)


def sums_first(x: Tensor, part: Part) -> bool:
    """Whether what rows add is summed up before the dense product: below fp32, where else each sum is rounded by
    itself, W x + d then as coarsely as W x, and an expert row strays from fp32 further than a base row.
    """
    return x.dtype in (torch.bfloat16, torch.float16) and not any(delta.norm for delta in part.deltas)


def rows_of(x: Tensor, delta: Delta) -> Tensor:
    return x if delta.rows is None else x.index_select(0, delta.rows)


class _Leading:
    """The first columns or rows of a tensor, as one object for as long as the tensor is: so it is packed once."""

    def __init__(self, whole: Callable[[], Tensor | None], dim: int, length: int) -> None:
        self._whole, self._dim, self._length = whole, dim, length
        self._of: Tensor | None = None
        self._view: Tensor | None = None

    def __call__(self) -> Tensor:
        whole = self._whole()
        assert whole is not None
        if self._view is None or self._of is not whole:
            self._of, self._view = whole, whole.narrow(self._dim, 0, self._length)
        return self._view
