"""What a call can end with in place of its answer.

    MetasepiaError
    ├── BadInput            (ValueError)       found here, before anything was sent
    ├── NoAnswer            (ConnectionError)  the connection broke; NotConnected: nobody listens there
    ├── OutOfTime           (TimeoutError)     the call's `timeout_s` is over
    ├── NotOurs             (ValueError)       something answers, but not as a Metasepia server does
    ├── StreamBroken        (ConnectionError)  a stream ended before its end; carries the text so far
    ├── PartlyDone          (RuntimeError)     some requests of a large input failed; carries what is finished
    └── Refused                                the server's own words, with status, code, param and request id
        ├── Invalid         (ValueError)       400, 413, 422 and other 4xx
        ├── Unauthenticated (PermissionError)  401
        ├── Forbidden       (PermissionError)  403
        ├── NotFound        (LookupError)      404
        ├── Deleted         (LookupError)      410
        ├── Conflict        (RuntimeError)     409
        ├── Busy            (RuntimeError)     429; QuotaExceeded is one of a key's quota
        ├── ServerFailed    (RuntimeError)     500 and other 5xx
        │   └── Unavailable (ConnectionError)  502, 503
        └── TimedOut        (TimeoutError)     408, 504

Each class's `args` equal its constructor's parameters, so that they cross processes.
"""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from metasepia.errors import MetasepiaError


class BadInput(MetasepiaError, ValueError):
    """An argument that no request can be made of."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(param, message)
        self.param, self.message = param, message

    def __str__(self) -> str:
        return f"{self.param}: {self.message}"


class NoAnswer(MetasepiaError, ConnectionError):
    """Nobody listens there, or the connection broke before the answer was whole."""

    def __init__(self, url: str, problem: str) -> None:
        super().__init__(url, problem)
        self.url, self.problem = url, problem

    def __str__(self) -> str:
        return (
            f"no answer from {self.url} ({self.problem}); is it running? METASEPIA_URL or the argument url says where"
        )


class NotConnected(NoAnswer):
    """The request never left."""


class OutOfTime(MetasepiaError, TimeoutError):
    """The call's own deadline passed, over all its tries."""

    def __init__(self, url: str, timeout_s: float) -> None:
        super().__init__(url, timeout_s)
        self.url, self.timeout_s = url, timeout_s

    def __str__(self) -> str:
        return f"{self.url} did not answer within {self.timeout_s:g} s; give more with timeout_s"


class NotOurs(MetasepiaError, ValueError):
    """Something answers there, but not as a Metasepia server does: another program's port, or a proxy's page."""

    def __init__(self, url: str, what: str) -> None:
        super().__init__(url, what)
        self.url, self.what = url, what

    def __str__(self) -> str:
        return f"{self.url} answers, but not as a Metasepia server does: {self.what}; is it the right host and port?"


class StreamBroken(MetasepiaError, ConnectionError):
    """The connection broke, or the server ended the stream, before its end. What came is in `text`."""

    def __init__(self, problem: str, text: str) -> None:
        super().__init__(problem, text)
        self.problem, self.text = problem, text

    def __str__(self) -> str:
        return f"the stream broke off after {len(self.text)} characters ({self.problem}); what came is in .text"


@dataclass(frozen=True)
class Envelope:
    """An error as the server says it."""

    status: int
    code: str
    """`invalid_value`, `model_not_found`, `quota_exceeded`, ...: the table of the API reference."""
    message: str
    param: str | None = None
    """The field that the complaint is about, `examples[3].label`."""
    request_id: str | None = None
    """What the server's log knows the request by."""
    retry_after_s: float | None = None
    """When it may be tried again, in seconds from then."""


