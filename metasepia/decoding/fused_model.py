"""The forward of Llama-shaped models (Llama, Mistral, Qwen2) with fewer and faster operators than transformers' own.

Each step of decoding reads all weights and little else, so what counts is how the products are made: query, key and
value are one product with packed weights (`metasepia.matrices`), the residual is added within the next one, and keys
are not repeated for the query heads that share them: these are laid out as queries of one head. Masks and rotations are
made once a step. The model itself is not changed; it may be cut for tensor parallelism, and any of its linear layers
may be an `ExpertLinear`. Results differ from transformers' by rounding only; other families run their own forward.
"""

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from metasepia.decoding.cache import RowCache, Segment
from metasepia.experts.expert_linear import ExpertLinear, Reduce
from metasepia.matrices import Matrix
from metasepia.models.shards import LayerShard

FUSED = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")

_STORED: weakref.WeakKeyDictionary[nn.Module, dict[tuple[str, ...], Matrix]] = weakref.WeakKeyDictionary()
"""By the module that holds the layers, and their names: packed once a model, whoever decodes with it."""


class FusedModel:
    """Reads a model's weights where they are; making one costs nothing, and weights are packed at their first use."""

    def __init__(self, model: PreTrainedModel, shards: Mapping[str, LayerShard], reduce: Reduce | None) -> None:
        inner: Any = model.model
        self._embed, self._norm, self._rotary = inner.embed_tokens, inner.norm, inner.rotary_emb
        self._blocks = [_Block(f"model.layers.{i}", one, shards, reduce) for i, one in enumerate(inner.layers)]
        self._head = _Product(model, ("lm_head",), shards.get("lm_head.weight"), reduce)
        self._windows = _windows(model)
        self.keys_by_dim = model.device.type == "cpu"
        """How the caches of rows that decode are to lie in memory."""

    @classmethod
    def of(
        cls, model: PreTrainedModel, shards: Mapping[str, LayerShard] | None = None, reduce: Reduce | None = None
    ) -> "FusedModel | None":
        """None for a model of another shape. `shards` says by parameter name how layers were cut, `reduce` sums."""
        ours = type(model).__name__ in FUSED and type(model).__module__.startswith("transformers.models.")
        return cls(model, shards or {}, reduce) if ours else None

    def forward(
        self,
        token_ids: Int[Tensor, "rows new"],
        positions: Int[Tensor, "rows new"],
        segments: Sequence[Segment],
        *,
        keep: int = 1,
        layers: tuple[int, ...] | None = None,
    ) -> tuple[Float[Tensor, "rows kept vocab"], Float[Tensor, "layers rows new hidden"] | None]:
        """Logits of the last `keep` columns and the hidden states of `layers`. Keys and values go to the caches."""
        x: Tensor = self._embed(token_ids)
        cos, sin = self._rotary(x, position_ids=positions)
        half = sin.shape[-1] // 2
        rotation = cos.unsqueeze(2), torch.cat((-sin[..., :half], sin[..., half:]), -1).unsqueeze(2)
        new = token_ids.shape[1]
        spans: list[_Span] = []
        for segment in segments:
            start = spans[-1].rows.stop if spans else 0
            masks = {window: _mask(segment, new, window, x) for window in set(self._windows)}
            spans.append(_Span(segment.cache, slice(start, start + len(segment.firsts)), masks))
        states = [x] if layers is not None else []
        for number, (block, window) in enumerate(zip(self._blocks, self._windows, strict=True)):
            x = block.forward(x, rotation, spans, number, window)
            if layers is not None:
                states.append(x)
        if layers is not None:
            states[-1] = x = _normed(x, self._norm)
            return self._head(x[:, -keep:]), torch.stack([states[layer] for layer in layers])
        return self._head(_normed(x[:, -keep:], self._norm)), None


@dataclass
class _Span:
    """A segment's rows within the batch, with its masks by window."""

    cache: RowCache | None
    rows: slice
    masks: dict[int | None, Tensor | None]


