"""Model names, as clients spell them, to what answers: DESIGN section 8. Nothing falls back to the base weights.

<backbone>                the frozen model
<backbone>:<expert>       one expert
<backbone>:mix@<digest>   a registered mixture, by its digest or the name that it was given
<encoder>                 a text encoder (embeddings, classification)
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from actors import tracing
from metasepia.errors import CorruptArtefact, DeletedName, NotSupported, UnknownName
from metasepia.reasoning.named import PREFIX as CONTEXT
from metasepia.registry.entries import Artefact, Kind
from metasepia.rows import Adapter
from serve.access.principal import current
from serve.access.tenants import PerTenant
from serve.models.shelf import Shelf
from serve.parts import Backbone, Catalogue, TextEncoder

MIXTURE = "mix@"
AUTO = "auto"
NUM_KNOWN = 20
"""Experts, and as many mixtures, that an error about an unknown model names."""
_PAGE = 1000
_CONTEXT_FACTS = (
    *("input", "classes", "num_examples", "num_unlabelled", "encoder", "module", "protocol", "seed", "self_check"),
)


@dataclass(frozen=True)
class Chosen:
    """A name resolved: which backbone answers, with which adapter."""

    name: str
    backbone: Backbone
    adapter: Adapter = ()


class Names:
    """Resolves and lists the names of everything that is served."""

    def __init__(
        self,
        backbones: Sequence[Backbone],
        encoders: Sequence[TextEncoder],
        catalogue: Catalogue,
        auto_is_served: Callable[[], Awaitable[bool]],
    ) -> None:
        self.backbones: Mapping[str, Backbone] = {one.id: one for one in backbones}
        self.encoders: Mapping[str, TextEncoder] = {one.id: one for one in encoders}
        self._catalogue, self._auto_is_served = catalogue, auto_is_served
        self._created = int(time.time())
        self._experts = PerTenant(lambda owner: Shelf(catalogue, "expert", owner, self._adapter_entry))
        self._mixtures = PerTenant(lambda owner: Shelf(catalogue, "mixture", owner, self._adapter_entry))

    @tracing.spanned("resolve")
    async def resolve(self, model: str) -> Chosen:
        """The backbone and adapter of a model name that generates text.

        Raises UnknownName with known names, DeletedName, and NotSupported for an encoder's or a context's.
        """
        if model in self.backbones:
            return Chosen(model, self.backbones[model])
        if model in self.encoders:
            raise NotSupported(
                f"generating text with the encoder {model}", f"use one of {', '.join(self.backbones)} and its experts"
            )
        if model.startswith(CONTEXT):
            raise NotSupported(f"generating text or embedding with the context {model[:80]}", "send it to /v1/classify")
        backbone, artefact = await self._adapted(model)
        if artefact.kind == "mixture":
            return Chosen(model, backbone, adapter_of(artefact))
        return Chosen(model, backbone, ((artefact.digest, 1.0),))

    async def _adapted(self, model: str) -> tuple[Backbone, Artefact]:
        """The backbone and the expert or mixture of `<backbone>:<...>`: one look-up by name, however many there are.

        Raises UnknownName with known names, and DeletedName for what stood for something once.
        """
        backbone_id, colon, name = model.partition(":")
        if colon and backbone_id in self.backbones:
            backbone = self.backbones[backbone_id]
            kind: Kind = "mixture" if name.startswith(MIXTURE) else "expert"
            with contextlib.suppress(UnknownName):
                found = await self._catalogue.resolve(kind, name.removeprefix(MIXTURE), current().tenant, deleted=True)
                if found.card.get("backbone") == backbone.prepared.digest:
                    if found.deleted_unix_s is not None:
                        raise DeletedName("model", model, found.deleted_unix_s)
                    return backbone, found
        raise UnknownName("model", model[:200], await self.known_generating())

    async def known_generating(self) -> tuple[str, ...]:
        """Names that generate text: every backbone, and some of their experts and mixtures."""
        known = list(self.backbones)
        for shelves in (self._experts, self._mixtures):
            ids = [one["id"] for one in (await shelves.mine().all()).values() if one is not None]
            known += ids[:NUM_KNOWN]
            if len(ids) > NUM_KNOWN:
                known.append("and more (GET /v1/models)")
        return (*known, AUTO) if await self._auto_is_served() else tuple(known)

    async def one(self, model: str) -> dict[str, Any]:
        """A name that is no context's, as GET /v1/models/{id} has it. Raises UnknownName, DeletedName."""
        for entry in await self._parts():
            if entry["id"] == model:
                return entry
        _, artefact = await self._adapted(model)
        entry = self._adapter_entry(artefact)
        assert entry is not None  # its backbone is served
        return entry

    async def listing(self) -> list[dict[str, Any]]:
        """Everything served, as GET /v1/models has it: backbones, encoders, experts, mixtures, `auto`, contexts."""
        fixed, contexts = await asyncio.gather(self.fixed(), self._contexts())
        return fixed + [self.context(one) for one in contexts]

    def context(self, artefact: Artefact) -> dict[str, Any]:
        """A named context as GET /v1/models has it."""
        card: dict[str, Any] = artefact.card
        facts = {"kind": "context", "digest": artefact.digest}
        facts |= {name: card[name] for name in _CONTEXT_FACTS}
        return self._entry(CONTEXT + artefact.digest, artefact.digest, None, int(artefact.created_unix_s), facts)

    async def _contexts(self) -> list[Artefact]:
        """All of them, page by page."""
        found: list[Artefact] = []
        owner = current().tenant
        while True:
            page = await self._catalogue.list("context", owner, after=found[-1].name if found else "", limit=_PAGE)
            found += page
            if len(page) < _PAGE:
                return found

    async def fixed(self) -> list[dict[str, Any]]:
        """What GET /v1/models has without the contexts."""
        shelves = self._experts.mine(), self._mixtures.mine()
        parts, experts, mixtures = await asyncio.gather(self._parts(), shelves[0].all(), shelves[1].all())
        adapted = [one for one in (*experts.values(), *mixtures.values()) if one is not None]
        auto = [one for one in parts if one["id"] == AUTO]
        return [one for one in parts if one["id"] != AUTO] + adapted + auto

    async def _parts(self) -> list[dict[str, Any]]:
        """Backbones, encoders and `auto`."""
        infos = await asyncio.gather(*(one.info() for one in self.encoders.values()))
        models = [
            self._entry(one.id, one.prepared.source, None, self._created, _backbone_info(one))
            for one in self.backbones.values()
        ]
        for one, info in zip(self.encoders.values(), infos, strict=True):
            facts = {"kind": "encoder", "digest": info.digest, "width": info.width, "window": info.window}
            facts["modality"] = info.modality
            models.append(self._entry(one.id, one.id, None, self._created, facts))
        if await self._auto_is_served():
            facts = {"kind": "auto", "backbone": next(iter(self.backbones))}
            models.append(self._entry(AUTO, AUTO, None, self._created, facts))
        return models

    def _adapter_entry(self, artefact: Artefact) -> dict[str, Any] | None:
        """An expert or mixture; None where its backbone is not served here."""
        served = (one.id for one in self.backbones.values() if one.prepared.digest == artefact.card.get("backbone"))
        parent = next(served, None)
        if parent is None:
            return None
        name = f"{parent}:{MIXTURE if artefact.kind == 'mixture' else ''}{artefact.name}"
        facts = {"kind": artefact.kind, "digest": artefact.digest, "card": short_card(artefact.card)}
        return self._entry(name, artefact.digest, parent, int(artefact.created_unix_s), facts)

    def _entry(self, id_: str, root: str, parent: str | None, created: int, info: dict[str, Any]) -> dict[str, Any]:
        """vLLM's shape; what is ours stands under the one key `x_info`."""
        return {
            "id": id_,
            "object": "model",
            "created": created,
            "owned_by": "metasepia",
            "root": root,
            "parent": parent,
            "permission": [],
            "x_info": info,
        }


def adapter_of(mixture: Artefact) -> Adapter:
    """The experts and weights of a registered mixture, by its card."""
    weights = mixture.card.get("adapter")
    if not isinstance(weights, list):
        raise CorruptArtefact(f"mixture {mixture.digest}", "its card names no experts")
    return tuple(
        (str(digest), tuple(weight) if isinstance(weight, list) else float(weight)) for digest, weight in weights
    )


def _backbone_info(backbone: Backbone) -> dict[str, Any]:
    prepared = backbone.prepared
    return {
        "kind": "backbone",
        "digest": prepared.digest,
        "family": prepared.model_type,
        "window": prepared.window,
        "width": prepared.hidden_size,
    }


def short_card(card: Mapping[str, Any]) -> dict[str, Any]:
    """Without what `auto` reads alone: vectors that nobody reads in a list."""
    return {key: value for key, value in card.items() if key not in ("dispatch", "text_region")}
