"""What the next forward of a model with expert layers uses, row by row: set by `ExpertLayers`, read by each layer.

Rows that are multiplied by the same dense weights are one `Part` of the batch: they are taken out together, once a
layer, and put back together. Within a part, `Delta`s are what single rows add to the dense product.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from metasepia.experts.low_rank import LowRankRows


@dataclass(frozen=True)
class Place:
    """Where a factored layer's values lie."""

    number: int
    """Of the layer, in the order of the factors."""
    whole: slice
    """In a flat row of all singular values."""
    leading: slice
    """In a flat row of the leading ones only, at the rank that truncated experts are served at."""


class Table:
    """Values by row and layer: a row for each adapter, and which of them each batch row uses."""

    def __init__(self, rows: Tensor, index: Tensor | None = None) -> None:
        """`rows` [adapters, values]; without `index` one for each batch row, or one for all of them."""
        self._rows, self._index = rows, index
        self._ready: dict[object, Tensor] = {}

    def at(self, num_dims: int, *spans: slice) -> Tensor:
        """The values of some spans as [rows or 1, 1 ..., values], to multiply a batch of `num_dims` dimensions with."""
        key = (num_dims, *[span.start for span in spans])
        ready = self._ready.get(key)
        if ready is None:
            parts = [self._rows[:, span] for span in spans]
            values = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
            if self._index is not None:
                values = values.index_select(0, self._index)
            ready = values.reshape(len(values), *[1] * (num_dims - 2), values.shape[1]).contiguous()
            if not ready.requires_grad:
                self._ready[key] = ready
        return ready


@dataclass
class Delta:
    """What some rows of a part add to the product with its dense weights."""

    rows: Tensor | None
    """Within the part; None for all of it."""
    table: Table | None = None
    """Singular: n s (z - 1) of the values that `leading` says. W x is multiplied by `norm` first."""
    leading: bool = False
    norm: Table | None = None
    """n of each row and layer; None where it is 1 throughout."""
    low_rank: LowRankRows | None = None


@dataclass
class Part:
    """Rows of the batch that share their dense weights."""

    weights: Literal["stored", "factors", "pinned"] = "stored"
    rows: Tensor | None = None
    """None for the whole batch."""
    table: Table | None = None
    """weights = factors: n s z."""
    deltas: list[Delta] = field(default_factory=list)


@dataclass
class Selection:
    """One for each model with expert layers."""

    num_rows: int | None = None
    """None: any batch is right."""
    parts: list[Part] = field(default_factory=lambda: [Part()])
    singular: bool = False
    """Whether any row changes the factored layers."""
    layers: frozenset[str] = frozenset()
    """Layers that any row changes by a low-rank adapter or by pinned weights."""
    calls: int = 0
    """Expert layers that ran since the selection was made."""

    def run(self, x: Tensor, multiply: Callable[[Tensor, Part], Tensor]) -> Tensor:
        """Multiplies each part of a batch [rows, ..., in] and puts the results together."""
        if self.num_rows is not None and x.shape[0] != self.num_rows:
            raise ValueError(f"{self.num_rows} adapters are selected and the batch has {x.shape[0]} rows")
        if len(self.parts) == 1:
            return multiply(x, self.parts[0])
        y: Tensor | None = None
        for part in self.parts:
            assert part.rows is not None
            own = multiply(x.index_select(0, part.rows), part)
            if y is None:
                y = torch.empty((*x.shape[:-1], own.shape[-1]), dtype=own.dtype, device=own.device)
            y.index_copy_(0, part.rows, own)
        assert y is not None
        return y
