"""What a stream that broke off says to the layers around it: its status has left by then, and says that all is well."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_broken: ContextVar[list[bool] | None] = ContextVar("broken", default=None)


def break_off() -> None:
    """Said by whoever ends a stream with an error."""
    if (told := _broken.get()) is not None:
        told.append(True)


@contextmanager
def told_of_breaks() -> Iterator[list[bool]]:
    """A list that is empty as long as no answer of this task, or of those that it starts, has broken off."""
    told: list[bool] = []
    token = _broken.set(told)
    try:
        yield told
    finally:
        _broken.reset(token)
