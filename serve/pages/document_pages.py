"""GET /openapi.json and GET /docs: the door's document, and a page that shows it with nothing from any network."""

import hashlib
import json
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from serve.pages.console_pages import File

FOLDER = Path(__file__).parent / "docs"
_POLICY = (
    "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; script-src 'self'; "
    "style-src 'self'; connect-src 'self'; img-src 'self'"
)


class Documented:
    """ASGI around the check of keys: what can be asked is told to everyone; all else goes on."""

    def __init__(self, app: ASGIApp, document: Callable[[], Mapping[str, Any]]) -> None:
        """`document` is called when somebody asks for it first."""
        self._app, self._make = app, document
        self._files = {
            "/docs" if path.name == "index.html" else f"/docs/{path.name}": File(path, _POLICY)
            for path in FOLDER.iterdir()
        }
        self._routes = {"/openapi.json": Route("/openapi.json", self)} | dict.fromkeys(
            self._files, Route("/docs", self)
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        if scope["type"] != "http" or path not in self._routes or scope["method"] not in ("GET", "HEAD"):
            await self._app(scope, receive, send)
            return
        scope["route"] = self._routes[path]
        headers = Headers(scope=scope)
        answer = self._document(headers) if path == "/openapi.json" else self._files[path].answer(headers)
        await answer(scope, receive, send)

    @cached_property
    def _text(self) -> tuple[bytes, str]:
        body = json.dumps(self._make(), ensure_ascii=False, separators=(",", ":")).encode()
        return body, f'"{hashlib.sha256(body).hexdigest()[:16]}"'

    def _document(self, headers: Headers) -> Response:
        body, tag = self._text
        told = {"etag": tag, "cache-control": "no-cache", "access-control-allow-origin": "*"}
        if tag in (one.strip() for one in headers.get("if-none-match", "").split(",")):
            return Response(status_code=304, headers=told)
        return Response(body, media_type="application/json", headers=told)
