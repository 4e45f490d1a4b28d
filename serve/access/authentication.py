"""Who may come in: the layer that asks for keys, and a gateway's copy of the registry's keys.

A request costs no call here (`metasepia.access.keyring` judges it); a task of its own exchanges with the registry every
`keys.sync_every_s`: what was used goes there, keys made and revoked come back. So a revocation is in force on every
gateway within that time and the time of one call, and on a gateway that cannot reach the registry after
`keys.max_silence_s`, when it lets nobody in. Expiry is by the registry's clock, which never goes back; a gateway
carries it on between two exchanges by its own steady clock, so a machine whose time is wrong judges no differently.

The secret goes no further than this layer: the header that holds it is taken out of what routes, logs and traces see.
"""

import asyncio
import contextlib
import contextvars
import logging
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Message, Receive, Send
from starlette.types import Scope as Connection

from actors import meters
from cluster.door_settings import KeySettings
from metasepia.access.keyring import Keyring, Limits
from metasepia.access.keys import Changes, Key, NewKey, Report, Usage
from metasepia.errors import Forbidden, MetasepiaError, QuotaExceeded, Unauthenticated, Unavailable
from serve.access.principal import Principal, asking
from serve.requests import failures
from serve.shared import Shared
from serve.telemetry import request_log

if TYPE_CHECKING:
    from serve.operations import Operation

logger = logging.getLogger(__name__)

EXCHANGE_TIMEOUT_S = 2.0
GIVES_BACK = (429, 503)
"""Answers of requests that do not count among a minute's: nothing was done, and they are meant to be sent again."""
FOR_SCRAPERS = ("GetMetrics", "GetStatus")
"""Operations that `keys.open_metrics` opens."""
_HEADER = b"authorization"


class KeyPart(Protocol):
    """The registry, as far as keys go; `metasepia.access.store.KeyStore` says what each call does."""

    async def create_key(self, new: NewKey) -> Key: ...
    async def revoke_key(self, id_: str) -> Key: ...
    async def get_key(self, id_: str) -> Key: ...
    async def list_keys(self, *, after: str = "", limit: int = 1000) -> Sequence[Key]: ...
    async def exchange_keys(self, report: Report, since: tuple[int, int, int] | None) -> Changes: ...
    async def usage(self, first_day: int, last_day: int, *, tenant: str | None, limit: int) -> Sequence[Usage]: ...


class Access:
    """One gateway's keys."""

    def __init__(self, settings: KeySettings, part: KeyPart) -> None:
        self.settings, self.part = settings, part
        self.keyring = Keyring(settings.requests_per_minute, settings.tokens_per_day)
        self._turn = asyncio.Lock()
        self._exchanging: asyncio.Task[None] | None = None
        self._heard = Shared(self.exchange)

    async def identify(self, header: str | None) -> Key:
        """The key of an Authorization header. Raises Unauthenticated, and Unavailable where the registry is silent."""
        await self._keep_up()
        scheme, _, text = (header or "").strip().partition(" ")
        if scheme.lower() != "bearer" or not text:
            raise Unauthenticated("this door asks for a key")
        return self.keyring.identify(text.strip())

    async def exchange(self) -> None:
        """With the registry, now. Raises Unavailable."""
        async with self._turn:
            report, since = self.keyring.report(), self.keyring.revision
            try:
                async with asyncio.timeout(EXCHANGE_TIMEOUT_S):  # wait_for would swallow a cancellation now and then
                    changes = await self.part.exchange_keys(report, since)
            except TimeoutError:
                raise Unavailable("the registry of keys", 1.0) from None
            self.keyring.take(changes)

    async def _keep_up(self) -> None:
        if self._exchanging is None or self._exchanging.done():
            # In a context of its own: it is no part of the request that happened to come first, nor of its trace.
            self._exchanging = asyncio.create_task(self._exchange_for_ever(), context=contextvars.Context())
        if self.keyring.revision is None or self.keyring.silence_s > self.settings.max_silence_s:
            await self._heard()  # a registry that is away costs all who wait one call's time, not one after another

    async def _exchange_for_ever(self) -> None:
        was_silent = False
        while True:
            await asyncio.sleep(self.settings.sync_every_s)
            try:
                await self.exchange()
                was_silent = False
            except Exception as error:
                if not was_silent:
                    logger.warning("keys: no word from the registry: %s", failures.unwrap(error))
                was_silent = True

    async def close(self) -> None:
        """Tells what has not been told."""
        if self._exchanging is not None:
            self._exchanging.cancel()
            with contextlib.suppress(MetasepiaError):
                await self.exchange()


