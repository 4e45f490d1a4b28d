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

from metasepia.packing import PackedLinear


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
        # The same layers without gradients; plain objects, so that they are no part of the state.
        self.packed_qkv, self.packed_proj = PackedLinear(self.qkv), PackedLinear(self.proj)
        self.packed_up, self.packed_down = PackedLinear(self.up, gelu="tanh"), PackedLinear(self.down)

    def forward(self, hidden: Tensor) -> Tensor:
        """[batch, tokens, width] to the same, causally."""
        q, k, v = self.heads_of(hidden)
        return self.finish(hidden, F.scaled_dot_product_attention(q, k, v, is_causal=True))

    def heads_of(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each [batch, heads, tokens, head_dim]."""
        return self._split(self.qkv(self.norm_1(hidden)))

    def finish(self, hidden: Tensor, attended: Tensor) -> Tensor:
        hidden = hidden + self.proj(attended.transpose(1, 2).flatten(2))
        return hidden + self.down(F.gelu(self.up(self.norm_2(hidden)), approximate="tanh"))

    def packed_heads_of(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`heads_of` without gradients."""
        return self._split(self.packed_qkv(self.norm_1(hidden)))

    def packed_finish(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """`finish` without gradients."""
        hidden = hidden + self.packed_proj(attended.transpose(1, 2).flatten(2))
        return hidden + self.packed_down(self.packed_up(self.norm_2(hidden)))

    def _split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v


@dataclass(frozen=True)
class CompiledRow:
    """One context in the module's own terms: the keys and values of its 2k tokens.

    Contexts that were compiled together lie in one block; asked together, in order, they are answered out of it
    without copies.
    """

    block: Float[Tensor, "layers kv=2 rows heads tokens head_dim"]
    place: int

    @property
    def num_tokens(self) -> int:
        return self.block.shape[4]

    @property
    def num_bytes(self) -> int:
        """Its share of the block's."""
        return self.block.numel() * self.block.element_size() // self.block.shape[2]


@dataclass
class _Run:
    """Neighbours in one block that are asked as many queries each: one attention."""

    block: Tensor
    first_row: int
    num_rows: int
    first_query: int
    num_queries: int
    """Of each row."""

    def keys_values(self, layer: int) -> tuple[Tensor, Tensor]:
        keys, values = self.block[layer, :, self.first_row : self.first_row + self.num_rows].unbind(0)
        return keys, values

    @property
    def queries(self) -> slice:
        return slice(self.first_query, self.first_query + self.num_rows * self.num_queries)


def _runs_of(rows: Sequence[CompiledRow], counts: Sequence[int]) -> list[_Run]:
    runs: list[_Run] = []
    first_query = 0
    for row, count in zip(rows, counts, strict=True):
        last = runs[-1] if runs else None
        if last and last.block is row.block and last.num_queries == count and (
            row.place == last.first_row + last.num_rows
        ):  # fmt: skip
            last.num_rows += 1
        elif count:
            runs.append(_Run(row.block, row.place, 1, first_query, count))
        first_query += count
    return runs


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
            q, k, v = block.packed_heads_of(hidden)
            layers.append(torch.stack([k, v]))
            if len(layers) < len(self.blocks):  # nothing reads what the last layer makes of the context
                hidden = block.packed_finish(hidden, F.scaled_dot_product_attention(q, k, v, is_causal=True))
        cached = torch.stack(layers)  # [layers, 2, batch, heads, tokens, head_dim]
        rows: list[CompiledRow | None] = [None] * len(lengths)
        for length in sorted(set(lengths)):
            alike = [i for i, one in enumerate(lengths) if one == length]
            whole = cached if len(alike) == len(lengths) else cached[:, :, alike, :, : 2 * length].contiguous()
            for place, i in enumerate(alike):
                rows[i] = CompiledRow(whole, place)
        return [row for row in rows if row is not None]

    @torch.no_grad()
    def answer(
        self, rows: Sequence[CompiledRow], queries: Sequence[Float[Tensor, "_ dims"]]
    ) -> list[Float[Tensor, " _"]]:
        """Logits of `queries[i]` against `rows[i]`, all in one forward; none for no queries.

        All queries are the tokens of one batch without padding. In attention those of a row see its keys, and each of
        them its own key beside (`attend`). Equal to one forward a query up to rounding.
        """
        counts = [len(one) for one in queries]
        runs, total = _runs_of(rows, counts), sum(counts)
        if not total:
            return [self.positions.new_empty(0) for _ in counts]
        places = torch.tensor([row.num_tokens for row in rows]).repeat_interleave(torch.tensor(counts))
        hidden = self.read_in(torch.cat(list(queries))) + self.positions[places.to(self.positions.device)]
        attended = hidden.new_empty(total, self.shape.heads, self.shape.head_dim)
        log_sums = hidden.new_empty(total, self.shape.heads)
        for layer, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            q, k, v = (one.squeeze(0).transpose(0, 1) for one in block.packed_heads_of(hidden[None]))
            for run in runs:
                of_row = (run.num_rows, run.num_queries)
                out, log_sum = attend(q[run.queries].unflatten(0, of_row).transpose(1, 2), *run.keys_values(layer))
                attended[run.queries].unflatten(0, of_row).copy_(out.transpose(1, 2))
                log_sums[run.queries].unflatten(0, of_row).copy_(log_sum.transpose(1, 2))
            itself = (q * k).sum(2) / math.sqrt(self.shape.head_dim)
            attended.lerp_(v, torch.sigmoid(itself - log_sums)[..., None])
            hidden = block.packed_finish(hidden[None], attended.transpose(0, 1)[None]).squeeze(0)
        return list(self._read_out(hidden).split(counts))


def attend(
    q: Float[Tensor, "rows heads queries head_dim"],
    keys: Float[Tensor, "rows heads tokens head_dim"],
    values: Float[Tensor, "rows heads tokens head_dim"],
) -> tuple[Float[Tensor, "rows heads queries head_dim"], Float[Tensor, "rows heads queries"]]:
    """Attention of every query to all keys of its row, and the logarithm l of the sum of exponentials beneath it.

    With l one more key of score s joins afterwards: its value's weight is sigmoid(s - l), the others keep the rest.
    """
    if q.device.type == "cpu" and q.shape[2]:
        out, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, keys, values)
        return out, log_sum
    scores = q @ keys.transpose(2, 3) / math.sqrt(q.shape[3])
    return scores.softmax(3) @ values, scores.logsumexp(3)


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
