"""Causal language models from scratch, several at once: a tied token table around a stack of decoders.

With the bottleneck the tokens after the instruction may look at its closing separator and at each other, but neither at
the instruction's words nor at padding: whatever they learn of the task has passed through that one state, so replacing
it is a clean test (arXiv:2402.12151 reads states only; the mask is ours).
"""

from collections.abc import Sequence
from typing import Literal, overload

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from metasepia.instructions.tasks import INSTRUCTION_END, NUM_POSITIONS
from metasepia.stacked.decoder import DecoderShape, Edit, StackedDecoder, StackOfModels

MaskKind = Literal["causal", "bottleneck"]
_LAST = slice(-1, None)
MASKS: tuple[MaskKind, ...] = ("causal", "bottleneck")


def bottleneck(tokens: int = NUM_POSITIONS, closing: int = INSTRUCTION_END) -> Bool[Tensor, "tokens tokens"]:
    """True where a token (row) may attend to another (column)."""
    row, column = torch.arange(tokens)[:, None], torch.arange(tokens)
    return (column <= row) & ~((row > closing) & (column < closing))


class InstructionModel(StackOfModels):
    """Answers instruction tasks; model i's initial weights are a function of its shape and seed alone."""

    mask: Tensor | None

    def __init__(self, shape: DecoderShape, num_words: int, seeds: Sequence[int], mask: MaskKind = "causal") -> None:
        """Words begin at N(0, 0.02), as GPT-2's, and the rest as `StackedDecoder`'s."""
        super().__init__()
        self.decoder = StackedDecoder(shape, seeds)
        self.shape, self.seeds = shape, self.decoder.seeds
        self.table = nn.Parameter(torch.zeros(len(seeds), num_words, shape.width))
        self._draw("words", self.table, 0.02)
        self.register_buffer("mask", bottleneck(shape.tokens) if mask == "bottleneck" else None, persistent=False)

    @overload
    def forward(
        self, tokens: Int[Tensor, "models batch tokens"], *, edit: Edit | None = None, keep: Literal[False] = False
    ) -> Tensor: ...
    @overload
    def forward(
        self, tokens: Int[Tensor, "models batch tokens"], *, edit: Edit | None = None, keep: Literal[True]
    ) -> tuple[Tensor, list[Tensor]]: ...
    def forward(
        self, tokens: Int[Tensor, "models batch tokens"], *, edit: Edit | None = None, keep: bool = False
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Logits over all words after the last token, [models, batch, words]; with `keep` the states of all layers.

        `edit(layer, states)` may replace the states [models, batch, tokens, width] after a block; layer 0 is the
        embeddings with positions.
        """
        hidden = self.embed(tokens)
        if keep:
            final, states = self.decoder(hidden, mask=self.mask, edit=edit, reads=_LAST, keep=True)
            return self.read(final), states
        return self.read(self.decoder(hidden, mask=self.mask, edit=edit, reads=_LAST))

    def embed(self, tokens: Int[Tensor, "models batch tokens"]) -> Float[Tensor, "models batch tokens width"]:
        # As a product: its gradient is a sum in one order, which scattering on a GPU is not.
        chosen = nn.functional.one_hot(tokens.flatten(1), self.table.shape[1]).to(self.table.dtype)
        return (chosen @ self.table).unflatten(1, tokens.shape[1:])

    def read(self, final: Float[Tensor, "models batch one width"]) -> Float[Tensor, "models batch words"]:
        return final[:, :, -1] @ self.table.transpose(1, 2)
