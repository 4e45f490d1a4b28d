"""When a request is tried again, how long after, and what an error answer becomes: the one place for both transports.

Tried again are 429, 502 and 503, refused and broken connections, and a request that the server is still answering;
each only where a second time does no harm: reads, and requests with an Idempotency-Key, which is the same over all
tries of one call. A wait honours Retry-After and is never longer than what is left of the call's time.
"""

import email.utils
import random
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from metasepia.client.calls import Answer, Ask, Pause, Request, Send, Steps
from metasepia.client.errors import BadInput, Envelope, NoAnswer, NotConnected, NotOurs, OutOfTime, Refused, refused

_PROXIES = (502, 503, 504)
"""Whose plain words may come from something in front of the server."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a client asks."""

    timeout_s: float = 120.0
    """Of one request, over all its tries; the server is told what is left of it. Above 0, to 86400."""
    retries: int = 3
    """Tries after the first one. From 0 to 100."""
    backoff_s: float = 0.25
    """Before the first retry, about; twice as long before each next one, 8 s at most. From 0 to 60."""
    concurrency: int = 4
    """Requests of one large input under way at once. From 1 to 256."""
    idempotency_key: str | None = None
    """For the requests of this client in place of a new one for each. None: a new one."""

    def __post_init__(self) -> None:
        for name, low, high in (("timeout_s", 1e-3, 86_400), ("retries", 0, 100), ("backoff_s", 0, 60)):
            if not low <= getattr(self, name) <= high:
                raise BadInput(name, f"must be from {low:g} to {high:g}, got {getattr(self, name)}")
        if not 1 <= self.concurrency <= 256:
            raise BadInput("concurrency", f"must be from 1 to 256, got {self.concurrency}")


def keyed(request: Request, options: Options) -> Request:
    """With the key by which the server knows it again, where it is not a mere read, and keys are taken for it."""
    if request.is_read or request.once:
        return request
    return request.with_headers(idempotency_key=options.idempotency_key or uuid.uuid4().hex)


def tried(
    ask: Ask,
    url: str,
    options: Options,
    clock: Callable[[], float] = time.monotonic,
    draw: Callable[[], float] = random.random,
) -> Steps[Answer]:
    """The answer, of a status below 300. Raises Refused, NoAnswer, OutOfTime and NotOurs."""
    request = keyed(ask.request, options)
    end, num_failed = clock() + options.timeout_s, 0
    while True:
        left = end - clock()
        if left <= 0:
            raise OutOfTime(url, options.timeout_s)
        error: Refused | NoAnswer
        try:
            timed = request.with_headers(x_request_timeout_seconds=f"{max(left, 0.001):.3f}")
            answer: Answer = yield Send(timed, left)
        except NoAnswer as problem:
            error = problem
        except OutOfTime:
            raise OutOfTime(url, options.timeout_s) from None  # the whole call's, not the last try's
        else:
            if 200 <= answer.status < 300:
                return answer
            error = error_of(answer)
        if not is_worth_another(request, error):
            raise error
        asked = error.retry_after_s if isinstance(error, Refused) else None
        backoff = min(8.0, options.backoff_s * 2**num_failed) * (0.5 + draw())
        spread = 0.0 if asked is None else asked + draw() * min(1.0, 0.25 * asked)  # not all clients at one moment
        wait = max(backoff, spread)
        num_failed += not _is_under_way(error)  # that is no failure: an earlier try of this call is being answered
        if num_failed > options.retries or wait >= end - clock():
            raise error
        yield Pause(wait)


def is_worth_another(request: Request, error: Refused | NoAnswer) -> bool:
    """Whether the same request may be answered at another time, and sending it again does no harm."""
    if isinstance(error, NoAnswer):
        return isinstance(error, NotConnected) or not request.once
    return error.status == 429 or (not request.once and (error.status in (502, 503) or _is_under_way(error)))


def _is_under_way(error: Refused | NoAnswer) -> bool:
    return isinstance(error, Refused) and error.code == "in_progress"


def error_of(answer: Answer) -> Refused:
    """The server's error in its own words. Raises NotOurs for what is no error of this server's."""
    retry_after_s = seconds_of(answer.headers.get("retry-after"))
    request_id = answer.headers.get("x-request-id")
    try:
        tree = answer.json()
    except NotOurs:
        tree = None
    error = tree.get("error") if isinstance(tree, dict) else None
    if isinstance(error, dict) and isinstance(error.get("message"), str):
        return refused(envelope_of(error, answer.status, request_id, retry_after_s))
    if answer.status in _PROXIES:
        return refused(Envelope(answer.status, "unavailable", answer.shown, None, request_id, retry_after_s))
    raise NotOurs(answer.url, answer.shown)


def envelope_of(
    error: Mapping[str, object], status: int, request_id: str | None = None, retry_after_s: float | None = None
) -> Envelope:
    param = error.get("param")
    return Envelope(
        status=status,
        code=str(error.get("code") or "unknown"),
        message=str(error["message"]),
        param=None if param is None else str(param),
        request_id=request_id,
        retry_after_s=retry_after_s,
    )


def seconds_of(retry_after: str | None, now_unix_s: Callable[[], float] = time.time) -> float | None:
    """Retry-After: seconds, or a date (RFC 9110, 10.2.3). None where it says nothing that can be read."""
    if retry_after is None:
        return None
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(retry_after).timestamp() - now_unix_s()
        except ValueError:
            return None
    return max(0.0, seconds) if seconds < float("inf") else None