class _Block:
    """One transformer block: attention here, the MLP by its own module."""

    def __init__(self, name: str, block: Any, shards: Mapping[str, LayerShard], reduce: Reduce | None) -> None:
        self._block, attention = block, block.self_attn
        self._norms = block.input_layernorm, block.post_attention_layernorm
        self._project = _Product(attention, ("q_proj", "k_proj", "v_proj"))
        self._output = _Product(attention, ("o_proj",), shards.get(f"{name}.self_attn.o_proj.weight"), reduce)
        self._dim: int = attention.head_dim
        self._scaling: float = attention.scaling
        # Of this rank: read off the weights, since the config speaks of the whole model.
        self._heads: int = attention.q_proj.weight.shape[0] // self._dim
        self._kv_heads: int = attention.k_proj.weight.shape[0] // self._dim

    def forward(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], spans: Sequence[_Span], number: int, window: int | None
    ) -> Tensor:
        heads = self._project(_normed(x, self._norms[0])).unflatten(-1, (-1, self._dim))
        cos, sin = rotation
        turned = heads[:, :, : self._heads + self._kv_heads]
        swapped = turned.unflatten(-1, (2, -1)).flip(-2).flatten(-2)
        turned = torch.addcmul(turned * cos, swapped, sin)
        queries, keys = turned[:, :, : self._heads], turned[:, :, self._heads :]
        values = heads[:, :, self._heads + self._kv_heads :]
        each = [self._attend(queries[one.rows], keys[one.rows], values[one.rows], one, number, window) for one in spans]
        attended = each[0] if len(each) == 1 else torch.cat(each)
        x = self._output(attended, x)
        return x + self._block.mlp(_normed(x, self._norms[1]))

    def _attend(
        self, queries: Tensor, keys: Tensor, values: Tensor, span: _Span, number: int, window: int | None
    ) -> Float[Tensor, "rows new features"]:
        """[rows, new, heads, dim] each. Keys and values are in their cache's places afterwards."""
        rows, new = queries.shape[:2]
        keys, values = keys.transpose(1, 2), values.transpose(1, 2)
        if span.cache is not None:
            keys, values = span.cache.update(keys, values, number)
        mask, shared = span.masks[window], self._heads // self._kv_heads
        if new == 1:
            if window is not None and keys.shape[2] > window:
                keys, values = keys[:, :, -window:], values[:, :, -window:]
            grouped = queries.view(rows, self._kv_heads, shared, self._dim)
            if keys.stride(-1) == 1:
                y = F.scaled_dot_product_attention(grouped, keys, values, mask, scale=self._scaling)
            else:
                scores = torch.matmul(grouped * self._scaling, keys.transpose(2, 3))
                y = torch.matmul((scores if mask is None else scores.add_(mask)).softmax(-1), values)
            return y.reshape(rows, 1, -1)
        keys, values = (
            one[:, :, None].expand(-1, -1, shared, -1, -1).flatten(1, 2).contiguous() for one in (keys, values)
        )
        y = F.scaled_dot_product_attention(
            queries.transpose(1, 2), keys, values, mask, is_causal=mask is None, scale=self._scaling
        )
        return y.transpose(1, 2).reshape(rows, new, -1)


class _Product:
    """Linear layers of one module that share their input, side by side; looked up each time, as they may be replaced.

    Their stored weights are one product. While a row's expert has something to add, they are called one by one.
    """

    def __init__(
        self, parent: nn.Module, names: tuple[str, ...], shard: LayerShard | None = None, reduce: Reduce | None = None
    ) -> None:
        self._parent, self._names = parent, names
        cut = shard is not None and shard.kind == "row" and len(shard.sizes) > 1
        self._reduce = reduce if cut else None
        self._span = shard.span if shard is not None and cut else None
        self._matrix = _stored(parent, names)
        biases = [parent.get_submodule(name).bias for name in names]
        self._bias: Tensor | None = None if biases[0] is None else torch.cat(biases)  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]

    def __call__(self, x: Tensor, summand: Tensor | None = None) -> Tensor:
        """The product, and `summand` added to it. A layer cut by its inputs takes its own part of x, if x is whole."""
        layers = [self._parent._modules[name] for name in self._names]
        if any(isinstance(one, ExpertLinear) and not one.is_plain for one in layers):
            each = [one(x) for one in layers]  # pyright: ignore[reportOptionalCall]
            y = each[0] if len(each) == 1 else torch.cat(each, dim=-1)
            return y if summand is None else summand + y
        for one in layers:
            if isinstance(one, ExpertLinear):
                one.ran()
        if self._reduce is None:
            if summand is not None and self._bias is None:
                return self._matrix.plus(x, summand)
            y = self._matrix(x, self._bias)
        else:
            assert self._span is not None
            if x.shape[-1] > self._span.stop - self._span.start:
                x = x[..., self._span]
            y = self._reduce(self._matrix(x).contiguous())
            y = y if self._bias is None else y + self._bias
        return y if summand is None else summand + y


def _stored(parent: nn.Module, names: tuple[str, ...]) -> Matrix:
    made = _STORED.setdefault(parent, {})
    if names not in made:
        # No strong reference to the module: it is the key, and would never leave.
        found = weakref.ref(parent)
        made[names] = Matrix(*[lambda name=name: found()._modules[name]._parameters["weight"] for name in names])  # pyright: ignore
    return made[names]


def _normed(x: Tensor, norm: nn.Module) -> Tensor:
    weight: Tensor = norm._parameters["weight"]  # pyright: ignore[reportAssignmentType]
    return F.rms_norm(x, weight.shape, weight, norm.variance_epsilon)  # pyright: ignore[reportArgumentType]


def _windows(model: PreTrainedModel) -> list[int | None]:
    """How far each layer looks back, itself included; None: to the beginning."""
    config = model.config
    window: int | None = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if config.model_type == "mistral":  # all layers, whatever `layer_types` says
        return [window] * config.num_hidden_layers
    if window is None or kinds is None:
        return [None] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]


def _mask(segment: Segment, new: int, window: int | None, like: Tensor) -> Tensor | None:
    """What is added to the scores of each new column against those in use: 0, or -inf; None: causal, or for one new
    column everything.

    A column of padding attends to itself, for no row of a softmax may be empty.
    """
    columns = new if segment.cache is None else segment.cache.width + new
    whole = window is None or columns <= window
    if not any(segment.firsts) and whole and (new == 1 or new == columns):
        return None
    column = torch.arange(columns, device=like.device)
    query = column[columns - new :, None]
    first = torch.tensor(segment.firsts, device=like.device)[:, None, None]
    seen = (column >= first) & (column <= query)
    if not whole:
        assert window is not None
        seen &= column > query - window
    seen |= column == query
    mask = torch.zeros(seen.shape, dtype=like.dtype, device=like.device).masked_fill_(~seen, -torch.inf)[:, None]
    return mask[..., -window:] if new == 1 and window is not None else mask
