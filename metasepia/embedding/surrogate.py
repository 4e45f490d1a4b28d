"""The frozen surrogate of task embeddings: a text encoder as plain tensors, with a prefix of keys and values a task.

FUTE (arXiv:2402.14522) embeds every task by what it does to one frozen model. Here that model is any encoder of
`metasepia.encoders.FAMILIES`, computed layer by layer so that rows of many tasks, each with its own prefix, share a
padded batch, and so that gradients reach the prefixes (and whoever asks for a layer's own tensors) without any of the
weights being copied. Without a prefix its vectors are those of `TextEncoder.embed`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.activations import ACT2FN

from metasepia.encoders import TextEncoder
from metasepia.packing import PackedLinear


class FrozenLinear:
    """x W^T + b of weights that never change; gradients go to x only. Packed for both directions on a CPU."""

    def __init__(self, weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None) -> None:
        self.weight, self.bias = weight, bias
        self._forward = PackedLinear(_linear(weight, bias))
        self._backward: PackedLinear | None = None

    def __call__(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        if torch.is_grad_enabled() and x.requires_grad:
            return _FrozenProduct.apply(x, self)  # pyright: ignore[reportReturnType]
        with torch.no_grad():
            return self._forward(x)

    def transposed(self, grad: Float[Tensor, "... out"]) -> Float[Tensor, "... in"]:
        """grad W: what reaches the input."""
        if self._backward is None:
            self._backward = PackedLinear(_linear(self.weight.t().contiguous(), None))
        return self._backward(grad.contiguous())


class _FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: FrozenLinear) -> Tensor:
        ctx.linear = linear
        return linear._forward(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.linear.transposed(grads[0]), None


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One block of a BERT-like encoder (arXiv:1810.04805): attention, a feed-forward part, each added and normed."""

    query_key_value: FrozenLinear
    """The three products as one: [3 * width, width]."""
    attended: FrozenLinear
    attention_norm: nn.LayerNorm
    up: FrozenLinear
    down: FrozenLinear
    output_norm: nn.LayerNorm


@dataclass(frozen=True, kw_only=True)
class Padded:
    """Token ids of several texts as one rectangle."""

    token_ids: Int[Tensor, "rows seq"]
    mask: Bool[Tensor, "rows seq"]
    """True where there is a token."""


