"""Singular value fine-tuning at run time: expert vectors through singular factors (Transformer-squared, 2501.06252).

A linear layer W = U diag(s) Vh is factored once. An expert multiplies s by its vector z: W' = n U diag(s z) Vh. Nothing
is rebuilt to switch; each row of a batch has its own z, and goes one of these ways (its *path*), which its own adapter
and the replica's pins decide and its neighbours never:

- plain: the stored weight, W x;
- factors: h = Vh x; h = h * (n s z)[row]; U h. Below fp32 applied as W x + U diag(s (n z - 1)) Vh x, because rounded
  factors do not multiply back to W;
- truncated, for vectors that change the leading singular values only: n W x + U_r diag(n s_r (z_r - 1)) Vh_r x;
- lora, for low-rank adapters: W x + B A x;
- materialised, for the one adapter that a replica is pinned to: its weights, rebuilt once.

The reference rebuilds every matrix for each expert instead.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from metasepia.errors import InvalidSettings, NotSupported
from metasepia.experts.batch_parts import parts_of
from metasepia.experts.expert_linear import ExpertLinear, Reduce
from metasepia.experts.factors import FactorSet, SingularFactors
from metasepia.experts.fused_mlp import GATED, FusedMLP
from metasepia.experts.held import HeldExperts, PreparedExpert
from metasepia.experts.lora import LoraAdapter
from metasepia.experts.mixing import check_simplex
from metasepia.experts.selection import Delta, Part, Selection, Table
from metasepia.experts.singular import SingularLayout
from metasepia.experts.vectors import ExpertVectors
from metasepia.models.shards import LayerShard
from metasepia.rows import Adapter
from metasepia.rows import Path as RowPath

TRUNCATED_RANK = 64
"""Experts cut to at most so many leading values go the truncated path; others through all factors."""
MAX_COMPOSED_BYTES = 256 << 20
"""Mixtures kept ready, in bytes: about 1,200 of SmolLM2-135M's."""