class Authenticated:
    """ASGI around the routes: sets who asks, refuses who may not, counts and charges."""

    def __init__(self, app: ASGIApp, routes: "Sequence[tuple[Route, Operation]]", access: Access) -> None:
        """`routes` in the order in which paths are matched."""
        self._app, self._routes, self._access = app, tuple(routes), access
        self._fixed = {
            (method, route.path): (route, one)
            for route, one in reversed(self._routes)
            if "{" not in route.path
            for method in route.methods or ()
        }

    async def __call__(self, scope: Connection, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self._access.settings.required:
            await self._app(scope, receive, send)
            return
        route, operation = self._operation(scope)
        given = Headers(scope=scope).getlist("authorization")
        scope["headers"] = [pair for pair in scope["headers"] if pair[0].lower() != _HEADER]
        if operation is not None and self._is_open(operation):
            await self._app(scope, receive, send)
            return
        if route is not None:
            scope["route"] = route  # a refused request is counted under its route too
        key: Key | None = None
        keyring = self._access.keyring
        try:
            if len(given) > 1:
                raise Unauthenticated("more than one key came with this request")
            key = await self._access.identify(given[0] if given else None)
            principal = Principal(key.tenant, frozenset(key.scopes), key.id)
            request_log.note(tenant=key.tenant, key_id=key.id)
            if operation is not None and operation.scope is not None and not principal.may(operation.scope):
                raise Forbidden(operation.name, operation.scope)
            give_back = keyring.admit(key)
        except Exception as error:
            answer = failures.answer(error)
            meters.KEYS_REFUSED.inc(reason=_reason(error))
            headers = answer.headers | ({} if key is None else _told(keyring.limits(key)))
            await JSONResponse(answer.body, answer.failure.status, headers=headers)(scope, receive, send)
            return
        known = key

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                if message["status"] in GIVES_BACK:
                    give_back()
                told = _told(keyring.limits(known)).items()
                added = [(name.encode(), value.encode()) for name, value in told]
                message = {**message, "headers": [*message["headers"], *added]}
            await send(message)

        with asking(principal, lambda prompt, completion: keyring.charge(known, prompt, completion)):
            await self._app(scope, receive, counted)

    def _is_open(self, operation: "Operation") -> bool:
        return operation.scope is None or (self._access.settings.open_metrics and operation.name in FOR_SCRAPERS)

    def _operation(self, scope: Connection) -> "tuple[Route | None, Operation | None]":
        """What the router will take this request to. None: nothing, and it will say so to whoever has a key."""
        found = self._fixed.get((scope["method"], scope["path"])) if not scope.get("root_path") else None
        if found is not None:
            return found
        for route, operation in self._routes:
            if route.matches(scope)[0] is Match.FULL:
                return route, operation
        return None, None


def _told(limits: Limits) -> dict[str, str]:
    """OpenAI's headers: what the quotas are, what is left of them, when they begin anew."""
    told: dict[str, str] = {}
    for name, limit, remaining, reset_s in (
        ("requests", limits.requests, limits.remaining_requests, limits.reset_requests_s),
        ("tokens", limits.tokens, limits.remaining_tokens, limits.reset_tokens_s),
    ):
        if limit is not None:
            told[f"x-ratelimit-limit-{name}"] = str(limit)
            told[f"x-ratelimit-remaining-{name}"] = str(remaining)
            told[f"x-ratelimit-reset-{name}"] = _duration(reset_s)
    return told


def _duration(seconds: float) -> str:
    """As OpenAI writes it: 59s, 6m0s, 11h59m0s."""
    minutes, rest = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (f"{hours}h" if hours else "") + (f"{minutes}m" if hours or minutes else "") + f"{rest}s"


def _reason(error: Exception) -> str:
    for kind, reason in ((Unauthenticated, "key"), (Forbidden, "scope"), (QuotaExceeded, "quota")):
        if isinstance(error, kind):
            return reason
    return "unavailable"
