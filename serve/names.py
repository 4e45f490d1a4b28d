"""Model names, as clients spell them, to what answers: DESIGN section 8. Nothing falls back to the base weights.

<backbone>                the frozen model
<backbone>:<expert>       one expert
<backbone>:mix@<digest>   a registered mixture
<encoder>                 a text encoder (embeddings, classification)
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from metasepia.digests import is_digest
from metasepia.errors import CorruptArtefact, NotSupported, UnknownName
from metasepia.reasoning.named import PREFIX as CONTEXT
from metasepia.registry import SHARED, Artefact
from metasepia.rows import Adapter
from serve.parts import Backbone, Catalogue, TextEncoder

OWNER = "local"
"""Owner of what clients make, while the door has no keys."""
MIXTURE = "mix@"
AUTO = "auto"
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

    async def resolve(self, model: str) -> Chosen:
        """The backbone and adapter of a model name that generates text.

        Raises UnknownName with the known names, NotSupported for an encoder's.
        """
        if model in self.backbones:
            return Chosen(model, self.backbones[model])
        if model in self.encoders:
            raise NotSupported(
                f"generating text with the encoder {model}", f"use one of {', '.join(self.backbones)} and its experts"
            )
        if model.startswith(CONTEXT):
            raise NotSupported(f"generating text or embedding with the context {model[:80]}", "send it to /v1/classify")
        backbone_id, colon, expert = model.partition(":")
        if not colon or backbone_id not in self.backbones:
            raise UnknownName("model", model, await self.known_generating())
        backbone = self.backbones[backbone_id]
        try:
            if expert.startswith(MIXTURE):
                return Chosen(model, backbone, await self._mixture(backbone, expert.removeprefix(MIXTURE)))
            artefact = await self._catalogue.resolve("expert", expert, SHARED)
        except UnknownName:
            raise UnknownName("model", model, await self.known_generating()) from None
        if artefact.card.get("backbone") != backbone.prepared.digest:
            raise UnknownName("model", model, await self.known_generating())
        return Chosen(model, backbone, ((artefact.digest, 1.0),))

    async def known_generating(self) -> tuple[str, ...]:
        """Names that generate text."""
        return tuple(one["id"] for one in await self.fixed() if one["id"] not in self.encoders)

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
        while True:
            page = await self._catalogue.list("context", OWNER, after=found[-1].name if found else "", limit=_PAGE)
            found += page
            if len(page) < _PAGE:
                return found

    async def fixed(self) -> list[dict[str, Any]]:
        """What GET /v1/models has without the contexts, of which there may be thousands."""
        experts, mixtures, infos = await asyncio.gather(
            self._catalogue.list("expert", SHARED),
            self._catalogue.list("mixture", SHARED),
            asyncio.gather(*(one.info() for one in self.encoders.values())),
        )
        models = [
            self._entry(one.id, one.prepared.source, None, self._created, _backbone_info(one))
            for one in self.backbones.values()
        ]
        for one, info in zip(self.encoders.values(), infos, strict=True):
            facts = {"kind": "encoder", "digest": info.digest, "width": info.width, "window": info.window}
            facts["modality"] = info.modality
            models.append(self._entry(one.id, one.id, None, self._created, facts))
        ids = {one.prepared.digest: one.id for one in self.backbones.values()}
        for artefact in [*experts, *mixtures]:
            parent = ids.get(str(artefact.card.get("backbone")))
            if parent is not None:
                prefix = MIXTURE if artefact.kind == "mixture" else ""
                name = f"{parent}:{prefix}{artefact.digest if prefix else artefact.name}"
                facts = {"kind": artefact.kind, "digest": artefact.digest, "card": _short_card(artefact.card)}
                models.append(self._entry(name, artefact.digest, parent, int(artefact.created_unix_s), facts))
        if await self._auto_is_served():
            facts = {"kind": "auto", "backbone": next(iter(self.backbones))}
            models.append(self._entry(AUTO, AUTO, None, self._created, facts))
        return models

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

    async def _mixture(self, backbone: Backbone, digest: str) -> Adapter:
        if not is_digest(digest):
            raise UnknownName("mixture", digest[:80], ())
        artefact = await self._catalogue.resolve("mixture", digest, SHARED)
        return adapter_of(artefact, backbone.prepared.digest)


def adapter_of(mixture: Artefact, backbone: str) -> Adapter:
    """The experts and weights of a registered mixture. Raises UnknownName when it is another backbone's."""
    if mixture.card.get("backbone") != backbone:
        raise UnknownName("mixture", mixture.digest, ())
    weights = mixture.card.get("adapter")
    if not isinstance(weights, list):
        raise CorruptArtefact(f"mixture {mixture.digest}", "its card names no experts")
    return tuple((str(digest), float(weight)) for digest, weight in weights)


def _backbone_info(backbone: Backbone) -> dict[str, Any]:
    prepared = backbone.prepared
    return {
        "kind": "backbone",
        "digest": prepared.digest,
        "family": prepared.model_type,
        "window": prepared.window,
        "width": prepared.hidden_size,
    }


def _short_card(card: Mapping[str, Any]) -> dict[str, Any]:
    """Without the dispatch centroid: two vectors of the hidden size that nobody reads in a list."""
    return {key: value for key, value in card.items() if key != "dispatch"}
