"""Who asks: the tenant of the request that this task serves, known anywhere behind the door.

The layer that checks keys sets it, once a request; a task that a request starts keeps it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from metasepia.access.keys import SCOPES, Scope
from metasepia.registry.entries import LOCAL


@dataclass(frozen=True)
class Principal:
    """One tenant, by one of its keys."""

    tenant: str
    """The owner of what it makes in the registry."""
    scopes: frozenset[Scope]
    key_id: str | None = None
    """Public part of the key; None where the door has no keys."""

    def may(self, scope: Scope) -> bool:
        return scope in self.scopes or "admin" in self.scopes


Charge = Callable[[int, int], None]
"""Takes tokens read and tokens written."""

ANYONE = Principal(LOCAL, frozenset(SCOPES))
"""Every request, while the door has no keys."""

_asking: ContextVar[Principal] = ContextVar("principal", default=ANYONE)
_charging: ContextVar[Charge | None] = ContextVar("charge", default=None)


def current() -> Principal:
    """Of the request that this task serves; ANYONE outside of requests."""
    return _asking.get()


def charge(prompt_tokens: int, completion_tokens: int) -> None:
    """To the key of the request that this task serves; nothing where there is none."""
    if (told := _charging.get()) is not None:
        told(prompt_tokens, completion_tokens)


@contextmanager
def asking(principal: Principal, charge: Charge | None = None) -> Iterator[None]:
    """`current()` inside, and who is told what it uses."""
    asked, charged = _asking.set(principal), _charging.set(charge)
    try:
        yield
    finally:
        _charging.reset(charged)
        _asking.reset(asked)