class Surrogate:
    """A frozen encoder as a function of plain tensors. Not thread-safe: its tokenizer is not."""

    def __init__(self, encoder: TextEncoder) -> None:
        self.encoder = encoder
        self.digest, self.window, self.width, self.device = (
            *(encoder.digest, encoder.window, encoder.width, encoder.device),
        )
        model: Any = encoder._model
        self.heads: int = model.config.num_attention_heads
        self.head_dim = self.width // self.heads
        self.activation = ACT2FN[getattr(model.config, "hidden_act", None) or model.config.activation]
        self._model = model
        self._padding: int = model.config.pad_token_id or 0
        self.layers = tuple(_layer(block) for block in _blocks(model))

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def tokenize(self, texts: Sequence[str], max_tokens: int) -> list[list[int]]:
        """Token ids with the special tokens. Of more than `max_tokens` the last ones are left out, the very last kept.

        Raises as `TextEncoder.tokenize` does, so WindowExceeded for a text beyond the encoder's window.
        """
        found = self.encoder.tokenize(texts)
        return [ids if len(ids) <= max_tokens else [*ids[: max_tokens - 1], ids[-1]] for ids in found]

    def padded(self, token_ids: Sequence[Sequence[int]]) -> Padded:
        rows = [torch.tensor(ids) for ids in token_ids]
        return Padded(
            token_ids=pad_sequence(rows, batch_first=True, padding_value=self._padding).to(self.device),
            mask=pad_sequence([torch.ones_like(row, dtype=torch.bool) for row in rows], batch_first=True).to(
                self.device
            ),
        )

    @torch.no_grad()
    def embedded(self, batch: Padded) -> Float[Tensor, "rows seq width"]:
        """What enters the first layer: words, positions and segment, normed."""
        hidden = self._model.embeddings(batch.token_ids)
        project = getattr(self._model, "embeddings_project", None)
        return hidden if project is None else project(hidden)

    def position_bias(self, seq: int) -> Float[Tensor, "1 heads seq seq"] | None:
        """What MPNet adds to the attention scores by the distance of two tokens (arXiv:2004.09297); others nothing."""
        parent = getattr(self._model, "encoder", None)
        if not hasattr(parent, "compute_position_bias"):
            return None
        with torch.no_grad():
            return parent.compute_position_bias(torch.empty(1, seq, device=self.device))  # pyright: ignore[reportOptionalMemberAccess]

    def attention_bias(
        self, mask: Bool[Tensor, "rows seq"], prefix_len: int = 0
    ) -> Float[Tensor, "rows heads_or_1 seq_or_1 keys"]:
        """Added to the scores of every layer: -inf at padding, the position bias, nothing at the prefix."""
        bias = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, float("-inf"))[:, None, None]
        distances = self.position_bias(mask.shape[1])
        if distances is not None:
            bias = bias + distances
        return F.pad(bias, (prefix_len, 0))

    def forward_layer(
        self,
        layer: Layer,
        hidden: Float[Tensor, "rows seq width"],
        bias: Float[Tensor, "rows heads_or_1 seq_or_1 keys"],
        prefix: Float[Tensor, "tasks 2 heads prefix head_dim"] | None = None,
        rows_of_tasks: Sequence[int] = (),
        *,
        projected: Float[Tensor, "rows seq 3*width"] | None = None,
    ) -> Float[Tensor, "rows seq width"]:
        """One block. With a prefix the rows lie task by task, `rows_of_tasks[t]` of them for task t.

        A task's keys and values stand before those of the text, seen by all of its tokens; what a row gives depends on
        its own task's prefix alone. `projected` spares the first product where it was kept.
        """
        rows, seq, width = hidden.shape
        both = layer.query_key_value(hidden) if projected is None else projected
        query, key, value = both.view(rows, seq, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        if prefix is not None:
            key = torch.cat([_by_rows(prefix[:, 0], rows_of_tasks), key], dim=2)
            value = torch.cat([_by_rows(prefix[:, 1], rows_of_tasks), value], dim=2)
        scores = torch.matmul(query * self.head_dim**-0.5, key.transpose(2, 3)) + bias
        attended = torch.matmul(scores.softmax(dim=-1), value).transpose(1, 2).reshape(rows, seq, width)
        hidden = layer.attention_norm(layer.attended(attended) + hidden)
        return layer.output_norm(layer.down(self.activation(layer.up(hidden))) + hidden)

    def hidden_states(self, batch: Padded, until: int | None = None) -> list[Float[Tensor, "rows seq width"]]:
        """What enters each layer, then what leaves layer `until` - 1 (all of them by default), without a prefix."""
        hidden = self.embedded(batch)
        states, bias = [hidden], self.attention_bias(batch.mask)
        for layer in self.layers[:until]:
            hidden = self.forward_layer(layer, hidden, bias)
            states.append(hidden)
        return states

    def vectors(
        self, hidden: Float[Tensor, "rows seq width"], mask: Bool[Tensor, "rows seq"]
    ) -> Float[Tensor, "rows width"]:
        """Unit-norm means over the tokens of each row."""
        mean = (hidden * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
        return F.normalize(mean, dim=-1)

    @torch.no_grad()
    def embed(self, texts: Sequence[str], max_tokens: int | None = None) -> Float[np.ndarray, "texts width"]:
        """`TextEncoder.embed` by way of these layers, of the first `max_tokens` of each text."""
        token_ids = self.tokenize(texts, max_tokens or self.window)
        vectors = np.empty((len(texts), self.width), np.float32)
        for group in self.encoder.plan([len(ids) for ids in token_ids]):
            batch = self.padded([token_ids[i] for i in group])
            vectors[group] = self.vectors(self.hidden_states(batch)[-1], batch.mask).cpu().numpy()
        return vectors


def _by_rows(
    of_tasks: Float[Tensor, "tasks heads prefix head_dim"], rows_of_tasks: Sequence[int]
) -> Float[Tensor, "rows heads prefix head_dim"]:
    """Each task's tensor once a row. By expansion: its gradient is a sum in a fixed order, on a GPU too."""
    return torch.cat([one.expand(count, -1, -1, -1) for one, count in zip(of_tasks, rows_of_tasks, strict=True)], dim=0)


def _blocks(model: Any) -> list[Any]:
    return list(model.transformer.layer if hasattr(model, "transformer") else model.encoder.layer)


def _layer(block: Any) -> Layer:
    """A transformers block of any of the families, read by the names that its family gives the parts."""
    attention = block.attention
    if hasattr(block, "sa_layer_norm"):  # DistilBERT
        parts = (attention.q_lin, attention.k_lin, attention.v_lin, attention.out_lin)
        up, down = block.ffn.lin1, block.ffn.lin2
        norms = block.sa_layer_norm, block.output_layer_norm
    else:
        up, down = block.intermediate.dense, block.output.dense
        if hasattr(attention, "attn"):  # MPNet
            parts = (attention.attn.q, attention.attn.k, attention.attn.v, attention.attn.o)
            norms = attention.LayerNorm, block.output.LayerNorm
        else:
            of = attention.self
            parts = (of.query, of.key, of.value, attention.output.dense)
            norms = attention.output.LayerNorm, block.output.LayerNorm
    query, key, value, attended = (_frozen(part) for part in parts)
    together = [torch.cat([getattr(part, name) for part in (query, key, value)]) for name in ("weight", "bias")]
    return Layer(
        query_key_value=FrozenLinear(*together),
        attended=attended,
        attention_norm=norms[0],
        up=_frozen(up),
        down=_frozen(down),
        output_norm=norms[1],
    )


def _frozen(linear: Any) -> FrozenLinear:
    """Of a linear layer, or of what `packing.pack` put in its place."""
    plain = linear.linear if isinstance(linear, PackedLinear) else linear
    return FrozenLinear(plain.weight.detach(), plain.bias.detach())
