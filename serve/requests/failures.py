"""The one table from errors to answers: HTTP status, OpenAI's `type` and `code`, gRPC code.

Errors that a deployment raises arrive wrapped by Ray; `answer` unwraps them first. What is not in the table is our own
mistake: it is logged whole and answered 500 without its text.
"""

import asyncio
import logging
import math
from dataclasses import dataclass

import grpc
import pydantic
from ray.exceptions import RayActorError, RayTaskError, TaskCancelledError
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
    RequestCancelledError,
)
from starlette.requests import ClientDisconnect

from metasepia import errors
from serve.telemetry import request_log

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Failure:
    """How one class of error is answered."""

    status: int
    type: str
    code: str
    grpc: grpc.StatusCode
    retry_after_s: float | None = None
    """Sent as Retry-After when the error does not carry its own."""


TABLE: dict[type[BaseException], Failure] = {
    errors.BodyTooLarge: Failure(413, "invalid_request_error", "body_too_large", grpc.StatusCode.INVALID_ARGUMENT),
    errors.WindowExceeded: Failure(
        400, "invalid_request_error", "context_length_exceeded", grpc.StatusCode.INVALID_ARGUMENT
    ),
    errors.InvalidRequest: Failure(400, "invalid_request_error", "invalid_value", grpc.StatusCode.INVALID_ARGUMENT),
    errors.Unauthenticated: Failure(401, "invalid_request_error", "invalid_api_key", grpc.StatusCode.UNAUTHENTICATED),
    errors.Forbidden: Failure(403, "invalid_request_error", "insufficient_scope", grpc.StatusCode.PERMISSION_DENIED),
    errors.UnknownName: Failure(404, "invalid_request_error", "model_not_found", grpc.StatusCode.NOT_FOUND),
    errors.DeletedName: Failure(410, "invalid_request_error", "deleted", grpc.StatusCode.NOT_FOUND),
    errors.NameTaken: Failure(409, "invalid_request_error", "already_exists", grpc.StatusCode.ALREADY_EXISTS),
    errors.Outdated: Failure(409, "invalid_request_error", "outdated", grpc.StatusCode.FAILED_PRECONDITION),
    errors.IdempotencyConflict: Failure(
        409, "invalid_request_error", "idempotency_conflict", grpc.StatusCode.ALREADY_EXISTS
    ),
    errors.InProgress: Failure(409, "invalid_request_error", "in_progress", grpc.StatusCode.ABORTED, 1.0),
    errors.DifferentSpaces: Failure(400, "invalid_request_error", "different_spaces", grpc.StatusCode.INVALID_ARGUMENT),
    errors.NotSupported: Failure(400, "invalid_request_error", "not_supported", grpc.StatusCode.UNIMPLEMENTED),
    errors.QuotaExceeded: Failure(429, "rate_limit_error", "quota_exceeded", grpc.StatusCode.RESOURCE_EXHAUSTED),
    errors.Overloaded: Failure(429, "rate_limit_error", "overloaded", grpc.StatusCode.RESOURCE_EXHAUSTED),
    errors.DeadlineExceeded: Failure(504, "timeout_error", "deadline_exceeded", grpc.StatusCode.DEADLINE_EXCEEDED),
    errors.Unavailable: Failure(503, "server_error", "unavailable", grpc.StatusCode.UNAVAILABLE),
    errors.Locked: Failure(503, "server_error", "locked", grpc.StatusCode.UNAVAILABLE, 5.0),
    errors.CannotPlace: Failure(503, "server_error", "cannot_place", grpc.StatusCode.UNAVAILABLE, 60.0),
    errors.CorruptArtefact: Failure(500, "server_error", "corrupt_artefact", grpc.StatusCode.DATA_LOSS),
    errors.NoLearningSignal: Failure(500, "server_error", "no_learning_signal", grpc.StatusCode.FAILED_PRECONDITION),
    errors.InvalidSettings: Failure(500, "server_error", "invalid_settings", grpc.StatusCode.INTERNAL),
    BackPressureError: Failure(429, "rate_limit_error", "overloaded", grpc.StatusCode.RESOURCE_EXHAUSTED, 1.0),
    RequestCancelledError: Failure(499, "server_error", "cancelled", grpc.StatusCode.CANCELLED),
    TaskCancelledError: Failure(499, "server_error", "cancelled", grpc.StatusCode.CANCELLED),
    DeploymentUnavailableError: Failure(503, "server_error", "unavailable", grpc.StatusCode.UNAVAILABLE, 5.0),
    ReplicaUnavailableError: Failure(503, "server_error", "unavailable", grpc.StatusCode.UNAVAILABLE, 5.0),
    RayActorError: Failure(503, "server_error", "unavailable", grpc.StatusCode.UNAVAILABLE, 5.0),
    TimeoutError: Failure(504, "timeout_error", "deadline_exceeded", grpc.StatusCode.DEADLINE_EXCEEDED),
    ClientDisconnect: Failure(499, "server_error", "cancelled", grpc.StatusCode.CANCELLED),
    asyncio.CancelledError: Failure(499, "server_error", "cancelled", grpc.StatusCode.CANCELLED),
}
"""Looked up along the error's method resolution order, so a subclass without a row takes its parent's."""

