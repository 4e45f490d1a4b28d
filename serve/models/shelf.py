"""What the door knows of names that there may be thousands of: a copy that asks the registry for changes only."""

import asyncio
from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

from metasepia.registry.entries import SHARED, Artefact, Kind
from serve.parts import Catalogue

T = TypeVar("T")
_PAGE = 500
"""Entries read at once; at least 3, so that a page has two names."""


class Shelf(Generic[T]):
    """Everything of one kind that an owner can see, of each the little that its user keeps.

    As true as the registry at the moment of asking: every question costs one call, which brings what has changed.
    """

    def __init__(self, catalogue: Catalogue, kind: Kind, owner: str, keep: Callable[[Artefact], T]) -> None:
        self._catalogue, self._owner, self._keep = catalogue, owner, keep
        self._kind: Kind = kind
        self._kept: dict[tuple[str, str], T] = {}
        self._seen: Mapping[str, T] = {}
        self._revision: tuple[int, int] | None = None
        self._turn = asyncio.Lock()

    async def all(self) -> Mapping[str, T]:
        """By name, in order; an owner's own hides the shared one. The same object while nothing changes."""
        async with self._turn:  # whoever waits asks again after: it may have come for a later change
            changes = await self._catalogue.changes(self._kind, self._owner, self._revision)
            if changes.names is None:
                self._kept = {(one.owner, one.name): self._keep(one) for one in await self._everything()}
            else:
                for owner_and_name in changes.names:
                    self._kept.pop(owner_and_name, None)
                for one in changes.live:
                    self._kept[one.owner, one.name] = self._keep(one)
            if changes.names is None or changes.names:
                shared = {name: kept for (owner, name), kept in self._kept.items() if owner == SHARED}
                own = {name: kept for (owner, name), kept in self._kept.items() if owner != SHARED}
                self._seen = dict(sorted((shared | own).items()))
            self._revision = changes.revision
            return self._seen

    async def _everything(self) -> list[Artefact]:
        return await everything(self._catalogue, self._kind, self._owner)


async def everything(catalogue: Catalogue, kind: Kind, owner: str) -> list[Artefact]:
    """All live entries, page by page; a name may stand twice, the owner's own beside the shared one."""
    found: dict[tuple[str, str], Artefact] = {}
    after = ""
    while True:
        page = await catalogue.list(kind, owner, after=after, limit=_PAGE)
        found |= {(one.owner, one.name): one for one in page}
        if len(page) < _PAGE:
            return list(found.values())
        # The page may have been cut between two entries of its last name: that one is read again.
        names = list(dict.fromkeys(one.name for one in page))
        after = names[-2]


async def page_of(catalogue: Catalogue, kind: Kind, owner: str, after: str, limit: int) -> tuple[list[Artefact], bool]:
    """Up to `limit` names behind `after` as the owner sees them, each once, and whether there are more."""
    rows = await catalogue.list(kind, owner, after=after, limit=2 * limit + 1)  # a name has two entries at most
    seen: dict[str, Artefact] = {}
    for one in rows:
        if one.name not in seen or one.owner != SHARED:
            seen[one.name] = one
    return list(seen.values())[:limit], len(seen) > limit
