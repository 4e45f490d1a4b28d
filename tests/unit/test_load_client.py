"""What became of a request, and whether memory grows: the judgements that `benchmarks.load` rests on."""

import asyncio
import time
from collections.abc import Callable

import httpx
import numpy as np
import pytest

from benchmarks import load_client
from benchmarks.load import Slope
from benchmarks.load_client import Sent, ask, open_loop, outcome

REFUSAL = {"error": {"message": "full", "type": "rate_limit_error", "param": None, "code": "overloaded"}}
SENT = Sent("/v1/completions", {"prompt": "x"}, 5.0)
STREAM = Sent("/v1/completions", {"prompt": "x", "stream": True}, 5.0)


@pytest.mark.parametrize(
    ("response", "kind"),
    [
        (httpx.Response(200, json={"usage": {"completion_tokens": 3}}), "ok"),
        (httpx.Response(429, json=REFUSAL, headers={"retry-after": "3"}), "refusal"),
        (httpx.Response(429, json=REFUSAL), "lost"),  # says not when to come back
        (httpx.Response(504, json=REFUSAL), "refusal"),
        (httpx.Response(503, text="Service Unavailable", headers={"retry-after": "3"}), "lost"),
        (httpx.Response(500, json=REFUSAL), "lost"),
        (httpx.Response(200, json=REFUSAL), "lost"),
    ],
)
def test_only_whole_answers_and_typed_refusals_are_not_lost(response: httpx.Response, kind: str) -> None:
    assert outcome(time.monotonic(), response).kind == kind


def asked(answer: Callable[[httpx.Request], httpx.Response], request: Sent) -> load_client.Outcome:
    async def talk() -> load_client.Outcome:
        transport = httpx.MockTransport(answer)
        async with httpx.AsyncClient(transport=transport, base_url="http://door") as client:
            return await ask(client, request)

    return asyncio.run(talk())


def test_a_stream_counts_only_when_it_said_done_and_no_error() -> None:
    whole = 'data: {"choices": []}\n\ndata: [DONE]\n\n'
    assert asked(lambda _: httpx.Response(200, text=whole), STREAM).kind == "ok"
    cut = asked(lambda _: httpx.Response(200, text='data: {"choices": []}\n\n'), STREAM)
    assert (cut.kind, cut.what) == ("lost", "stream cut off")
    error = 'data: {"error": {"code": "unavailable"}}\n\ndata: [DONE]\n\n'
    assert asked(lambda _: httpx.Response(200, text=error), STREAM).what == "stream unavailable"
    refused = asked(lambda _: httpx.Response(429, json=REFUSAL, headers={"retry-after": "2"}), STREAM)
    assert (refused.kind, refused.retry_after_s) == ("refusal", 2.0)


def test_a_connection_that_breaks_is_a_lost_request() -> None:
    def broken(request: httpx.Request) -> httpx.Response:
        raise httpx.ReadError("reset", request=request)

    assert asked(broken, SENT).what == "ReadError"


def test_requests_of_an_open_loop_leave_at_their_times_whatever_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    arrived: list[float] = []

    async def slow(_: httpx.Request) -> httpx.Response:
        arrived.append(time.monotonic())
        await asyncio.sleep(0.3)
        return httpx.Response(200, json={"usage": {}})

    def client_of(url: str) -> httpx.AsyncClient:
        return httpx.AsyncClient(transport=httpx.MockTransport(slow), base_url=url)

    monkeypatch.setattr(load_client, "client_of", client_of)
    outcomes = asyncio.run(open_loop("http://door", lambda: SENT, per_s=50, seconds=0.4))
    assert len(outcomes) == 20 and {one.kind for one in outcomes} == {"ok"}
    assert 0.3 < arrived[-1] - arrived[0] < 0.6  # not one after another, which takes six seconds


def test_a_slope_that_is_there_is_found_and_noise_around_a_level_is_none() -> None:
    draw = np.random.default_rng(0)
    x = np.linspace(0, 20_000, 400)
    walk = 0.5 * np.sin(x / 300) + draw.normal(0, 1, 400)
    grows = Slope.of(x.tolist(), (500 + 0.004 * x + walk).tolist())
    assert abs(grows.per_1000 - 4) < grows.half_width < 1 and not grows.is_flat
    assert Slope.of(x.tolist(), (500 + walk).tolist()).is_flat
    assert Slope.of(x.tolist(), (500 - 0.004 * x + walk).tolist()).is_flat  # memory that is given back is no leak
