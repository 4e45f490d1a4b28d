"""Clients of `benchmarks.load`: requests at fixed times or one after another, and what became of each.

Nothing is retried. An answer is `ok`, a `refusal` (typed: an envelope with a code, and Retry-After on 429 and 503), or
`lost`: anything else, also a connection that breaks.
"""

import asyncio
import json
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import httpx

from serve.requests.deadlines import HEADER

LATE_S = 10.0
"""Beyond a request's deadline: what is not answered then is lost."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One request. Times are of `time.monotonic()`."""

    kind: Literal["ok", "refusal", "lost"]
    sent_s: float
    ended_s: float
    what: str
    """The status and code, or what broke."""
    tokens: int = 0
    retry_after_s: float | None = None

    @property
    def latency_s(self) -> float:
        return self.ended_s - self.sent_s


@dataclass(frozen=True)
class Sent:
    """A request to be sent."""

    path: str
    body: dict[str, Any]
    timeout_s: float

    @property
    def streams(self) -> bool:
        return bool(self.body.get("stream"))


def outcome(sent_s: float, response: httpx.Response) -> Outcome:
    """Of a whole answer, whatever it is."""
    now = time.monotonic()
    try:
        tree = response.json()
    except ValueError:
        what = f"{response.status_code} without JSON: {response.text[:80]!r}"
        return Outcome(kind="lost", sent_s=sent_s, ended_s=now, what=what)
    if response.status_code == 200 and "error" not in tree:
        tokens = tree.get("usage", {}).get("completion_tokens", 0)
        return Outcome(kind="ok", sent_s=sent_s, ended_s=now, what="200", tokens=tokens)
    error = tree.get("error") if isinstance(tree, dict) else None
    code = error.get("code") if isinstance(error, dict) else None
    retry = response.headers.get("retry-after")
    typed = bool(code) and (retry is not None or response.status_code not in (429, 503))
    return Outcome(
        kind="refusal" if typed and response.status_code in (429, 503, 504) else "lost",
        sent_s=sent_s,
        ended_s=now,
        what=f"{response.status_code} {code}",
        retry_after_s=None if retry is None else float(retry),
    )


async def ask(client: httpx.AsyncClient, request: Sent) -> Outcome:
    """Sends it and waits until its answer is whole."""
    sent_s = time.monotonic()
    headers = {HEADER: f"{request.timeout_s:g}"}
    try:
        async with asyncio.timeout(request.timeout_s + LATE_S):
            if request.streams:
                return await _stream(client, request, headers, sent_s)
            return outcome(sent_s, await client.post(request.path, json=request.body, headers=headers))
    except (httpx.HTTPError, TimeoutError) as error:
        what = type(error).__name__
        return Outcome(kind="lost", sent_s=sent_s, ended_s=time.monotonic(), what=what)


async def _stream(client: httpx.AsyncClient, request: Sent, headers: dict[str, str], sent_s: float) -> Outcome:
    """A stream is whole when it has said [DONE] and no event was an error."""
    pieces, error, done = 0, None, False
    async with client.stream("POST", request.path, json=request.body, headers=headers) as response:
        if response.status_code != 200:
            await response.aread()
            return outcome(sent_s, response)
        async for line in response.aiter_lines():
            data = line.removeprefix("data: ")
            if data == "[DONE]":
                done = True
            elif line.startswith("data: "):
                event = json.loads(data)
                error = error or event.get("error")
                pieces += 1
    what = f"stream {error['code']}" if error else "200" if done else "stream cut off"
    kind = "ok" if done and not error else "lost"
    return Outcome(kind=kind, sent_s=sent_s, ended_s=time.monotonic(), what=what, tokens=pieces)


def client_of(url: str) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=256)
    return httpx.AsyncClient(base_url=url, timeout=None, limits=limits)


async def open_loop(url: str, next_request: Callable[[], Sent], per_s: float, seconds: float) -> list[Outcome]:
    """Requests at fixed times, whether or not earlier ones are answered; waits for all in the end."""
    begin = time.monotonic()
    async with client_of(url) as client, asyncio.TaskGroup() as group:
        tasks: list[asyncio.Task[Outcome]] = []
        for number in range(int(per_s * seconds)):
            await asyncio.sleep(max(0.0, begin + number / per_s - time.monotonic()))
            tasks.append(group.create_task(ask(client, next_request())))
    return [task.result() for task in tasks]


async def closed_loop(
    url: str,
    next_request: Callable[[], Sent],
    clients: int,
    until: Callable[[], bool],
    after: Callable[[Outcome], Awaitable[None]] | None = None,
) -> list[Outcome]:
    """So many clients, each with one request at a time, until `until()`; `after` each answer."""
    found: list[Outcome] = []

    async def one(client: httpx.AsyncClient) -> None:
        while not until():
            found.append(await ask(client, next_request()))
            if after is not None:
                await after(found[-1])

    async with client_of(url) as client, asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(one(client))
    return found


def told(outcomes: Sequence[Outcome]) -> str:
    """How many of each."""
    return ", ".join(f"{number} {what}" for what, number in Counter(one.what for one in outcomes).most_common())
