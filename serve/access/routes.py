"""Keys at the door: made, listed, revoked; and what they have used, by day.

For those who run it (scope `admin`), except that every tenant may read its own usage.
"""

from collections.abc import Mapping
from datetime import UTC, date, datetime, timedelta
from typing import Annotated, Any

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from cluster.door_settings import HttpSettings
from metasepia.access.keys import Key, NewKey, Scope, Usage, mint
from metasepia.errors import Forbidden, InvalidRequest, NotSupported
from serve.access.authentication import Access
from serve.access.principal import current
from serve.contexts.named import number_of
from serve.requests.asked import Asked, deadline_of
from serve.requests.schemas import Text, _Body

PATH = "/v1/keys"
_EPOCH = date(1970, 1, 1)
_DAYS = 30
"""Days of usage that are told where none are named."""
_NO_STORE = {"cache-control": "no-store"}


class KeyRequest(_Body):
    """POST /v1/keys: a key for a tenant."""

    tenant: Text
    """Owner of what its requests make: `[a-z0-9][a-z0-9._-]{0,63}`."""
    scopes: list[Scope] = Field(min_length=1)
    label: str = ""
    """For people; shown in lists."""
    expires_in_s: Annotated[float, Field(allow_inf_nan=False)] | None = None
    """Null: it does not expire."""
    requests_per_minute: int | None = None
    """0: no limit. Null: the settings' limit."""
    tokens_per_day: int | None = None
    """0: no limit. Null: the settings' limit."""

    def check(self, id_: str, sha256: bytes) -> NewKey:
        """Raises InvalidRequest naming the field."""
        return NewKey(
            id=id_,
            sha256=sha256,
            tenant=self.tenant,
            scopes=tuple(self.scopes),
            label=self.label,
            lifetime_s=self.expires_in_s,
            requests_per_minute=self.requests_per_minute,
            tokens_per_day=self.tokens_per_day,
        ).check()


class KeyRoutes:
    """Answers the routes of /v1/keys, and /v1/usage."""

    def __init__(self, http: HttpSettings, access: Access) -> None:
        self._http, self._access = http, access

    async def create(self, request: Request) -> Response:
        """POST /v1/keys: the only answer that has the secret."""
        self._check_served()
        asked = await Asked.of(request, self._http)
        id_, text, sha256 = mint()
        new = KeyRequest.of(asked.tree).check(id_, sha256)
        async with asked.deadline.limit("making the key"):
            key = await self._access.part.create_key(new)
            await self._access.exchange()  # good at once here, on other gateways with their next exchange
        return JSONResponse(self._json(key) | {"key": text}, headers=_NO_STORE)

    async def list(self, request: Request) -> Response:
        """GET /v1/keys: a page in order of id, dead ones too."""
        self._check_served()
        limit = number_of(request.query_params, "limit", 100, 1, 1000)
        async with deadline_of(request, self._http).limit("listing the keys"):
            found = await self._access.part.list_keys(after=request.query_params.get("after", ""), limit=limit + 1)
        data = [self._json(one) for one in found[:limit]]
        return JSONResponse(
            {
                "object": "list",
                "data": data,
                "first_id": data[0]["id"] if data else None,
                "last_id": data[-1]["id"] if data else None,
                "has_more": len(found) > limit,
            }
        )

    async def get(self, request: Request) -> Response:
        """GET /v1/keys/{id}"""
        self._check_served()
        async with deadline_of(request, self._http).limit("reading the key"):
            return JSONResponse(self._json(await self._access.part.get_key(request.path_params["id"])))

    async def revoke(self, request: Request) -> Response:
        """DELETE /v1/keys/{id}; a second time the same answer."""
        self._check_served()
        async with deadline_of(request, self._http).limit("revoking the key"):
            key = await self._access.part.revoke_key(request.path_params["id"])
            await self._access.exchange()
        assert key.revoked_unix_s is not None  # that is what was asked
        gone = {"id": key.id, "object": "key.deleted", "deleted": True, "deleted_at": int(key.revoked_unix_s)}
        return JSONResponse(gone)

    async def usage(self, request: Request) -> Response:
        """GET /v1/usage: of the key's own tenant; `admin` sees every tenant's."""
        self._check_served()
        query, asking = request.query_params, current()
        tenant = query.get("tenant", None if asking.may("admin") else asking.tenant)
        if tenant != asking.tenant and not asking.may("admin"):
            raise Forbidden("GetUsage of another tenant", "admin")
        today = datetime.fromtimestamp(self._access.keyring.now(), UTC).date()
        last = _day_of(query, "to", today)
        first = _day_of(query, "from", last - timedelta(days=_DAYS))
        limit = number_of(query, "limit", 1000, 1, 10_000)
        async with deadline_of(request, self._http).limit("reading the ledger"):
            await self._access.exchange()  # what this gateway has not told yet
            found = await self._access.part.usage(
                (first - _EPOCH).days, (last - _EPOCH).days, tenant=tenant, limit=limit + 1
            )
        data = [_usage_json(one) for one in found[:limit]]
        return JSONResponse({"object": "list", "data": data, "has_more": len(found) > limit})

    def _check_served(self) -> None:
        if not self._access.settings.required:
            raise NotSupported(
                "working with keys", "this door asks for none; set keys.required, and make the first by actors.keys"
            )

    def _json(self, key: Key) -> dict[str, Any]:
        """A key as every route shows it; never its secret."""
        settings, until = self._access.settings, key.expires_unix_s
        requests, tokens = key.requests_per_minute, key.tokens_per_day
        return {
            "id": key.id,
            "object": "key",
            "created": int(key.created_unix_s),
            "tenant": key.tenant,
            "scopes": list(key.scopes),
            "label": key.label,
            "status": key.status(self._access.keyring.now()),
            "expires": None if until is None else int(until),
            "revoked": None if key.revoked_unix_s is None else int(key.revoked_unix_s),
            "requests_per_minute": (settings.requests_per_minute if requests is None else requests) or None,
            "tokens_per_day": (settings.tokens_per_day if tokens is None else tokens) or None,
        }


def _usage_json(usage: Usage) -> dict[str, Any]:
    return {
        "object": "usage",
        "day": (_EPOCH + timedelta(days=usage.day)).isoformat(),
        "key": usage.key,
        "tenant": usage.tenant,
        "requests": usage.requests,
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def _day_of(query: Mapping[str, str], name: str, default: date) -> date:
    text = query.get(name)
    try:
        return default if text is None else date.fromisoformat(text)
    except ValueError:
        raise InvalidRequest(name, f"must be a day like 2026-01-31, got {text!r:.40}") from None
