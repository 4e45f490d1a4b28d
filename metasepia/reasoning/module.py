"""The reasoning module: a small causal decoder over (x, y) pairs with a binary head (TART, arXiv:2306.07536).

Blocks as in GPT-2: pre-LN, learned positions, GELU (tanh), biases, no dropout; no token table. Two tokens a pair: x as
it is, then y as [y, 0, ..., 0]; both share coordinate 0 and are told apart by their position. The logit of y_i is read
at x_i's token, so one causal forward predicts every label from those before it.

A context can be compiled once into keys and values (`compile`), after which any number of queries of many contexts are
answered in one forward (`answer`): each query stands at position 2k, sees its own context and itself, and no other.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

MAX_TILE = 64
"""Queries of one compiled row that share its keys in attention; more go into further tiles."""


@dataclass(frozen=True, kw_only=True)
class ModuleShape:
    """All that must be known to build a module."""

    dims: int
    pairs: int
    """Positions: so many (x, y) pairs, the query's included; a context holds one fewer."""
    layers: int
    width: int
    heads: int

    @property
    def max_examples(self) -> int:
        return self.pairs - 1

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


class Block(nn.Module):
    def __init__(self, shape: ModuleShape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.norm_1, self.norm_2 = nn.LayerNorm(shape.width), nn.LayerNorm(shape.width)
        self.qkv = nn.Linear(shape.width, 3 * shape.width)
        self.proj = nn.Linear(shape.width, shape.width)
        self.up, self.down = nn.Linear(shape.width, 4 * shape.width), nn.Linear(4 * shape.width, shape.width)

    def forward(self, hidden: Tensor) -> Tensor:
        """[batch, tokens, width] to the same, causally."""
        q, k, v = self.heads_of(hidden)
        return self.finish(hidden, F.scaled_dot_product_attention(q, k, v, is_causal=True))

    def heads_of(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each [batch, heads, tokens, head_dim]."""
        batch, tokens, width = hidden.shape
        qkv = self.qkv(self.norm_1(hidden)).view(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def finish(self, hidden: Tensor, attended: Tensor) -> Tensor:
        hidden = hidden + self.proj(attended.transpose(1, 2).flatten(2))
        return hidden + self.down(F.gelu(self.up(self.norm_2(hidden)), approximate="tanh"))


@dataclass(frozen=True)
class CompiledRow:
    """One context in the module's own terms: the keys and values of its 2k tokens."""

    keys_values: Float[Tensor, "layers kv=2 heads tokens head_dim"]

    @property
    def num_tokens(self) -> int:
        return self.keys_values.shape[3]

    @property
    def num_bytes(self) -> int:
        return self.keys_values.numel() * self.keys_values.element_size()


class ReasoningModule(nn.Module):
    """Predicts the next label of a sequence of labelled vectors; weights are learned on synthetic tasks only."""

    def __init__(self, shape: ModuleShape, *, seed: int = 0, wave_positions: bool = False) -> None:
        """`wave_positions` begins the learned positions at waves over the pairs and a sign for x or y (`waves`)."""
        super().__init__()
        self.shape = shape
        self.read_in = nn.Linear(shape.dims, shape.width)
        self.positions = nn.Parameter(torch.empty(2 * shape.pairs, shape.width))
        self.blocks = nn.ModuleList([Block(shape) for _ in range(shape.layers)])
        self.norm = nn.LayerNorm(shape.width)
        self.read_out = nn.Linear(shape.width, 1)
        self._initialise(torch.Generator().manual_seed(seed))
        if wave_positions:
            self.positions = nn.Parameter(waves(2 * shape.pairs, shape.width))

    @torch.no_grad()
    def _initialise(self, generator: torch.Generator) -> None:
        """As GPT-2: N(0, 0.02), residual projections 0.02 / sqrt(2 layers), biases 0; read_in, read_out as Linear."""
        for name, parameter in self.named_parameters():
            fan_in = self.read_in.in_features if name.startswith("read_in") else self.read_out.in_features
            if name.startswith("read_"):
                parameter.uniform_(-1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in), generator=generator)
            elif name.endswith("bias"):
                parameter.zero_()
            elif "norm" in name:
                parameter.fill_(1.0)
            else:
                residual = name.endswith(("proj.weight", "down.weight"))
                std = 0.02 / math.sqrt(2 * self.shape.layers) if residual else 0.02
                parameter.normal_(0.0, std, generator=generator)

    def forward(
        self, x: Float[Tensor, "batch pairs dims"], y: Float[Tensor, "batch pairs"]
    ) -> Float[Tensor, "batch pairs"]:
        """The logit of each y given the pairs before it and its own x; y_i itself is seen by later positions only."""
        hidden = self._embed(x, y)
        for block in self.blocks:
            hidden = block(hidden)
        return self._read_out(hidden[:, ::2])

    def _embed(self, x: Tensor, y: Tensor) -> Tensor:
        tokens = torch.stack([x, F.pad(y.unsqueeze(-1), (0, x.shape[-1] - 1))], dim=2).flatten(1, 2)
        with torch.autocast(x.device.type, enabled=False):
            return self.read_in(tokens) + self.positions[: tokens.shape[1]]

    def _read_out(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return self.read_out(self.norm(hidden.float())).squeeze(-1)

    @torch.no_grad()
    def compile_rows(self, x: Sequence[Float[Tensor, "_ dims"]], y: Sequence[Float[Tensor, " _"]]) -> list[CompiledRow]:
        """Compiles contexts of any lengths in one forward; each holds 1 to `max_examples` examples."""
        lengths = [len(one) for one in x]
        assert lengths and min(lengths) > 0 and max(lengths) <= self.shape.max_examples
        # Shorter contexts are padded at their ends, where causal attention keeps the padding out of sight.
        hidden = self._embed(nn.utils.rnn.pad_sequence(list(x), True), nn.utils.rnn.pad_sequence(list(y), True))
        layers: list[Tensor] = []
        for block in self.blocks:
            assert isinstance(block, Block)
            q, k, v = block.heads_of(hidden)
            hidden = block.finish(hidden, F.scaled_dot_product_attention(q, k, v, is_causal=True))
            layers.append(torch.stack([k, v], dim=1))
        cached = torch.stack(layers, dim=1)  # [batch, layers, 2, heads, tokens, head_dim]
        return [CompiledRow(cached[i, :, :, :, : 2 * n].clone()) for i, n in enumerate(lengths)]

    @torch.no_grad()
    def answer(
        self, rows: Sequence[CompiledRow], queries: Sequence[Float[Tensor, "_ dims"]]
    ) -> list[Float[Tensor, " _"]]:
        """Logits of `queries[i]` against `rows[i]`, all in one forward.

        Queries of a row are cut into tiles; in attention a tile sees its row's keys and, of its own, each query only
        itself. Equal to one forward a query up to rounding.
        """
        tile = min(MAX_TILE, max(len(q) for q in queries))
        owners = [i for i, q in enumerate(queries) for _ in range(0, len(q), tile)]
        longest = max(row.num_tokens for row in rows)
        device = self.positions.device
        x = torch.zeros(len(owners), tile, self.shape.dims, device=device)
        cut = [piece for q in queries for piece in q.split(tile)]
        for i, piece in enumerate(cut):
            x[i, : len(piece)] = piece
        row_of = torch.tensor(owners, device=device)
        num_tokens = torch.tensor([row.num_tokens for row in rows], device=device)[row_of]

        stacked = torch.zeros(
            self.shape.layers, 2, len(rows), self.shape.heads, longest, self.shape.head_dim, device=device
        )
        for i, row in enumerate(rows):
            stacked[:, :, i, :, : row.num_tokens] = row.keys_values
        seen = torch.arange(longest, device=device) < num_tokens[:, None]
        itself = torch.eye(tile, dtype=torch.bool, device=device)
        mask = torch.cat([seen[:, None, :].expand(-1, tile, -1), itself.expand(len(owners), -1, -1)], dim=2).unsqueeze(
            1
        )

        hidden = self.read_in(x) + self.positions[num_tokens][:, None, :]
        for layer, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            q, k, v = block.heads_of(hidden)
            keys = torch.cat([stacked[layer, 0, row_of], k], dim=2)
            values = torch.cat([stacked[layer, 1, row_of], v], dim=2)
            hidden = block.finish(hidden, F.scaled_dot_product_attention(q, keys, values, attn_mask=mask))
        logits = self._read_out(hidden)
        answers: list[list[Tensor]] = [[] for _ in rows]
        for i, piece in enumerate(cut):
            answers[owners[i]].append(logits[i, : len(piece)])
        return [torch.cat(one) for one in answers]


def waves(tokens: int, width: int) -> Float[Tensor, "tokens width"]:
    """Positions to begin from: sines and cosines of the pair's index, alike for its two tokens, and +-1 for y or x.

    As large as the vectors' own part and shared between positions: "the x before this y" is then one linear map for all
    of them, where GPT-2's small independent positions have it learned for each anew.
    """
    pair, is_y = torch.arange(tokens) // 2, torch.arange(tokens) % 2
    num_waves = max(1, (width - 4) // 2)
    frequencies = torch.exp(torch.linspace(math.log(math.pi / 2), math.log(math.pi / 100), num_waves))
    angles = pair[:, None] * frequencies
    signs = (2.0 * is_y - 1.0)[:, None].expand(-1, width - 2 * num_waves)
    return 0.5 * torch.cat([angles.sin(), angles.cos(), signs], dim=1)
