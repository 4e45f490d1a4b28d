"""Requests to a running graph, each asked until it has an answer: a refusal is the row's, silence is waited out.

answered       200
the row's      any other 4xx, and what fails MAX_FAILURES times in a row while the server answers others (500, 504)
waited out     no connection, 429, 502, 503, a request still in progress: up to `patience_s`, then `Stopped`
everyone's     401 and 403: `Stopped` at once
"""

import asyncio
import random
import time
from collections.abc import Mapping
from typing import Any

import httpx

from jobs.batching.tasks import CutOff, Task

MAX_FAILURES = 4
FIRST_PAUSE_S, MAX_PAUSE_S = 0.25, 15.0
REQUEST_TIMEOUT_S = 300.0
_WAIT = (429, 502, 503)


class RowRefused(Exception):
    """The server will not answer this, as often as it is asked."""

    def __init__(self, code: str, message: str, param: str | None = None, *, status: int = 0) -> None:
        super().__init__(code, message, param)
        self.code, self.message, self.param, self.status = code, message, param, status

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


class Stopped(Exception):
    """Nobody will be answered for now: the batch ends, and goes on when it is called again."""


class Asker:
    """One server. All requests share its connections."""

    def __init__(self, url: str, key: str | None, patience_s: float, client: httpx.AsyncClient | None = None) -> None:
        """`client` None makes one for `url`."""
        headers = {"x-request-timeout-seconds": f"{REQUEST_TIMEOUT_S:g}"}
        headers |= {"authorization": f"Bearer {key}"} if key else {}
        limits = httpx.Limits(max_connections=512, max_keepalive_connections=512)
        self._client = client or httpx.AsyncClient(base_url=url, timeout=REQUEST_TIMEOUT_S + 10, limits=limits)
        self._client.headers.update(headers)
        self._patience_s = patience_s

    async def close(self) -> None:
        await self._client.aclose()

    async def ask(self, task: Task, body: Mapping[str, Any], count: int, key: str) -> list[dict[str, Any]]:
        """The answers of `count` rows. Raises RowRefused and Stopped."""
        failures, pause_s = 0, FIRST_PAUSE_S
        give_up_s = time.monotonic() + self._patience_s
        headers = {"accept": task.accept, "idempotency-key": key}
        while True:
            asked_s: float | None = None
            try:
                response = await self._client.post(task.path, json=body, headers=headers)
                if response.status_code == 200:
                    return task.answers(response.content, count)
                reason, asked_s, failed = _problem(response)
                failures += failed
                if failures >= MAX_FAILURES:
                    raise RowRefused(*_envelope(response), status=response.status_code)
            except httpx.TransportError as error:
                reason = f"{self._client.base_url} does not answer ({type(error).__name__}: {error})"
            except CutOff as error:
                failures, reason = failures + 1, str(error)
                if failures >= MAX_FAILURES:
                    raise RowRefused("cut_off", reason) from None
            wait_s = max(asked_s, FIRST_PAUSE_S) if asked_s is not None else pause_s
            wait_s *= random.uniform(1.0, 1.3)  # not all at once
            if time.monotonic() + wait_s > give_up_s:
                raise Stopped(f"{reason}; waited for {self._patience_s:g} s")
            await asyncio.sleep(wait_s)
            pause_s = min(2 * pause_s, MAX_PAUSE_S)


def _problem(response: httpx.Response) -> tuple[str, float | None, bool]:
    """Why it is to be asked again, after how long, and whether the request itself may be the cause.

    Raises RowRefused and Stopped where it is not.
    """
    code, message, param = _envelope(response)
    status, again = response.status_code, response.headers.get("retry-after")
    after_s = float(again) if again is not None and again.replace(".", "", 1).isdigit() else None
    if status in (401, 403):
        raise Stopped(f"{status} {code}: {message}")
    if status in _WAIT or code == "in_progress":
        return f"{code}: {message}", after_s, False
    if status >= 500 or status == 408:
        return f"{code}: {message}", after_s, True
    raise RowRefused(code, message, param, status=status)


def _envelope(response: httpx.Response) -> tuple[str, str, str | None]:
    try:
        error = response.json()["error"]
        return str(error.get("code") or response.status_code), str(error["message"]), error.get("param")
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"http_{response.status_code}", response.text[:200], None
