"""Causal language models from scratch, several at once: a tied token table around a stack of decoders.

With the mask `bottleneck` all that an answer can know of the instruction is one state: the separator that closes it
reads the words in the first block, and from there on neither it nor a later token sees them. Replacing that state is
then a clean test. `reread` hides the words from later tokens only: the separator reads them again in every block, and
mends in part what was replaced. The masks are ours; arXiv:2402.12151 reads states only.
"""

from collections.abc import Sequence
from typing import Literal, overload

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from metasepia.instructions.tasks import INSTRUCTION_END, NUM_POSITIONS
from metasepia.stacked.block import block, stacked_norm
from metasepia.stacked.decoder import DecoderShape, Edit, StackedBlock, StackedDecoder, StackOfModels

MaskKind = Literal["causal", "bottleneck", "reread"]
MASKS: tuple[MaskKind, ...] = ("causal", "bottleneck", "reread")
_LAST = slice(-1, None)


def hides_words(
    from_position: int, tokens: int = NUM_POSITIONS, closing: int = INSTRUCTION_END
) -> Bool[Tensor, "tokens tokens"]:
    """A causal mask under which tokens from this position on see no word before the closing separator, nor padding.

    True where a token (row) may attend to another (column).
    """
    row, column = torch.arange(tokens)[:, None], torch.arange(tokens)
    return (column <= row) & ~((row >= from_position) & (column < closing))


class InstructionModel(StackOfModels):
    """Answers instruction tasks; model i's initial weights are a function of its shape and seed alone."""

    first_mask: Tensor | None
    later_mask: Tensor | None

    def __init__(self, shape: DecoderShape, num_words: int, seeds: Sequence[int], mask: MaskKind = "causal") -> None:
        """Words begin at N(0, 0.02), as GPT-2's, and the rest as `StackedDecoder`'s."""
        super().__init__()
        self.decoder = StackedDecoder(shape, seeds)
        self.shape, self.seeds = shape, self.decoder.seeds
        self.table = nn.Parameter(torch.zeros(len(seeds), num_words, shape.width))
        self._draw("words", self.table, 0.02)
        after, closing = hides_words(INSTRUCTION_END + 1, shape.tokens), hides_words(INSTRUCTION_END, shape.tokens)
        first, later = {"causal": (None, None), "bottleneck": (after, closing), "reread": (after, after)}[mask]
        self.register_buffer("first_mask", first, persistent=False)
        self.register_buffer("later_mask", later, persistent=False)

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
        decoder, last = self.decoder, len(self.decoder.blocks)
        hidden = self.embed(tokens) + decoder.positions[:, None, : tokens.shape[2]]
        if edit:
            hidden = edit(0, hidden)
        states = [hidden]
        # The decoder's own forward has one mask for all blocks.
        for layer, one in enumerate(decoder.blocks, start=1):
            assert isinstance(one, StackedBlock)
            mask = self.first_mask if layer == 1 else self.later_mask
            reads = _LAST if layer == last and not (keep or edit) else None
            hidden = block(hidden, mask, self.shape.heads, reads, one.weights)
            if edit:
                hidden = edit(layer, hidden)
            if keep:
                states.append(hidden)
        final = stacked_norm(hidden[:, :, _LAST], decoder.norm.weight, decoder.norm.bias)
        logits = final[:, :, 0] @ self.table.transpose(1, 2)
        return (logits, states) if keep else logits

    def embed(self, tokens: Int[Tensor, "models batch tokens"]) -> Float[Tensor, "models batch tokens width"]:
        # As a product: its gradient is a sum in one order, which scattering on a GPU is not.
        chosen = nn.functional.one_hot(tokens.flatten(1), self.table.shape[1]).to(self.table.dtype)
        return (chosen @ self.table).unflatten(1, tokens.shape[1:])
