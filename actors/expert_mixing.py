"""Registers mixtures of experts: checked here once, then known everywhere by their digest."""

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from metasepia.errors import InvalidRequest, UnknownName
from metasepia.experts.lora import LoraAdapter, read_adapter
from metasepia.experts.mixing import (
    BASE,
    adapter_of,
    adapter_of_rows,
    added_up,
    base_of,
    check_same_kind,
    check_simplex,
    mixture_blob,
    mixture_digest,
)
from metasepia.experts.vectors import ExpertVectors, FactorIndex
from metasepia.registry.entries import SHARED, Artefact, Kind
from metasepia.rows import Adapter


class Catalogue(Protocol):
    """What is used of `actors.registry.RegistryClient`."""

    async def resolve(self, kind: Kind, name: str, owner: str) -> Artefact: ...
    async def get(self, digest: str, owner: str | None = None) -> bytes: ...
    async def put(
        self,
        kind: Kind,
        blob: bytes,
        *,
        digest: str,
        name: str | None,
        owner: str,
        card: dict[str, object] | None = None,
        replace: bool = True,
    ) -> Artefact: ...


class Layers(Protocol):
    """The factored layers behind a digest of factors; raises CorruptArtefact where they are not known here."""

    def __call__(self, factors: str) -> FactorIndex: ...


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """Experts of one backbone that can be mixed, as names were resolved."""

    named: tuple[tuple[str, str], ...]
    """(name, digest), the base among them where it was named."""
    factors: str | None
    """None for low-rank adapters."""
    bases: frozenset[str]
    """The base's digest, where it was named."""

    @property
    def digests(self) -> dict[str, str]:
        return dict(self.named)


class ExpertMixing:
    """A plain class over a registry client; Serve or Ray makes an actor of it. Holds no state that could be lost."""

    def __init__(self, catalogue: Catalogue, layers: Layers | None = None) -> None:
        """`layers` None: weights by layer are counted against each other only, not against the backbone."""
        self._catalogue, self._layers = catalogue, layers

    async def register(
        self,
        backbone: str,
        weights: Mapping[str, float | Sequence[float]],
        owner: str = SHARED,
        name: str | None = None,
    ) -> str:
        """The digest of the mixture, durable in the registry when this returns; the same mixture again changes nothing.

        `backbone` is a digest; `weights` on the simplex, by the name or digest of experts that `owner` can see, and
        `base` for the base model: numbers, or for each factored layer one. A row names the mixture by `adapter`; with
        a `name` it is found by that too.
        Raises UnknownName with the known experts; InvalidRequest off the simplex, for experts of another backbone, for
        renormalised experts together with others and low-rank adapters together with expert vectors.
        """
        adapter = adapter_of(weights)  # the simplex first: it costs no lookup
        found = await self.candidates(backbone, [one for one, _ in adapter], owner)
        mixed = added_up((found.digests[one], weight) for one, weight in adapter)
        by_layer = any(isinstance(weight, tuple) for _, weight in mixed)
        if by_layer and self._layers is not None and found.factors is not None:
            check_simplex(mixed, len(self._layers(found.factors).lengths))
        return await self.put(backbone, mixed, found, owner, name=name)

    async def candidates(self, backbone: str, names: Sequence[str], owner: str, param: str = "weights") -> Candidates:
        """What names stand for, once it is sure that they can be mixed. `param` is the field that complaints name.

        Raises UnknownName, and InvalidRequest as `register` does.
        """
        asked = [name for name in names if name != BASE]
        if not asked:
            raise InvalidRequest(param, f"{BASE} alone is the backbone itself; name an expert beside it")
        found = await asyncio.gather(*(self._catalogue.resolve("expert", name, owner) for name in asked))
        blobs = await asyncio.gather(*(self._catalogue.get(one.digest, owner) for one in found))
        experts = [read_adapter(blob, one.name) for blob, one in zip(blobs, found, strict=True)]
        for expert, one in zip(experts, found, strict=True):
            if expert.backbone != backbone:
                raise InvalidRequest(
                    param, f"expert {one.name} was made for backbone {expert.backbone}, not {backbone}"
                )
        try:
            check_same_kind(experts)
        except InvalidRequest as error:
            raise InvalidRequest(param, error.message) from None
        first = experts[0]
        named = [(name, one.digest) for name, one in zip(asked, found, strict=True)]
        bases: frozenset[str] = frozenset()
        if BASE in names:
            if not isinstance(first, ExpertVectors):
                raise InvalidRequest(param, f"{BASE} can be mixed with expert vectors, not with low-rank adapters")
            bases = frozenset({base_of(first).digest})
            named += [(BASE, digest) for digest in bases]
        factors = None if isinstance(first, LoraAdapter) else first.factors
        return Candidates(named=tuple(named), factors=factors, bases=bases)

    async def put(
        self,
        backbone: str,
        adapter: Adapter,
        candidates: Candidates,
        owner: str,
        facts: Mapping[str, object] | None = None,
        name: str | None = None,
    ) -> str:
        """Registers a mixture of candidates, with `facts` added to its card; without, a card that is there stays."""
        digest = mixture_digest(adapter)
        if facts is None and name is None:
            with contextlib.suppress(UnknownName):
                return (await self._catalogue.resolve("mixture", digest, owner)).digest
        names = {one: known for known, one in candidates.named}
        card: dict[str, object] = {
            "kind": "mixture",
            "backbone": backbone,
            "factors": candidates.factors,
            "adapter": [list(pair) for pair in adapter_of_rows(adapter, candidates.bases)],
            "experts": sorted(names[one] for one, _ in adapter),
            **(facts or {}),
        }
        await self._catalogue.put(
            "mixture",
            mixture_blob(adapter),
            digest=digest,
            name=name,
            owner=owner,
            card=card,
            replace=name is None,
        )
        return digest