class ExpertLayers:
    """The expert layers of one model, the experts it holds, and which of them each row of the next forward uses.

    `select` before each forward, one adapter a batch row (dimension 0). Not for use by two threads at once.
    """

    def __init__(
        self,
        model: nn.Module,
        factors: FactorSet | None,
        shards: Mapping[str, LayerShard],
        reduce: Reduce | None,
        held: HeldExperts,
    ) -> None:
        self._model, self._shards, self._reduce, self._held = model, shards, reduce, held
        self._factors, self._layout = factors, held.layout
        self._layers: dict[str, ExpertLinear] = {}
        self._units: list[ExpertLinear | FusedMLP] = []
        self._selection = Selection()
        self._selected: tuple[Adapter, ...] | None = ()
        self._executed: tuple[tuple[Adapter, RowPath], ...] = ()
        self._pin: Adapter = ()
        self._pinned_layers: frozenset[str] = frozenset()
        for name in () if self._layout is None else self._layout.places:
            self._wrap(name)
        self._fuse()

    @property
    def factors(self) -> FactorSet:
        """Raises NotSupported where none were given."""
        if self._factors is None:
            raise NotSupported("an expert vector on this backbone", "its settings name no expert layers")
        return self._factors

    @property
    def factors_digest(self) -> str | None:
        return None if self._factors is None else self._factors.digest

    # -- experts -------------------------------------------------------------------------------------------------------

    def put(self, digest: str, expert: ExpertVectors | LoraAdapter) -> None:
        """Holds an expert; costs its vectors only. Putting it again changes nothing.

        Raises CorruptArtefact when it is not the expert of this digest or does not fit this model.
        """
        if digest not in self._held:
            self.insert(digest, self.prepare(digest, expert))

    def prepare(self, digest: str, expert: ExpertVectors | LoraAdapter) -> PreparedExpert:
        """All of `put` but the holding: it touches no layer, so another thread may do it while a forward runs."""
        return self._held.prepare(digest, expert)

    def insert(self, digest: str, prepared: PreparedExpert) -> None:
        """Holds what `prepare` made."""
        self._held.insert(digest, prepared)
        for name in sorted(self._held.layers_of(((digest, 1.0),))):
            if name not in self._layers:
                self._wrap(name)

    def drop(self, digest: str) -> None:
        """Forgets an expert, every mixture with it, and a pin on one; dropping one that is not held does nothing."""
        if self._held.drop(digest):
            if any(one == digest for one, _ in self._pin):
                self.unpin()
            self._selected = None  # select must find it missing; a forward already selected still has its values

    def holds(self, digest: str) -> bool:
        """Whether rows may use it: what was put and not dropped, and the base as an expert."""
        return digest in self._held

    @property
    def held(self) -> tuple[str, ...]:
        """What was put and not dropped."""
        return self._held.digests

    @property
    def num_bytes(self) -> int:
        """Memory of the experts held, without the mixtures kept ready."""
        return self._held.num_bytes

    # -- pins ----------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def pin(self, adapter: Adapter) -> None:
        """From now on rows of exactly this adapter go through dense weights of its own, made here once.

        They take as much memory as the layers that it changes. A pin before is replaced. Raises as `select` does.
        """
        self.unpin()
        path = self.path_of(adapter)
        if path == "plain":
            return
        weights: dict[str, Tensor] = {}
        if path == "lora":
            stack = self._held.stack((adapter,))
            for name in sorted(stack.layers):
                a, b, _ = stack.at(name)
                weight = self._layers[name].weight
                weights[name] = (weight.float() + b.float() @ a.float()).to(weight.dtype)
        else:
            composed = self._held.compose(adapter, path)
            assert self._layout is not None
            for name, place in self._layout.places.items():
                values = composed.values[place.leading if path == "truncated" else place.whole]
                norm = None if composed.norm is None else composed.norm[place.number]
                weights[name] = self._layers[name].rebuilt(values, norm, path)
        for unit in self._units:
            unit.pin(weights)
        self._pin, self._pinned_layers, self._selected = adapter, frozenset(weights), None

    def unpin(self) -> None:
        """Gives the pinned weights back."""
        if self._pin:
            self._pin, self._selected = (), None
            self.select([])
            for unit in self._units:
                unit.pin({})

    # -- what the next forward uses ------------------------------------------------------------------------------------

    def path_of(self, adapter: Adapter) -> RowPath:
        """A function of the adapter and this replica's pin alone. Raises UnknownName for an expert that is not held."""
        if not adapter:
            return "plain"
        return "materialised" if adapter == self._pin else self._held.path_of(adapter)

    def select(self, adapters: Sequence[Adapter]) -> None:
        """One adapter for each row of the next batch, in order; no rows: every row of any batch is a base row.

        Raises UnknownName for an expert that is not held, InvalidRequest for weights off the simplex or a mixture of
        different kinds. What was selected before then stays.
        """
        adapters = tuple(adapters)
        if adapters == self._selected:
            self._selection.calls = 0
            return
        paths: dict[Adapter, RowPath] = {adapter: self.path_of(adapter) for adapter in dict.fromkeys(adapters)}
        for adapter, path in paths.items():
            if adapter and path == "plain":
                check_simplex(adapter)
        device = next(self._model.parameters()).device
        self._set(parts_of(adapters, paths, self._held, device), len(adapters) or None)
        self._selected = adapters
        self._executed = tuple((adapter, paths[adapter]) for adapter in adapters)

    def select_values(
        self, z: Float[Tensor, "rows values"], renormalise: bool = False, *, leading: bool = False
    ) -> None:
        """One flat z (all layers, in `spans` order) for each row of the next batch, or one for all of them.

        `leading`: of the leading values alone, in `leading_spans` order. Differentiable in z: this is what training and
        population search use.
        """
        layout = self._singular()
        if leading:
            changed, norm = layout.changed(z, renormalise)
            delta = Delta(None, Table(changed), leading=True, norm=None if norm is None else Table(norm))
            part = Part(deltas=[delta])
        else:
            self._held.check_whole(z.shape[1])
            scaled = layout.scaled(z, renormalise)
            if self._held.exact:
                part = Part("factors", table=Table(scaled))
            else:
                part = Part(deltas=[Delta(None, Table(scaled - layout.s))])
        self._set([part], None if len(z) == 1 else len(z))
        self._selected, self._executed = None, ()

    @property
    def executed(self) -> tuple[tuple[Adapter, RowPath], ...]:
        """Adapter and path of each selected row. Raises RuntimeError unless every layer ran since `select`."""
        if self._selection.calls < len(self._layers):
            raise RuntimeError(f"{self._selection.calls} of {len(self._layers)} expert layers ran since select")
        return self._executed

    @property
    def spans(self) -> Mapping[str, slice]:
        """Where each layer's singular values lie in a flat z."""
        return self._singular().spans(leading=False)

    @property
    def leading_spans(self) -> Mapping[str, slice]:
        """Where each layer's leading singular values lie in a flat z of the truncated kind."""
        return self._singular().spans(leading=True)

    def flat(self, expert: ExpertVectors, *, leading: bool = False) -> Float[Tensor, " values"]:
        """An expert's vectors laid out as `select_values` wants them; 1 where the expert has none."""
        return self._singular().flat(expert, leading)

    def _singular(self) -> SingularLayout:
        if self._layout is None:
            raise NotSupported("an expert vector on this backbone", "its settings name no expert layers")
        return self._layout

    def _set(self, parts: list[Part], num_rows: int | None) -> None:
        layers = [delta.low_rank.layers for part in parts for delta in part.deltas if delta.low_rank is not None]
        if any(part.weights == "pinned" for part in parts):
            layers.append(self._pinned_layers)
        now = self._selection
        now.parts, now.num_rows, now.calls = parts, num_rows, 0
        now.layers = frozenset().union(*layers)
        now.singular = any(part.weights == "factors" for part in parts) or any(
            delta.table is not None for part in parts for delta in part.deltas
        )

    # -- the model's layers --------------------------------------------------------------------------------------------

    def _wrap(self, name: str) -> ExpertLinear:
        """Puts an expert layer in the place of a linear one."""
        path = name.removesuffix(".weight")
        parent, _, leaf = path.rpartition(".")
        inner = self._model.get_submodule(path)
        shard = self._shards.get(name, LayerShard())
        place = None if self._layout is None else self._layout.places.get(name)
        factors = self._factors[name] if self._factors is not None and place is not None else None
        if factors is not None:
            cut = self.factors.shards.get(name)
            _check_shard(name, tuple(inner.weight.shape), factors, shard, cut, self._reduce)  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
            factors = factors if cut else cut_to(shard, factors)
        layer = ExpertLinear(name, inner, shard, self._reduce, self._selection, factors, place)
        layer.train(inner.training)
        setattr(self._model.get_submodule(parent) if parent else self._model, leaf, layer)
        self._layers[name] = layer
        self._units.append(layer)
        return layer

    def _fuse(self) -> None:
        """Puts a FusedMLP in the place of each gated block whose three layers are all factored, or none of them."""
        blocks = [(name, one) for name, one in self._model.named_modules() if type(one).__name__ in GATED]
        for name, block in blocks:
            names = [f"{name}.{leaf}.weight" for leaf in ("gate_proj", "up_proj", "down_proj")]
            factored = [one in self._layers for one in names]
            if any(factored) and not all(factored):
                continue
            gate, up, down = [self._layers.get(one) or self._wrap(one) for one in names]
            fused = FusedMLP(gate, up, down, block.act_fn, self._selection)  # pyright: ignore[reportArgumentType]
            fused.train(block.training)
            parent, _, leaf = name.rpartition(".")
            setattr(self._model.get_submodule(parent) if parent else self._model, leaf, fused)
            self._units = [one for one in self._units if one not in (gate, up, down)]
            self._units.append(fused)


