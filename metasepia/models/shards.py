"""Which part of a layer a rank of a gang holds. Plain values: whoever cuts, reads, factors or plans speaks of it."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class LayerShard:
    """How one layer is cut over the gang: `column` splits its outputs, `row` its inputs, in `sizes` by rank."""

    kind: Literal["whole", "column", "row"] = "whole"
    sizes: tuple[int, ...] = ()
    rank: int = 0

    @property
    def span(self) -> slice:
        start = sum(self.sizes[: self.rank])
        return slice(start, start + self.sizes[self.rank])

    def part_of(self, num_dims: int) -> tuple[slice, slice]:
        """Rows and columns of this rank: of the weight (2), or of the bias (1), which only outputs split."""
        everything = slice(None)
        if self.kind == "column":
            return self.span, everything
        if self.kind == "row" and num_dims > 1:
            return everything, self.span
        return everything, everything
