"""The experts that a model's expert layers hold, and what mixtures of them come to.

An expert costs its vectors (a low-rank adapter: its matrices) and nothing in the layers. Composed mixtures are kept
ready within a budget of bytes, the least recently used leaves first.
"""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from metasepia.digests import short
from metasepia.errors import CorruptArtefact, InvalidRequest, NotSupported, UnknownName
from metasepia.experts.lora import LoraAdapter
from metasepia.experts.low_rank import LowRankStack, Pairs
from metasepia.experts.mixing import check_simplex
from metasepia.experts.singular import SingularLayout
from metasepia.experts.vectors import ExpertVectors
from metasepia.models.shards import LayerShard
from metasepia.rows import Adapter
from metasepia.rows import Path as RowPath


@dataclass(frozen=True)
class Composed:
    """A mixture as its rows use it."""

    values: Tensor
    """n s z of all values, or n s (z - 1) of the leading ones."""
    norm: Float[Tensor, " layers"] | None
    """n, of a mixture on the leading values."""

    @property
    def num_bytes(self) -> int:
        return self.values.nbytes + (0 if self.norm is None else self.norm.nbytes)


@dataclass(frozen=True)
class _Vectors:
    z: Tensor
    """Flat, of all singular values or of the leading ones."""
    leading: bool
    renormalise: bool

    @property
    def num_bytes(self) -> int:
        return self.z.nbytes


@dataclass(frozen=True)
class _LowRank:
    pairs: Pairs
    rank: int

    @property
    def num_bytes(self) -> int:
        return sum(a.nbytes + b.nbytes for a, b in self.pairs.values())


PreparedExpert = _Vectors | _LowRank
"""An expert as it is held: checked, and on the layers' device."""