UNEXPECTED = Failure(500, "server_error", "internal_error", grpc.StatusCode.INTERNAL)

_PARAM_OF_KIND = {
    "encoder": "encoder",
    "backbone": "backbone",
    "expert": "weights",
    "candidate expert": "experts",
    "search": "id",
    "key": "id",
    "registered expert": "name",
    "registered mixture": "digest",
    "reasoning module": "module",
    "task": "task",
    "embedded task": "id",
    "task's expert": "expert",
    "task to start from": "start.task",
}
"""The field that held the name; `model` otherwise. Plain `expert` is one that a mixture names."""


@dataclass(frozen=True)
class Answer:
    """What leaves the door for an error."""

    failure: Failure
    body: dict[str, dict[str, object]]
    """OpenAI's envelope."""
    headers: dict[str, str]


def unwrap(error: BaseException) -> BaseException:
    """Our own error out of Ray's wrapping; pydantic's first complaint as InvalidRequest."""
    while isinstance(error, RayTaskError) and isinstance(getattr(error, "cause", None), BaseException):
        error = error.cause
    if isinstance(error, pydantic.ValidationError):
        return _invalid(error)
    return error


def answer(error: BaseException) -> Answer:
    """The answer to any error at all."""
    error = unwrap(error)
    failure = next((TABLE[kind] for kind in type(error).__mro__ if kind in TABLE), UNEXPECTED)
    request_log.note(reason=failure.code)
    message = str(error)
    if failure is UNEXPECTED:
        logger.error("unexpected error at the door", exc_info=error)
        message = f"an error that we did not expect ({type(error).__name__}); the server's log has it"
    elif not isinstance(error, errors.MetasepiaError):
        message = _MESSAGES.get(failure.code, "the request was not answered")
    param = getattr(error, "param", None)
    if isinstance(error, errors.NameTaken):
        param = "name"
    elif isinstance(error, errors.DifferentSpaces):
        param = "tasks"
    elif isinstance(error, errors.UnknownName | errors.DeletedName):
        param = _PARAM_OF_KIND.get(error.kind, "model")
    return envelope(failure, message, param, getattr(error, "retry_after_s", None))


def envelope(failure: Failure, message: str, param: str | None = None, retry_after_s: float | None = None) -> Answer:
    """OpenAI's error envelope; Retry-After in whole seconds, at least 1, on 429, 503 and what is in progress;
    WWW-Authenticate on 401.
    """
    body: dict[str, dict[str, object]] = {
        "error": {"message": message, "type": failure.type, "param": param, "code": failure.code}
    }
    headers: dict[str, str] = {}
    if failure.status in (429, 503) or failure.code == "in_progress":
        seconds = retry_after_s if retry_after_s is not None else failure.retry_after_s
        headers["retry-after"] = str(max(1, math.ceil(seconds if seconds is not None else 1.0)))
    if failure.status == 401:
        headers["www-authenticate"] = 'Bearer realm="metasepia"'
    return Answer(failure, body, headers)


_MESSAGES = {
    "overloaded": "too many requests are waiting; try again soon",
    "unavailable": "a part of the system is down or being rebuilt; try again soon",
    "deadline_exceeded": "the request did not finish before its deadline",
    "cancelled": "the request was cancelled",
}


def _invalid(error: pydantic.ValidationError) -> errors.InvalidRequest:
    """The complaint deepest in the body, in our words where pydantic's would not name the way out."""
    first = max(error.errors(include_url=False), key=lambda one: len(one["loc"]))
    where = ""
    for step in first["loc"]:
        where += f"[{step}]" if isinstance(step, int) else f".{step}" if where else str(step)
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = "this field is not known here; leave it out"
    elif first["type"] == "missing":
        message = "this field is required"
    elif first["type"] not in ("value_error",) and isinstance(first.get("input"), str | int | float | bool | None):
        message = f"{message}, got {_shown(first['input'])}"
    return errors.InvalidRequest(where or "body", message)


def _shown(value: object) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
