"""Low-rank adapters at run time: rows of different adapters, of different ranks, in one product (LoRA, 2106.09685).

The adapters' matrices lie one below the other; a row's product with all of them is masked to its own. So the cost grows
with the ranks in the stack, and `chunks` bounds those.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Pairs = Mapping[str, tuple[Tensor, Tensor]]
"""One adapter: by layer A [rank, in] and B [out, rank]."""
MAX_STACKED_RANKS = 512
"""Ranks multiplied together at most; with more, rows go by chunks of adapters."""


class LowRankStack:
    """Several adapters, each a weighted sum of low-rank differences."""

    def __init__(self, adapters: Sequence[Sequence[tuple[float, Pairs]]]) -> None:
        self._adapters = adapters
        self.layers = frozenset(name for parts in adapters for _, pairs in parts for name in pairs)
        self._stacked: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    @property
    def num_bytes(self) -> int:
        """Of the matrices once they are stacked; one adapter alone is not copied."""
        if len(self._adapters) == 1 and len(self._adapters[0]) == 1:
            return 0
        return sum(a.nbytes + b.nbytes for parts in self._adapters for _, pairs in parts for a, b in pairs.values())

    def at(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """A [ranks, in], B [out, ranks] and each rank's adapter, of a layer in `layers`."""
        if name not in self._stacked:
            found = [
                (number, weight, *pairs[name])
                for number, parts in enumerate(self._adapters)
                for weight, pairs in parts
                if name in pairs
            ]
            owner = torch.cat([torch.full((len(a),), number, device=a.device) for number, _, a, _ in found])
            scaled = [b if weight == 1 else b * weight for _, weight, _, b in found]
            alone = len(found) == 1
            a = found[0][2] if alone else torch.cat([a for _, _, a, _ in found])
            self._stacked[name] = (a, scaled[0] if alone else torch.cat(scaled, dim=1), owner)
        return self._stacked[name]


class LowRankRows:
    """A stack, and which of its adapters each row uses."""

    def __init__(self, stack: LowRankStack, index: Tensor, several: bool) -> None:
        """`several`: whether the rows use more than one adapter."""
        self.layers = stack.layers
        self._stack, self._index, self._several = stack, index, several
        self._masks: dict[str, Tensor] = {}

    def __call__(self, name: str, x: Tensor) -> Tensor:
        """B A x of a layer in `layers`, for rows [rows, ..., in]."""
        a, b, owner = self._stack.at(name)
        h = F.linear(x, a)
        if self._several:
            if name not in self._masks:
                self._masks[name] = (owner == self._index[:, None]).to(h.dtype)
            mask = self._masks[name]
            h = h * mask.reshape(len(mask), *[1] * (h.ndim - 2), mask.shape[1])
        return F.linear(h, b)


def chunks(ranks: Sequence[int]) -> Iterator[range]:
    """Runs of adapters whose ranks add up to at most MAX_STACKED_RANKS, or of one adapter."""
    begin = 0
    while begin < len(ranks):
        end, total = begin + 1, ranks[begin]
        while end < len(ranks) and total + ranks[end] <= MAX_STACKED_RANKS:
            total += ranks[end]
            end += 1
        yield range(begin, end)
        begin = end