class HeldExperts:
    """Experts by digest. The base as an expert, in both forms, is held always and costs nothing."""

    def __init__(
        self,
        *,
        layout: SingularLayout | None,
        shapes: Mapping[str, tuple[int, int]],
        shards: Mapping[str, LayerShard],
        backbone: str | None,
        whole: bool,
        truncated_rank: int,
        max_composed_bytes: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """`shapes`: whole linear layers by parameter name, that low-rank adapters may be for, cut as `shards` say.

        Without `whole` there are factors of the leading `truncated_rank` values only.
        """
        self.layout, self.shapes = layout, shapes
        self._shards, self._backbone = shards, backbone
        self._whole, self._truncated_rank, self._max_composed_bytes = whole, truncated_rank, max_composed_bytes
        self._dtype, self._device = dtype, device
        self.exact = dtype in (torch.float32, torch.float64)
        self._held: dict[str, _Vectors | _LowRank] = {}
        self._bytes: dict[str, int] = {}
        self._identities: dict[str, bool] = {}
        if layout is not None:
            for renormalise in (False, True):
                one = ExpertVectors.identity(layout.index.backbone, layout.index.digest, renormalise)
                self._identities[one.digest] = renormalise
        self._composed: OrderedDict[object, Composed | LowRankStack] = OrderedDict()
        self._composed_bytes = 0

    def __contains__(self, digest: str) -> bool:
        return digest in self._held or digest in self._identities

    @property
    def digests(self) -> tuple[str, ...]:
        """What was put and not dropped; the base is not among them."""
        return tuple(sorted(self._held))

    @property
    def num_bytes(self) -> int:
        return sum(self._bytes.values())

    def prepare(self, digest: str, expert: ExpertVectors | LoraAdapter) -> PreparedExpert:
        """Checks an expert and lays it out, and changes nothing: any thread may.

        Raises CorruptArtefact when it is not the expert of this digest or does not fit this model.
        """
        if expert.digest != digest:
            raise CorruptArtefact(f"expert {short(digest)}", f"its content has digest {short(expert.digest)}")
        return self._low_rank(expert) if isinstance(expert, LoraAdapter) else self._vectors(expert)

    def insert(self, digest: str, prepared: PreparedExpert) -> None:
        if digest not in self:
            self._held[digest], self._bytes[digest] = prepared, prepared.num_bytes

    def drop(self, digest: str) -> bool:
        """Whether it was held."""
        if self._held.pop(digest, None) is None:
            return False
        del self._bytes[digest]
        for key in [key for key in self._composed if digest in _digests_in(key)]:
            self._composed_bytes -= self._composed.pop(key).num_bytes
        return True

    def layers_of(self, adapter: Adapter) -> frozenset[str]:
        """The layers that a low-rank mixture changes."""
        return frozenset(name for digest, _ in adapter for name in self._pairs(digest))

    def path_of(self, adapter: Adapter) -> RowPath:
        """The path of an adapter where nothing is pinned. Raises UnknownName for an expert that is not held."""
        for digest, _ in adapter:
            if digest not in self:
                raise UnknownName("expert", digest, self.digests)
        held = [self._held[digest] for digest, _ in adapter if digest not in self._identities]
        if not held:
            return "plain"
        if any(isinstance(one, _LowRank) for one in held):
            if not all(isinstance(one, _LowRank) for one in held):
                raise InvalidRequest("weights", "expert vectors and low-rank adapters cannot be mixed; choose one kind")
            return "lora"
        return "truncated" if all(isinstance(one, _Vectors) and one.leading for one in held) else "factors"

    def compose(self, adapter: Adapter, path: RowPath) -> Composed:
        """What the rows of a singular adapter use, from what is kept or made now.

        Raises InvalidRequest for weights off the simplex, and for renormalised experts together with others.
        """
        ready = self._recall(adapter)
        if isinstance(ready, Composed):
            return ready
        assert self.layout is not None
        check_simplex(adapter, len(self.layout.places))
        leading = path == "truncated"
        kinds: set[bool] = set()
        z = torch.zeros(self.layout.spans(leading)[next(reversed(self.layout.places))].stop, device=self._device)
        for digest, weight in sorted(adapter, key=lambda pair: pair[0]):
            share = self.layout.by_layer(weight, leading) if isinstance(weight, tuple) else weight
            one = self._held.get(digest)
            if one is None:
                kinds.add(self._identities[digest])
                z += share
                continue
            assert isinstance(one, _Vectors)
            kinds.add(one.renormalise)
            z += share * (one.z if leading or not one.leading else self.layout.whole(one.z))
        if len(kinds) > 1:
            raise InvalidRequest("weights", "renormalised experts cannot be mixed with others; choose one kind")
        if leading:
            composed = Composed(*self.layout.changed(z, kinds.pop()))
        else:
            scaled = self.layout.scaled(z, kinds.pop())
            composed = Composed(scaled if self.exact else scaled - self.layout.s, None)
        self._remember(adapter, composed)
        return composed

    def stack(self, adapters: tuple[Adapter, ...]) -> LowRankStack:
        """Several low-rank adapters to be multiplied together. Raises InvalidRequest for weights that cannot be."""
        ready = self._recall(adapters)
        if isinstance(ready, LowRankStack):
            return ready
        parts: list[list[tuple[float, Pairs]]] = []
        for adapter in adapters:
            check_simplex(adapter)
            shares: list[tuple[float, Pairs]] = []
            for digest, weight in sorted(adapter, key=lambda pair: pair[0]):
                if isinstance(weight, tuple):
                    raise InvalidRequest("weights", "low-rank adapters are mixed by one weight each, not by layer")
                shares.append((weight, self._pairs(digest)))
            parts.append(shares)
        stack = LowRankStack(parts)
        self._remember(adapters, stack)
        return stack

    def check_whole(self, rank: int) -> None:
        """Raises NotSupported where the factors do not reach beyond the leading values."""
        if not self._whole:
            raise NotSupported(
                f"an expert of {rank} singular values",
                f"this backbone keeps the factors of the leading {self._truncated_rank}; truncate the expert to them",
            )

    def rank(self, adapter: Adapter) -> int:
        """Ranks that a low-rank mixture takes in a stack."""
        return sum(one.rank for digest, _ in adapter if isinstance(one := self._held.get(digest), _LowRank))

    def _pairs(self, digest: str) -> Pairs:
        held = self._held.get(digest)
        return held.pairs if isinstance(held, _LowRank) else {}

    def _vectors(self, expert: ExpertVectors) -> _Vectors:
        if self.layout is None:
            raise NotSupported("an expert vector on this backbone", "its settings name no expert layers")
        expert.check_fits(self.layout.index)
        leading = expert.is_truncated(self.layout.index) and expert.rank <= self._truncated_rank
        if not leading:
            self.check_whole(expert.rank)
        z = self.layout.flat(expert, leading)
        if expert.renormalise:
            for name, total in zip(self.layout.places, self.layout.nuclear_sums(z, leading).tolist(), strict=True):
                if not total > 0:
                    raise CorruptArtefact(
                        f"expert {short(expert.digest)}", f"{name}: sum(s z) is {total:g}, not positive"
                    )
        return _Vectors(z, leading, expert.renormalise)

    def _low_rank(self, adapter: LoraAdapter) -> _LowRank:
        if self._backbone is not None and adapter.backbone != self._backbone:
            raise CorruptArtefact(
                f"adapter {short(adapter.digest)}",
                f"it was made for backbone {short(adapter.backbone)} and this one is {short(self._backbone)}",
            )
        adapter.check_fits(self.shapes)
        pairs: dict[str, tuple[Tensor, Tensor]] = {}
        for name in adapter.a:
            shard = self._shards.get(name, LayerShard())
            a, b = torch.tensor(adapter.a[name]), torch.tensor(adapter.b[name])
            a = a[:, shard.span] if shard.kind == "row" else a
            b = b[shard.span] if shard.kind == "column" else b
            pairs[name] = (a.to(self._device, self._dtype), b.to(self._device, self._dtype))
        return _LowRank(pairs, adapter.rank)

    def _recall(self, key: object) -> Composed | LowRankStack | None:
        if key not in self._composed:
            return None
        self._composed.move_to_end(key)
        return self._composed[key]

    def _remember(self, key: object, made: Composed | LowRankStack) -> None:
        self._composed[key] = made
        self._composed_bytes += made.num_bytes
        while self._composed_bytes > self._max_composed_bytes and len(self._composed) > 1:
            self._composed_bytes -= self._composed.popitem(last=False)[1].num_bytes


def _digests_in(key: object) -> set[str]:
    """Of an adapter, or of several: pairs of a digest and a weight, however deep."""
    if not isinstance(key, tuple):
        return set()
    if len(key) == 2 and isinstance(key[0], str):
        return {key[0]}
    return set().union(*[_digests_in(one) for one in key])
