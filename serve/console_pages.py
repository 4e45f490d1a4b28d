"""The console: one page, its style and its script, from the files of `console/`.

They hold nothing of the graph: the page asks the same routes as any client, with the key that its user types in.
"""

import hashlib
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

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
        tag = hashlib.sha256(self._body).hexdigest()[:16]
        self._headers = {
            "etag": f'"{tag}"',
            "cache-control": "no-cache",
            "content-security-policy": policy,
            "x-content-type-options": "nosniff",
            "referrer-policy": "no-referrer",
            "content-type": f"{_TYPES[path.suffix]}; charset=utf-8",
        }

    async def __call__(self, request: Request) -> Response:
        known = request.headers.get("if-none-match", "")
        if self._headers["etag"] in (one.strip() for one in known.split(",")):
            return Response(status_code=304, headers=self._headers)
        return Response(self._body, headers=self._headers)


def routes() -> list[Route]:
    """`/`, and what its page asks for. Open to everyone: nothing in them is anybody's."""
    found = [Route("/", File(FOLDER / "index.html", _PAGE).__call__, methods=["GET"])]
    for path in sorted(FOLDER.iterdir()):
        if path.name != "index.html":
            policy = _FRAME if path.name == "frame.html" else _PAGE
            found.append(Route(f"/console/{path.name}", File(path, policy).__call__, methods=["GET"]))
    return found
