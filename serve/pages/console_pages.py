"""The console: one page, its style and its script, from the files of `console/`.

They hold nothing of the graph: the page asks the same routes as any client, with the key that its user types in.
"""

import hashlib
from pathlib import Path

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

FOLDER = Path(__file__).parent / "console"
_OWN_ONLY = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
_PAGE = _OWN_ONLY + ("script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; frame-src 'self'")
_FRAME = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'self'; "
    "sandbox allow-scripts"
)
"""Of the frame that shows pages of the graph's own making (the map of tasks): an origin of its own, and no network."""
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


class File:
    """One file, read once, answered with a validator: the browser asks again and is told in a few bytes."""

    def __init__(self, path: Path, policy: str) -> None:
        self._body = path.read_bytes()
        self._tag = f'"{hashlib.sha256(self._body).hexdigest()[:16]}"'
        self._headers = {
            "etag": self._tag,
            "cache-control": "no-cache",
            "content-security-policy": policy,
            "x-content-type-options": "nosniff",
            "referrer-policy": "no-referrer",
            "content-type": f"{_TYPES[path.suffix]}; charset=utf-8",
        }

    def answer(self, headers: Headers) -> Response:
        if self._tag in (one.strip() for one in headers.get("if-none-match", "").split(",")):
            return Response(status_code=304, headers=self._headers)
        return Response(self._body, headers=self._headers)


class Console:
    """ASGI around the check of keys: answers `/` and what its page asks for, to everyone; all else goes on."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._files = {
            "/" if path.name == "index.html" else f"/console/{path.name}": File(
                path, _FRAME if path.name == "frame.html" else _PAGE
            )
            for path in FOLDER.iterdir()
        }
        self._route = Route("/console", self)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        file = self._files.get(scope["path"]) if scope["type"] == "http" else None
        if file is None or scope["method"] not in ("GET", "HEAD"):
            await self._app(scope, receive, send)
            return
        scope["route"] = self._route  # counted as one
        await file.answer(Headers(scope=scope))(scope, receive, send)
