"""Singular value fine-tuning at run time: expert vectors through singular factors (Transformer-squared, 2501.06252).

A linear layer W = U diag(s) Vh is factored once. An expert multiplies s by its vector z: W' = n U diag(s z) Vh. Nothing
is rebuilt to switch: expert rows of a batch go h = x Vh^T; h = h * (n s z)[row]; y = h U^T, each row with its own z;
base rows go through the stored weight. Below fp32 the same is applied as W x + U diag(s (n z - 1)) Vh x, because
rounded factors do not multiply back to W. The reference rebuilds every matrix for each expert instead.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from metasepia.digests import short
from metasepia.errors import CorruptArtefact, InvalidRequest, InvalidSettings, UnknownName
from metasepia.experts import ExpertVectors as ExpertVectors
from metasepia.factors import FactorSet as FactorSet
from metasepia.factors import SingularFactors as SingularFactors
from metasepia.factors import compose
from metasepia.factors import factors_of as factors_of
from metasepia.mixing import check_simplex
from metasepia.rows import Adapter
from metasepia.rows import Path as RowPath
from metasepia.shards import LayerShard as LayerShard

Reduce = Callable[[Tensor], Tensor]
"""Sums a contiguous tensor over the ranks of the gang and returns it; in place or not."""

MAX_COMPOSED = 256
"""Adapters whose n s z is kept ready; the least recently used leaves first."""


@dataclass
class _Selection:
    """The values in force: a table [adapters, all layers' singular values] and an index a batch row."""

    num_rows: int | None = None
    """None: nothing selected; every row of any batch is a base row."""
    plain_rows: Tensor | None = None
    expert_rows: Tensor | None = None
    table: Tensor | None = None
    index: Tensor | None = None
    """Row of `table` for each expert row; None when all of them share the one row."""
    calls: int = 0


class ExpertLinear(nn.Module):
    """Stands in the place of one linear layer, or of one rank's shard of it."""

    def __init__(
        self, inner: nn.Module, factors: SingularFactors, shard: LayerShard, span: slice, reduce: Reduce | None
    ) -> None:
        super().__init__()
        self.weight: nn.Parameter = inner.weight  # pyright: ignore[reportAttributeAccessIssue]
        self.bias: nn.Parameter | None = getattr(inner, "bias", None)
        like = {"device": self.weight.device, "dtype": self.weight.dtype}
        u, vh = factors.u, factors.vh
        if shard.kind == "column":
            u = u[shard.span]
        elif shard.kind == "row":
            vh = vh[:, shard.span]
        self.register_buffer("u", u.to(**like), persistent=False)
        self.register_buffer("vh", vh.to(**like), persistent=False)
        self.u: Tensor
        self.vh: Tensor
        self.exact = self.weight.dtype in (torch.float32, torch.float64)
        self._span, self._reduce = span, reduce if shard.kind == "row" else None
        self._is_row = shard.kind == "row"
        self._selection = _Selection()

    def forward(self, x: Tensor) -> Tensor:
        selection = self._selection
        selection.calls += 1
        if selection.num_rows is not None and x.shape[0] != selection.num_rows:
            raise ValueError(f"{selection.num_rows} adapters are selected and the batch has {x.shape[0]} rows")
        bias = None if self._is_row else self.bias
        if selection.expert_rows is None:
            y = nn.functional.linear(x, self.weight, bias)
        elif selection.plain_rows is None:
            y = self._experts(x, selection, bias)
        else:
            plain = nn.functional.linear(x[selection.plain_rows], self.weight, bias)
            y = plain.new_empty((*x.shape[:-1], plain.shape[-1]))
            y[selection.plain_rows] = plain
            y[selection.expert_rows] = self._experts(x[selection.expert_rows], selection, bias)
        if self._is_row:
            y = self._reduce(y.contiguous()) if self._reduce else y
            y = y if self.bias is None else y + self.bias
        return y

    def _experts(self, x: Tensor, selection: _Selection, bias: Tensor | None) -> Tensor:
        assert selection.table is not None
        scale = selection.table[:, self._span]
        if selection.index is not None:
            scale = scale[selection.index]
        scale = scale.view(scale.shape[0], *[1] * (x.ndim - 2), scale.shape[1])
        h = nn.functional.linear(x, self.vh)
        h = (h * scale).to(h.dtype)  # below fp32 the product is rounded once
        if self.exact:
            return nn.functional.linear(h, self.u, bias)
        return nn.functional.linear(x, self.weight, bias) + nn.functional.linear(h, self.u)


class ExpertLayers:
    """The expert layers of one model, the experts it holds, and which of them each row of the next forward uses.

    `select` before each forward, one adapter a batch row (dimension 0). Not for use by two threads at once.
    """

    def __init__(self, factors: FactorSet, layers: Mapping[str, ExpertLinear]) -> None:
        self.factors = factors
        self._layers = dict(layers)
        self._spans = {name: layer._span for name, layer in layers.items()}
        first = next(iter(layers.values()))
        self._device, self._exact = first.weight.device, first.exact
        self._s = torch.cat([factors[name].s for name in layers]).to(self._device, torch.float32)
        self._z: dict[str, Tensor] = {}
        self._renormalise: dict[str, bool] = {}
        self._composed: OrderedDict[Adapter, Tensor] = OrderedDict()
        self._selected: tuple[Adapter, ...] | None = ()
        self._selection = _Selection()
        for layer in layers.values():
            layer._selection = self._selection

    # -- experts -------------------------------------------------------------------------------------------------------

    def put(self, digest: str, expert: ExpertVectors) -> None:
        """Holds an expert; costs its vectors only. Putting it again changes nothing.

        Raises CorruptArtefact when it is not the expert of this digest or does not fit this model's factors.
        """
        if digest in self._z:
            return
        if expert.digest != digest:
            raise CorruptArtefact(f"expert {short(digest)}", f"its content has digest {short(expert.digest)}")
        expert.check_fits(self.factors.index)
        z = torch.ones_like(self._s)
        for name, vector in expert.z.items():
            z[self._spans[name]] = torch.tensor(vector)
        if expert.renormalise:
            for name, span in self._spans.items():
                total = float((self._s[span] * z[span]).sum())
                if not total > 0:
                    raise CorruptArtefact(f"expert {short(digest)}", f"{name}: sum(s z) is {total:g}, not positive")
        self._z[digest], self._renormalise[digest] = z, expert.renormalise

    def drop(self, digest: str) -> None:
        """Forgets an expert, and every mixture with it; dropping one that is not held does nothing."""
        if self._z.pop(digest, None) is not None:
            del self._renormalise[digest]
            for adapter in [a for a in self._composed if any(d == digest for d, _ in a)]:
                del self._composed[adapter]
            self._selected = (
                None  # the next select must find it missing; a forward already selected still has its values
            )

    def holds(self, digest: str) -> bool:
        return digest in self._z

    @property
    def held(self) -> tuple[str, ...]:
        return tuple(sorted(self._z))

    # -- what the next forward uses ------------------------------------------------------------------------------------

    def select(self, adapters: Sequence[Adapter]) -> None:
        """One adapter for each row of the next batch, in order; no rows: every row of any batch is a base row.

        Raises UnknownName for an expert that is not held, InvalidRequest for weights off the simplex or a mixture of
        renormalised experts with others. What was selected before then stays.
        """
        adapters = tuple(adapters)
        if adapters == self._selected:
            self._selection.calls = 0
            return
        distinct = list(dict.fromkeys(a for a in adapters if a))
        rows = [self._compose(adapter) for adapter in distinct]
        plain = [i for i, a in enumerate(adapters) if not a]
        expert = [i for i, a in enumerate(adapters) if a]
        where = {a: i for i, a in enumerate(distinct)}
        index = [where[a] for a in adapters if a]
        self._selected = adapters
        self._set(
            num_rows=len(adapters) or None,
            plain_rows=self._tensor(plain) if plain else None,
            expert_rows=self._tensor(expert) if expert else None,
            table=None if not rows else rows[0][None] if len(rows) == 1 else torch.stack(rows),
            index=self._tensor(index) if len(rows) > 1 else None,
        )

    def select_values(self, z: Float[Tensor, "rows singular"], renormalise: bool = False) -> None:
        """One flat z (all layers, in `spans` order) for each row of the next batch, or one for all of them.

        Differentiable in z: this is what training and population search use.
        """
        parts = [compose(self._s[span], z[:, span], renormalise) for span in self._spans.values()]
        table = torch.cat(parts, dim=-1)
        self._selected = None
        self._set(
            num_rows=None if len(table) == 1 else len(table),
            plain_rows=None,
            expert_rows=torch.arange(len(table), device=self._device),
            table=table if self._exact else table - self._s,
            index=torch.arange(len(table), device=self._device) if len(table) > 1 else None,
        )

    @property
    def executed(self) -> tuple[tuple[Adapter, RowPath], ...]:
        """Adapter and path of each selected row. Raises RuntimeError unless every layer ran since `select`."""
        if self._selection.calls < len(self._layers):
            raise RuntimeError(f"{self._selection.calls} of {len(self._layers)} expert layers ran since select")
        return tuple((adapter, "factors" if adapter else "plain") for adapter in self._selected or ())

    @property
    def spans(self) -> Mapping[str, slice]:
        """Where each layer's singular values lie in a flat z."""
        return self._spans

    def flat(self, expert: ExpertVectors) -> Float[Tensor, " singular"]:
        """An expert's vectors laid out as `select_values` wants them; 1 where the expert has none."""
        z = torch.ones_like(self._s)
        for name, vector in expert.z.items():
            z[self._spans[name]] = torch.tensor(vector)
        return z

    def _compose(self, adapter: Adapter) -> Tensor:
        """n s z of an adapter (below fp32 less s: the difference to the base), from the cache or made now."""
        if adapter in self._composed:
            self._composed.move_to_end(adapter)
            return self._composed[adapter]
        check_simplex(adapter)
        for digest, _ in adapter:
            if digest not in self._z:
                raise UnknownName("expert", digest, self.held)
        kinds = {self._renormalise[digest] for digest, _ in adapter}
        if len(kinds) > 1:
            raise InvalidRequest("weights", "renormalised experts cannot be mixed with others; choose one kind")
        renormalise = kinds.pop()
        z = torch.zeros_like(self._s)
        for digest, weight in sorted(adapter):
            z += weight * self._z[digest]
        parts = [compose(self._s[span], z[span], renormalise) for span in self._spans.values()]
        composed = torch.cat(parts) if self._exact else torch.cat(parts) - self._s
        self._composed[adapter] = composed
        if len(self._composed) > MAX_COMPOSED:
            self._composed.popitem(last=False)
        return composed

    def _tensor(self, rows: list[int]) -> Tensor:
        return torch.tensor(rows, device=self._device)

    def _set(
        self,
        *,
        num_rows: int | None,
        plain_rows: Tensor | None,
        expert_rows: Tensor | None,
        table: Tensor | None,
        index: Tensor | None,
    ) -> None:
        now = self._selection
        now.num_rows, now.plain_rows, now.expert_rows = num_rows, plain_rows, expert_rows
        now.table, now.index, now.calls = table, index, 0


def attach(
    model: nn.Module,
    factors: FactorSet,
    shards: Mapping[str, LayerShard] | None = None,
    reduce: Reduce | None = None,
) -> ExpertLayers:
    """Replaces each factored layer of `model` by an ExpertLinear on the same weights, after any sharding.

    `shards` says by parameter name how a layer was cut; one that is absent is whole. `reduce` sums over the ranks and
    is called once for each row-parallel layer and forward. Raises InvalidSettings where a weight has not the shape that
    its shard says.
    """
    shards = shards or {}
    layers: dict[str, ExpertLinear] = {}
    start = 0
    for name, one in factors.factors.items():
        path = name.removesuffix(".weight")
        parent, _, leaf = path.rpartition(".")
        inner = model.get_submodule(path)
        shard = shards.get(name, LayerShard())
        _check_shard(name, tuple(inner.weight.shape), one, shard, reduce)  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
        layer = ExpertLinear(inner, one, shard, slice(start, start + len(one.s)), reduce)
        layer.train(inner.training)
        setattr(model.get_submodule(parent) if parent else model, leaf, layer)
        layers[name] = layer
        start += len(one.s)
    return ExpertLayers(factors, layers)


def _check_shard(
    name: str, shape: tuple[int, int], factors: SingularFactors, shard: LayerShard, reduce: Reduce | None
) -> None:
    rows, columns = len(factors.u), factors.vh.shape[1]
    if shard.kind != "whole":
        whole = rows if shard.kind == "column" else columns
        if sum(shard.sizes) != whole or not 0 <= shard.rank < len(shard.sizes):
            raise InvalidSettings(f"shards[{name}]", shard, f"sizes that sum to {whole}, and a rank among them")
    if shard.kind == "row" and reduce is None and len(shard.sizes) > 1:
        raise InvalidSettings(f"shards[{name}]", shard, "given together with `reduce`")
    wanted = (
        shard.sizes[shard.rank] if shard.kind == "column" else rows,
        shard.sizes[shard.rank] if shard.kind == "row" else columns,
    )
    if shape != wanted:
        raise InvalidSettings(f"shards[{name}]", shard, f"such that the weight is {list(wanted)}; it is {list(shape)}")