class Refused(MetasepiaError):
    """The server's answer is an error. The text is its own words."""

    def __init__(self, envelope: Envelope) -> None:
        super().__init__(envelope)
        self.envelope = envelope

    def __str__(self) -> str:
        one = self.envelope
        wait = "" if one.retry_after_s is None else f" (retry after {one.retry_after_s:g} s)"
        id_ = "" if one.request_id is None else f", request {one.request_id}"
        return f"{one.message}{wait} [{one.status} {one.code}{id_}]"

    @property
    def status(self) -> int:
        return self.envelope.status

    @property
    def code(self) -> str:
        return self.envelope.code

    @property
    def message(self) -> str:
        return self.envelope.message

    @property
    def param(self) -> str | None:
        return self.envelope.param

    @property
    def request_id(self) -> str | None:
        return self.envelope.request_id

    @property
    def retry_after_s(self) -> float | None:
        return self.envelope.retry_after_s


class Invalid(Refused, ValueError):
    """400, 413, 422: the request has no answer as it is."""


class Unauthenticated(Refused, PermissionError):
    """401: no key, or one that is unknown, revoked or expired."""


class Forbidden(Refused, PermissionError):
    """403: the key lacks the scope."""


class NotFound(Refused, LookupError):
    """404: nothing of that name, or no such route."""


class Deleted(Refused, LookupError):
    """410: what had this name was deleted."""


class Conflict(Refused, RuntimeError):
    """409: the name is taken, the context outdated, or the Idempotency-Key stands for another request."""


class Busy(Refused, RuntimeError):
    """429: a bounded queue is full."""


class QuotaExceeded(Busy):
    """429: the key's tenant has used up its quota."""


class ServerFailed(Refused, RuntimeError):
    """500: the server's mistake; its log has it under `request_id`."""


class Unavailable(ServerFailed, ConnectionError):
    """502, 503: a part is down or being rebuilt."""


class TimedOut(Refused, TimeoutError):
    """408, 504: the server's deadline for the request passed, or the one that it was told."""


_OF_STATUS: dict[int, type[Refused]] = {
    401: Unauthenticated,
    403: Forbidden,
    404: NotFound,
    408: TimedOut,
    409: Conflict,
    410: Deleted,
    429: Busy,
    502: Unavailable,
    503: Unavailable,
    504: TimedOut,
}


def refused(envelope: Envelope) -> Refused:
    """The error of the class that its status and code have."""
    if envelope.code == "quota_exceeded":
        return QuotaExceeded(envelope)
    kind = _OF_STATUS.get(envelope.status, ServerFailed if envelope.status >= 500 else Invalid)
    return kind(envelope)


def moved(error: Refused, field: str, begin: int) -> Refused:
    """The same complaint about `field[i]`, counted in the whole input of which this request had a part."""

    def number(found: "re.Match[str]") -> str:
        return f"{field}[{int(found[1]) + begin}]"

    one, pattern = error.envelope, rf"\b{re.escape(field)}\[(\d+)\]"
    if begin == 0 or one.param is None or not re.match(pattern, one.param):
        return error
    param, message = re.sub(pattern, number, one.param), re.sub(pattern, number, one.message)
    return type(error)(dataclasses.replace(one, param=param, message=message))


@dataclass(frozen=True)
class Failure:
    """One part of a large input that has no answer."""

    begin: int
    end: int
    """Items begin to end - 1 of the input."""
    error: Exception


class PartlyDone(MetasepiaError, RuntimeError):
    """Some of the requests that a large input was cut into failed. What the others answered is in `partial`.

    `partial` has the form that the whole would have had; what is missing has no label, vectors of NaN.
    """

    def __init__(self, partial: Any, failures: Sequence[Failure], num_items: int) -> None:
        super().__init__(partial, failures, num_items)
        self.partial, self.failures, self.num_items = partial, failures, num_items

    def __str__(self) -> str:
        lost = sum(one.end - one.begin for one in self.failures)
        first = self.failures[0]
        return (
            f"{self.num_items - lost} of {self.num_items} items are done and in .partial; items {first.begin} to "
            f"{first.end - 1} are not: {first.error}"
        )

    @property
    def missing(self) -> list[int]:
        """The items without an answer, counted from 0."""
        return [item for one in self.failures for item in range(one.begin, one.end)]
