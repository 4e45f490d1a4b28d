"""What Serve's own proxy says in plain text reaches clients in the envelope."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from serve.proxy.envelope import Envelope
from serve.requests.deadlines import Deadline


def _get(app: Callable[..., Any], path: str = "/", **headers: str) -> httpx.Response:
    async def main() -> httpx.Response:
        transport = httpx.ASGITransport(app=Envelope(app), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://proxy") as client:
            return await client.get(path, headers=headers)

    return asyncio.run(main())


@pytest.mark.parametrize(
    ("status", "answered", "code"),
    [
        (404, 404, "not_found"),
        (408, 504, "deadline_exceeded"),
        (429, 429, "overloaded"),
        (500, 503, "unavailable"),
        (503, 503, "unavailable"),
    ],
)
def test_plain_text_errors_become_the_envelope(status: int, answered: int, code: str):
    response = _get(PlainTextResponse("Request dropped due to backpressure", status))
    assert (response.status_code, response.json()["error"]["code"]) == (answered, code)
    assert ("retry-after" in response.headers) == (answered in (429, 503))


def test_the_proxys_own_retry_after_is_kept():
    response = _get(PlainTextResponse("busy", 503, headers={"retry-after": "7"}))
    assert response.headers.get_list("retry-after") == ["7"]


@pytest.mark.parametrize(("given", "kept"), [("abc-1", True), ("two words", False), ("x" * 200, False), ("", False)])
def test_every_answer_has_one_id_the_clients_where_it_is_one_word(given: str, kept: bool):
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        asked = [value for name, value in scope["headers"] if name == b"x-request-id"]
        answer = PlainTextResponse("busy", 503, headers={"x-request-id": asked[0].decode()})  # as Serve adds it
        await answer(scope, receive, send)

    (told,) = _get(app, **{"x-request-id": given}).headers.get_list("x-request-id")
    assert (told == given) == kept and 0 < len(told) <= 128


@pytest.mark.parametrize(
    "answer", [JSONResponse({"error": {"code": "ours"}}, 503), PlainTextResponse("fine"), Response(b"x", 418)]
)
def test_the_gateways_own_answers_pass_untouched(answer: Response):
    response = _get(answer)
    assert (response.status_code, response.content) == (answer.status_code, answer.body)


def test_a_gateway_that_dies_before_it_answers_is_a_503():
    async def dies(scope: Scope, receive: Receive, send: Send) -> None:
        raise RuntimeError("the actor died")

    async def says_nothing(scope: Scope, receive: Receive, send: Send) -> None:
        return

    for app in (dies, says_nothing):
        response = _get(app)
        assert (response.status_code, response.json()["error"]["code"]) == (503, "unavailable")


def test_a_gateway_that_dies_in_the_middle_breaks_the_stream():
    async def dies(scope: Scope, receive: Receive, send: Send) -> None:
        async def chunks():
            yield b"half"
            raise RuntimeError("the actor died")

        await StreamingResponse(chunks(), media_type="text/plain")(scope, receive, send)

    assert _get(dies).content == b"half"


def test_serves_own_health_path_keeps_its_words():
    assert _get(PlainTextResponse("not ready", 503), "/-/healthz").text == "not ready"


def test_the_gateway_keeps_the_clients_deadline_and_the_proxy_gets_a_later_one():
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope)
        seen = {"proxy": request.headers["x-request-timeout-seconds"]}
        seen["gateway"] = str(Deadline.of(request.headers, 100.0).timeout_s)
        await Response(json.dumps(seen))(scope, receive, send)

    assert _get(app, **{"x-request-timeout-seconds": "2"}).json() == {"proxy": "7.0", "gateway": "2.0"}
