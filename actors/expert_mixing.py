"""Registers mixtures of experts: checked here once, then known everywhere by their digest."""

import asyncio
from collections.abc import Mapping
from typing import Protocol

from metasepia.errors import InvalidRequest
from metasepia.experts import ExpertVectors
from metasepia.mixing import adapter_of, added_up, check_same_kind, mixture_blob, mixture_digest
from metasepia.registry import SHARED, Artefact, Kind


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
    ) -> Artefact: ...


class ExpertMixing:
    """A plain class over a registry client; Serve or Ray makes an actor of it. Holds no state that could be lost."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue

    async def register(self, backbone: str, weights: Mapping[str, float], owner: str = SHARED) -> str:
        """The digest of the mixture, durable in the registry when this returns; the same mixture again changes nothing.

        `backbone` is a digest; `weights` on the simplex, by the name or digest of experts that `owner` can see. A row
        names the mixture by `adapter`. Raises UnknownName with the known experts; InvalidRequest off the simplex, for
        experts of another backbone, and for renormalised experts together with others.
        """
        adapter = adapter_of(weights)  # the simplex first: it costs no lookup
        found = await asyncio.gather(*(self._catalogue.resolve("expert", name, owner) for name, _ in adapter))
        names = [one.name for one in found]
        adapter = added_up((one.digest, weight) for one, (_, weight) in zip(found, adapter, strict=True))
        blobs = await asyncio.gather(*(self._catalogue.get(digest, owner) for digest, _ in adapter))
        experts = [ExpertVectors.from_bytes(blob, digest) for blob, (digest, _) in zip(blobs, adapter, strict=True)]
        for expert, (digest, _) in zip(experts, adapter, strict=True):
            if expert.backbone != backbone:
                raise InvalidRequest(
                    "weights", f"expert {digest} was made for backbone {expert.backbone}, not {backbone}"
                )
        check_same_kind(experts)
        card: dict[str, object] = {
            "kind": "mixture",
            "backbone": backbone,
            "factors": experts[0].factors,
            "adapter": [list(pair) for pair in adapter],
            "experts": sorted(set(names)),
        }
        digest = mixture_digest(adapter)
        await self._catalogue.put("mixture", mixture_blob(adapter), digest=digest, name=None, owner=owner, card=card)
        return digest
