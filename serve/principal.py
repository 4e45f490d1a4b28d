"""Who asks: the tenant of the request that this task serves, known anywhere behind the door.

The layer that checks keys sets it, once a request; a task that a request starts keeps it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal, get_args

from metasepia.registry.entries import LOCAL

Scope = Literal["infer", "contexts", "experts:write", "admin"]
"""What a key may do; `admin` may do everything."""


@dataclass(frozen=True)
class Principal:
    """One tenant, by one of its keys."""

    tenant: str
    """The owner of what it makes in the registry."""
    scopes: frozenset[Scope]
    key_id: str | None = None
    """Public part of the key; None where the door has no keys."""


ANYONE = Principal(LOCAL, frozenset(get_args(Scope)))
"""Every request, while the door has no keys."""

_asking: ContextVar[Principal] = ContextVar("principal", default=ANYONE)


def current() -> Principal:
    """Of the request that this task serves; ANYONE outside of requests."""
    return _asking.get()


@contextmanager
def asking(principal: Principal) -> Iterator[None]:
    """`current()` inside."""
    token = _asking.set(principal)
    try:
        yield
    finally:
        _asking.reset(token)
