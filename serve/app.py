"""The ASGI application of a door: routes from the table of operations, layers around them in one order.

From the outside in: measured and logged, key checked, replayed where an Idempotency-Key says so, routed, answered in
the envelope whatever a handler raises. gRPC calls come in through the same application (`serve/grpc_door/methods.py`).
"""

import importlib.metadata
from collections.abc import Awaitable, Callable, Sequence

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from serve.access import principal
from serve.access.authentication import Authenticated
from serve.door import Door
from serve.load.drain import Draining
from serve.operations import Handler, operations
from serve.pages.console_pages import Console
from serve.pages.document_pages import Documented
from serve.pages.openapi import document
from serve.proxy.first_message import Given
from serve.requests import failures
from serve.requests.idempotency import Idempotent, Replays
from serve.requests.ids import Identified
from serve.telemetry import request_log
from serve.telemetry.metrics import Measured


def create_app(door: Door, replays: Replays) -> ASGIApp:
    """The routes of a door, every error in the envelope, every request measured; answers kept by `replays`."""
    table = operations(door)
    routes = [Route(one.path, _in_envelope(one.handler), methods=[one.method]) for one in table]
    app = Starlette(routes=routes, exception_handlers={HTTPException: _without_route(routes)})
    app.router.redirect_slashes = False
    once = Idempotent(app, replays, table, door.http)
    keyed = Authenticated(once, [*zip(routes, table, strict=True)], door.access)
    version = importlib.metadata.version("metasepia")
    told = Documented(keyed, lambda: document(table, door.http, version, keys=door.access.settings.required))
    measured = Measured(Draining(Console(told), door.drain), door.metrics, door.status_of_parts.begin)
    return Given(Identified(measured))


def _in_envelope(handler: Handler) -> Handler:
    """Turns whatever a handler raises into an answer. Only a cancellation goes on: the client has gone."""

    async def answered(request: Request) -> Response:
        asking = principal.current()
        request_log.note(tenant=asking.tenant, key_id=asking.key_id)
        try:
            return await handler(request)
        except Exception as error:
            answer = failures.answer(error)
            return JSONResponse(answer.body, answer.failure.status, headers=answer.headers)

    return answered


def _without_route(routes: Sequence[Route]) -> Callable[[Request, Exception], Awaitable[Response]]:
    """Answers what no route does: OPTIONS with the methods of its path, all else with a refusal."""

    async def answered(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        headers = dict(error.headers or {})
        if error.status_code == 405:
            of_path = [route.methods or () for route in routes if route.path_regex.match(request.url.path)]
            headers["allow"] = ", ".join(sorted({"OPTIONS", *(method for methods in of_path for method in methods)}))
            if request.method == "OPTIONS":
                return Response(status_code=204, headers=headers)
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
        request_log.note(reason=code)
        failure = failures.Failure(
            error.status_code, "invalid_request_error", code, failures.grpc.StatusCode.UNIMPLEMENTED
        )
        answer = failures.envelope(failure, f"{request.method} {request.url.path[:200]} is not served here", None)
        return JSONResponse(answer.body, error.status_code, headers=headers)

    return answered
