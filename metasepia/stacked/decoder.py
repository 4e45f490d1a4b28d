"""A stack of GPT-2 decoders of one shape, each with its own weights."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, overload

from jaxtyping import Bool, Float
from torch import Tensor, nn

from metasepia.errors import InvalidSettings

Edit = Callable[[int, Tensor], Tensor]
Mask = Bool[Tensor, "tokens tokens"] | Bool[Tensor, "batch tokens tokens"]


@dataclass(frozen=True, kw_only=True)
class DecoderShape:
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


class StackedDecoder(nn.Module):
    def __init__(self, shape: DecoderShape, seeds: Sequence[int]) -> None:
        super().__init__()
        self.shape, self.seeds = shape, tuple(seeds)

    @property
    def num_models(self) -> int:
        return len(self.seeds)

    @overload
    def forward(
        self, hidden: Tensor, *, mask: Mask | None = None, edit: Edit | None = None, keep: Literal[False] = False
    ) -> Tensor: ...
    @overload
    def forward(
        self, hidden: Tensor, *, mask: Mask | None = None, edit: Edit | None = None, keep: Literal[True]
    ) -> tuple[Tensor, list[Tensor]]: ...
    def forward(
        self,
        hidden: Float[Tensor, "models batch tokens width"],
        *,
        mask: Mask | None = None,
        edit: Edit | None = None,
        keep: bool = False,
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Final states after the last LayerNorm; with `keep` also the states of layers 0 to `layers`.

        `mask`: True where a token (row) may attend to another (column), already causal; None is causal. `edit(layer,
        states)` may replace the states after a block; 0 is embeddings and positions.
        """
        raise NotImplementedError