def attach(
    model: nn.Module,
    factors: FactorSet | None = None,
    shards: Mapping[str, LayerShard] | None = None,
    reduce: Reduce | None = None,
    *,
    backbone: str | None = None,
    truncated_rank: int = TRUNCATED_RANK,
    max_composed_bytes: int = MAX_COMPOSED_BYTES,
) -> ExpertLayers:
    """Replaces the factored layers of `model`, and its gated feed-forward blocks, by ones on the same weights.

    After any sharding: `shards` says by parameter name how a layer was cut; one that is absent is whole. `reduce` sums
    over the ranks and is called once for each row-parallel layer and forward. Without `factors` the model can hold
    low-rank adapters only. `backbone` is the digest that they must be for. Raises InvalidSettings where a weight has
    not the shape that its shard says.
    """
    shards = shards or {}
    first = next(model.parameters())
    if factors is not None:
        factors = replace(factors, factors=dict(factors.factors))  # each layer is read once, if it comes from a file
        if factors.rank:
            truncated_rank = factors.rank
        first = model.get_parameter(next(iter(factors.factors)))
    held = HeldExperts(
        layout=None if factors is None else SingularLayout(factors, truncated_rank, first.device),
        shapes=linear_shapes(model, shards),
        shards=shards,
        backbone=backbone or (None if factors is None else factors.backbone),
        whole=factors is not None and not factors.rank,
        truncated_rank=truncated_rank,
        max_composed_bytes=max_composed_bytes,
        dtype=first.dtype,
        device=first.device,
    )
    return ExpertLayers(model, factors, shards, reduce, held)


def linear_shapes(model: nn.Module, shards: Mapping[str, LayerShard]) -> dict[str, tuple[int, int]]:
    """[out, in] of each linear layer as it was before it was cut, by parameter name; not the head's."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # pyright: ignore[reportCallIssue]
    shapes: dict[str, tuple[int, int]] = {}
    for path, module in model.named_modules():
        name = f"{path}.weight"
        if module is head or not (isinstance(module, nn.Linear) or name in shards):
            continue
        rows, columns = module.weight.shape  # pyright: ignore[reportCallIssue, reportGeneralTypeIssues]
        shard = shards.get(name, LayerShard())
        rows = sum(shard.sizes) if shard.kind == "column" else rows
        columns = sum(shard.sizes) if shard.kind == "row" else columns
        shapes[name] = (int(rows), int(columns))
    return shapes


def cut_to(shard: LayerShard, factors: SingularFactors) -> SingularFactors:
    """A rank's factors: `u` by rows for a column-parallel layer, `vh` by columns for a row-parallel one. Not copied."""
    rows, columns = shard.part_of(2)
    return SingularFactors(factors.u[rows], factors.s, factors.vh[:, columns])


def _check_shard(
    name: str,
    shape: tuple[int, int],
    factors: SingularFactors,
    shard: LayerShard,
    cut: LayerShard | None,
    reduce: Reduce | None,
) -> None:
    """`cut`: how the factors are cut already."""
    if cut is not None and cut != shard:
        raise InvalidSettings(f"shards[{name}]", shard, f"as its factors are cut: {cut}")
    rows, columns = len(factors.u), factors.vh.shape[1]
    if shard.kind != "whole" and cut is None:
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
