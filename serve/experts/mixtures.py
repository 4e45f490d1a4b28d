"""Registered mixtures at the door: listed, shown, deleted. Made by POST /v1/mixtures and by a search."""

from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from cluster.door_settings import HttpSettings
from metasepia.registry.entries import Artefact
from serve.contexts.named import number_of
from serve.experts.registered import delete, find, listing
from serve.models.names import MIXTURE
from serve.parts import Backbone, Catalogue
from serve.requests.asked import deadline_of

_OWN_FACTS = ("kind", "backbone", "factors", "adapter", "experts")


class Mixtures:
    """Answers the routes of /v1/mixtures that make nothing."""

    def __init__(self, http: HttpSettings, backbones: Mapping[str, Backbone], catalogue: Catalogue) -> None:
        self._http, self._backbones, self._catalogue = http, backbones, catalogue

    async def list(self, request: Request) -> Response:
        """GET /v1/mixtures"""
        query = request.query_params
        limit = number_of(query, "limit", 100, 1, 1000)
        async with deadline_of(request, self._http).limit("listing the mixtures"):
            after = query.get("after", "").removeprefix(MIXTURE)
            return JSONResponse(await listing(self._catalogue, "mixture", after, limit, self.entry))

    async def get(self, request: Request) -> Response:
        """GET /v1/mixtures/{digest}"""
        async with deadline_of(request, self._http).limit("reading the mixture"):
            artefact = await find(self._catalogue, "mixture", _name(request))
        card = {key: value for key, value in artefact.card.items() if key not in _OWN_FACTS}
        return JSONResponse(self.entry(artefact) | {"card": card})

    async def delete(self, request: Request) -> Response:
        """DELETE /v1/mixtures/{digest}; a second time the same answer. Its experts stay."""
        async with deadline_of(request, self._http).limit("deleting the mixture"):
            return JSONResponse(await delete(self._catalogue, "mixture", _name(request)))

    def entry(self, artefact: Artefact) -> dict[str, Any]:
        """A mixture as every route shows it; `model` is null where its backbone is not served here."""
        card: dict[str, Any] = artefact.card
        served = (one.id for one in self._backbones.values() if one.prepared.digest == card.get("backbone"))
        backbone = next(served, None)
        return {
            "id": artefact.name,
            "object": "mixture",
            "created": int(artefact.created_unix_s),
            "model": backbone and f"{backbone}:{MIXTURE}{artefact.name}",
            "digest": artefact.digest,
            "owner": artefact.owner,
            "backbone": backbone,
            "backbone_digest": card.get("backbone"),
            "experts": card.get("experts"),
            "weights": [{"digest": digest, "weight": weight} for digest, weight in card.get("adapter", ())],
        }


def _name(request: Request) -> str:
    return request.path_params["digest"].removeprefix(MIXTURE)
