"""The one table from errors to answers."""

import inspect

import pytest
from ray.exceptions import RayTaskError
from ray.serve.exceptions import BackPressureError

from metasepia import errors
from serve.requests import failures

LEAVES = [
    (errors.InvalidRequest("temperature", "too hot"), 400, "temperature"),
    (errors.WindowExceeded("messages", 9, 8), 400, "messages"),
    (errors.BodyTooLarge(8.0), 413, "body"),
    (errors.UnknownName("model", "m", ("a", "b")), 404, "model"),
    (errors.UnknownName("encoder", "m", ("a", "b")), 404, "encoder"),
    (errors.NotSupported("chat", "use completions"), 400, None),
    (errors.Overloaded("queue", 2.2), 429, None),
    (errors.DeadlineExceeded("it", 1.0), 504, None),
    (errors.Unavailable("gang", 0.2), 503, None),
    (BackPressureError(3, 2), 429, None),
    (TimeoutError(), 504, None),
]


@pytest.mark.parametrize(("error", "status", "param"), LEAVES, ids=lambda value: type(value).__name__)
def test_an_error_is_answered_in_openais_envelope(error, status, param):
    answer = failures.answer(error)
    assert answer.failure.status == status
    inner = answer.body["error"]
    assert set(inner) == {"message", "type", "param", "code"}
    assert inner["param"] == param
    assert inner["message"]


@pytest.mark.parametrize(("error", "status", "param"), LEAVES, ids=lambda value: type(value).__name__)
def test_an_error_of_another_process_is_answered_like_our_own(error, status, param):
    wrapped = RayTaskError("f", "traceback", error).as_instanceof_cause()
    assert failures.answer(wrapped) == failures.answer(error)


def test_every_error_of_the_tree_has_an_answer_of_its_own():
    classes = {c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, errors.MetasepiaError)}
    assert classes - {errors.MetasepiaError} <= set(failures.TABLE)


def test_what_nobody_expected_is_a_500_without_its_text():
    answer = failures.answer(KeyError("a secret path"))
    assert answer.failure.status == 500
    assert "secret" not in str(answer.body)


def test_retry_after_is_whole_seconds_rounded_up():
    assert failures.answer(errors.Overloaded("queue", 2.2)).headers == {"retry-after": "3"}
    assert failures.answer(errors.Unavailable("gang", 0.0)).headers == {"retry-after": "1"}
    assert failures.answer(errors.DeadlineExceeded("it", 1.0)).headers == {}


def test_an_unknown_name_is_answered_with_the_known_ones():
    assert "known: a, b" in str(failures.answer(errors.UnknownName("model", "m", ("a", "b"))).body)
