"""What the gateway keeps for each tenant, and for no two together."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

from serve.access.principal import current

T = TypeVar("T")

MAX_AT_HAND = 64
"""Tenants whose own is kept; the one that asked least recently leaves first, and is made anew when it asks again."""


class PerTenant(Generic[T]):
    """One of something for each tenant, made when the tenant first asks.

    What is kept must be a copy of what another part has, so that it may leave at any time; whoever holds one goes on
    with it.
    """

    def __init__(self, make: Callable[[str], T], most: int = MAX_AT_HAND) -> None:
        """`make` takes the tenant's name."""
        self._make, self._most = make, most
        self._kept: OrderedDict[str, T] = OrderedDict()

    def mine(self) -> T:
        """Of the tenant that asks."""
        return self.of(current().tenant)

    def of(self, tenant: str) -> T:
        if tenant not in self._kept:
            self._kept[tenant] = self._make(tenant)
            if len(self._kept) > self._most:
                self._kept.popitem(last=False)
        self._kept.move_to_end(tenant)
        return self._kept[tenant]
