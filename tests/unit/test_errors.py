"""Errors cross processes whole: `args` equal the constructor's parameters."""

import copy
import inspect

import pytest

from metasepia import errors

CASES: list[errors.MetasepiaError] = [
    errors.InvalidSettings("http.port", 0, "from 1 to 65535"),
    errors.InvalidRequest("temperature", "must be from 0 to 2, got 3"),
    errors.WindowExceeded("messages", 9000, 8192),
    errors.BodyTooLarge(8.0),
    errors.Unauthenticated("this key is not known here"),
    errors.Forbidden("CreateKey", "admin"),
    errors.UnknownName("expert", "law", ("maths",)),
    errors.DeletedName("context", "ctx-0", 1e9),
    errors.NameTaken("expert", "law", "0a" * 32),
    errors.Outdated("context ctx-0", "encoder", "minilm (0a)", ("minilm (1b)",)),
    errors.IdempotencyConflict("retry-1"),
    errors.InProgress("retry-1", 1.5),
    errors.DifferentSpaces("0a" * 32, "1b" * 32, ("method", "probes")),
    errors.NoLearningSignal(8, -1.0),
    errors.NotSupported("tp_size 2 for family t5", "use tp_size 1"),
    errors.CorruptArtefact("expert.safetensors", "it ends inside tensor z"),
    errors.CannotPlace("CPU", 3.0, 2.0, "gateway 1 + backbone 2"),
    errors.Overloaded("the queue of smollm2", 3.0),
    errors.QuotaExceeded("requests of this minute (60)", 12.5),
    errors.DeadlineExceeded("classification", 2.0),
    errors.Unavailable("backbone smollm2", 5.0),
    errors.Locked("catalogue.sqlite", "pid 7"),
]


@pytest.mark.parametrize("error", CASES, ids=lambda e: type(e).__name__)
def test_an_error_survives_the_trip_between_processes(error: errors.MetasepiaError):
    again = copy.copy(error)  # the same protocol (__reduce_ex__) that carries it between processes
    assert type(again) is type(error)
    assert (str(again), vars(again)) == (str(error), vars(error))


def test_every_class_of_the_tree_is_covered_and_refines_a_builtin():
    classes = {c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, errors.MetasepiaError)} - {
        errors.MetasepiaError
    }
    assert classes == {type(e) for e in CASES}
    builtin = (
        ValueError,
        LookupError,
        NotImplementedError,
        RuntimeError,
        TimeoutError,
        ConnectionError,
        PermissionError,
    )
    assert all(issubclass(c, builtin) for c in classes)
