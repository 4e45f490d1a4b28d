"""Experts at the door: registered, replaced, listed, given back, deleted. Names are pointers; digests are content.

Registered means durable, and usable on every replica at once: rows carry digests, and a rank that lacks one fetches it.
"""

import asyncio
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from cluster.door_settings import HttpSettings
from metasepia.digests import is_digest
from metasepia.errors import DeletedName, InvalidRequest, NotSupported, UnknownName
from metasepia.registry.entries import SHARED, Artefact, Kind
from serve.access.principal import current
from serve.contexts.named import number_of
from serve.experts.accepting import FIELDS, Accepted, Fits, accept
from serve.models.names import short_card
from serve.models.shelf import page_of
from serve.parts import Catalogue
from serve.requests.asked import deadline_of
from serve.requests.uploads import Uploads

SAID: dict[Kind, str] = {"expert": "registered expert", "mixture": "registered mixture"}
"""What errors call them; `serve.requests.failures` knows the fields by it."""


class Experts:
    """Answers the routes of /v1/experts."""

    def __init__(self, http: HttpSettings, fits: Mapping[str, Fits], catalogue: Catalogue) -> None:
        self._http, self._fits, self._catalogue = http, fits, catalogue
        self._uploads = Uploads(http.max_upload_mib)
        self._checking = asyncio.Semaphore(1)

    async def add(self, request: Request) -> Response:
        """POST /v1/experts"""
        return await self._register(request, None)

    async def replace(self, request: Request) -> Response:
        """PUT /v1/experts/{name}"""
        return await self._register(request, request.path_params["name"])

    async def _register(self, request: Request, name: str | None) -> Response:
        deadline = deadline_of(request, self._http)
        async with deadline.limit("reading the expert"):
            upload = await self._uploads.read(request, FIELDS)
        async with deadline.limit("registering the expert"):
            async with self._checking:  # one at a time: the others' bytes wait, and chats keep the other core
                accepted: Accepted = await asyncio.to_thread(accept, upload, name, self._fits)
            artefact = await self._catalogue.put(
                "expert",
                accepted.blob,
                digest=accepted.digest,
                name=accepted.name,
                owner=current().tenant,
                card=accepted.card,
                replace=name is not None,
            )
        return JSONResponse(self.entry(artefact))

    async def list(self, request: Request) -> Response:
        """GET /v1/experts"""
        query = request.query_params
        limit = number_of(query, "limit", 100, 1, 1000)
        async with deadline_of(request, self._http).limit("listing the experts"):
            return JSONResponse(await listing(self._catalogue, "expert", query.get("after", ""), limit, self.entry))

    async def get(self, request: Request) -> Response:
        """GET /v1/experts/{name}"""
        async with deadline_of(request, self._http).limit("reading the expert"):
            artefact = await find(self._catalogue, "expert", request.path_params["name"])
        return JSONResponse(self.entry(artefact) | {"card": artefact.card})

    async def content(self, request: Request) -> Response:
        """GET /v1/experts/{name}/content: the safetensors file."""
        async with deadline_of(request, self._http).limit("reading the expert"):
            artefact = await find(self._catalogue, "expert", request.path_params["name"])
            blob = await self._catalogue.get(artefact.digest)
        headers = {
            "content-disposition": f'attachment; filename="{artefact.name}.safetensors"',
            "etag": f'"{artefact.digest}"',
        }
        return Response(blob, media_type="application/octet-stream", headers=headers)

    async def delete(self, request: Request) -> Response:
        """DELETE /v1/experts/{name}; a second time the same answer."""
        async with deadline_of(request, self._http).limit("deleting the expert"):
            return JSONResponse(await delete(self._catalogue, "expert", request.path_params["name"]))

    def entry(self, artefact: Artefact) -> dict[str, Any]:
        """An expert as every route shows it; `model` is null where its backbone is not served here."""
        card: dict[str, Any] = artefact.card
        backbone = next((one.id for one in self._fits.values() if one.prepared.digest == card.get("backbone")), None)
        return {
            "id": artefact.name,
            "object": "expert",
            "created": int(artefact.created_unix_s),
            "model": backbone and f"{backbone}:{artefact.name}",
            "digest": artefact.digest,
            "owner": artefact.owner,
            "form": card.get("form"),
            "backbone": backbone,
            "backbone_digest": card.get("backbone"),
            "factors_digest": card.get("factors"),
            "renormalise": card.get("renormalise"),
            "parameters": card.get("parameters"),
            "num_layers": card.get("num_layers"),
            "rank": card.get("rank"),
            "bytes": artefact.num_bytes,
            "description": short_card(card).get("description"),
        }


async def find(catalogue: Catalogue, kind: Kind, name: str) -> Artefact:
    """What a name or digest stands for now. Raises UnknownName, and DeletedName for what it stood for once."""
    try:
        found = await catalogue.resolve(kind, name, current().tenant, deleted=True)
    except UnknownName as error:
        raise UnknownName(SAID[kind], name[:80], error.known) from None
    if found.deleted_unix_s is not None:
        raise DeletedName(SAID[kind], name, found.deleted_unix_s)
    return found


async def listing(catalogue: Catalogue, kind: Kind, after: str, limit: int, entry: Any) -> dict[str, Any]:
    """A page in order of names, as OpenAI's lists are."""
    found, has_more = await page_of(catalogue, kind, current().tenant, after, limit)
    data = [entry(one) for one in found]
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": has_more,
    }


async def delete(catalogue: Catalogue, kind: Kind, name: str) -> dict[str, Any]:
    """Takes a name of the tenant's away. Raises UnknownName, and NotSupported for what comes with the package."""
    if kind == "expert" and is_digest(name):
        raise InvalidRequest("name", "delete an expert by its name; a digest may have several")
    try:
        found = await find(catalogue, kind, name)
        if found.owner == SHARED:
            raise NotSupported(
                f"deleting the {kind} {name}, which comes with the package,",
                "register one of your own under this name: it hides the other",
            )
        when = (await catalogue.delete(kind, name, current().tenant)).deleted_unix_s
    except DeletedName as error:
        when = error.deleted_unix_s
    return {"id": name, "object": f"{kind}.deleted", "deleted": True, "deleted_at": int(when or 0)}
