"""The nearest of all registered task embeddings: exact, of vectors that are kept at hand as far as memory goes."""

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from metasepia.embedding.space import TaskEmbedding
from metasepia.errors import MetasepiaError
from metasepia.registry.entries import Artefact
from serve.models.shelf import Shelf
from serve.parts import Catalogue

BLOBS_AT_ONCE = 64


@dataclass(frozen=True, kw_only=True)
class Nearest:
    """What is near a task, and how many were looked at."""

    found: tuple[dict[str, Any], ...]
    """`id`, `name`, `kind`, `expert`, `cosine`; the nearest first, equals by id."""
    compared: int
    """Tasks of the same space, and of the kind asked for."""
    elsewhere: Mapping[str, int]
    """Tasks of other spaces, which cannot be compared, by the space's digest."""


@dataclass(frozen=True)
class _Entry:
    """What an embedding's card says of it."""

    id: str
    digest: str
    kind: str
    expert: str | None
    space: str
    dims: int

    @property
    def num_bytes(self) -> int:
        return 4 * self.dims


class TaskIndex:
    """A copy of the registry's embeddings, brought up to date by each question."""

    def __init__(self, catalogue: Catalogue, owner: str, max_mib: float) -> None:
        self._catalogue, self._max_bytes = catalogue, int(max_mib * 2**20)
        self._shelf: Shelf[_Entry | None] = Shelf(catalogue, "embedding", owner, _entry)
        self._seen: Mapping[str, _Entry | None] | None = None
        self._tables: dict[str, _Table] = {}
        self._turn = asyncio.Lock()

    @property
    def num_bytes(self) -> int:
        """Of the vectors that are kept."""
        return sum(one.num_bytes for one in self._tables.values())

    @property
    def num_kept(self) -> int:
        return sum(len(one) for one in self._tables.values())

    async def nearest(
        self,
        query: TaskEmbedding,
        *,
        k: int,
        kind: str | None = None,
        with_expert: bool = False,
        without: str | None = None,
    ) -> Nearest:
        """The `k` nearest of the query's space. `without`: the id of one that is left out."""
        async with self._turn:
            seen = await self._shelf.all()
            await self._refresh(seen)
            entries = [one for one in seen.values() if one is not None]
            table = self._tables.get(query.space.digest)
            kept = {} if table is None else await asyncio.to_thread(table.cosines, query.vector)
        wanted = [
            one
            for one in entries
            if one.space == query.space.digest
            and one.id != without
            and kind in (None, one.kind)
            and (one.expert is not None or not with_expert)
        ]
        found = [(kept[one.digest], one) for one in wanted if one.digest in kept]
        found += await self._read([one for one in wanted if one.digest not in kept], query)
        found.sort(key=lambda one: (-one[0], one[1].id))
        elsewhere: dict[str, int] = {}
        for one in entries:
            if one.space != query.space.digest:
                elsewhere[one.space] = elsewhere.get(one.space, 0) + 1
        return Nearest(found=tuple(_json(*one) for one in found[:k]), compared=len(found), elsewhere=elsewhere)

    async def _refresh(self, seen: Mapping[str, _Entry | None]) -> None:
        """Drops what is gone and brings what is new, as long as there is room."""
        if seen is self._seen:
            return
        alive = {one.digest: one for one in seen.values() if one is not None}
        for table in self._tables.values():
            table.keep_only(alive)
        known = {digest for table in self._tables.values() for digest in table.rows}
        room = self._max_bytes - self.num_bytes
        new: list[_Entry] = []
        for digest, one in alive.items():
            if digest not in known and one.num_bytes <= room:
                room -= one.num_bytes
                new.append(one)
        async for entry, embedding in self._blobs(new):
            table = self._tables.setdefault(entry.space, _Table(len(embedding.vector)))
            table.add(entry.digest, embedding.vector)
        self._tables = {space: table for space, table in self._tables.items() if len(table)}
        self._seen = seen

    async def _read(self, entries: Sequence[_Entry], query: TaskEmbedding) -> list[tuple[float, _Entry]]:
        """Of those that there is no room for."""
        found: list[tuple[float, _Entry]] = []
        async for entry, embedding in self._blobs(entries):
            found.append((_cosine(embedding.vector @ query.vector), entry))
        return found

    async def _blobs(self, entries: Sequence[_Entry]) -> AsyncIterator[tuple[_Entry, TaskEmbedding]]:
        """(entry, embedding) of each; one that was deleted meanwhile, or is damaged, is left out."""
        for begin in range(0, len(entries), BLOBS_AT_ONCE):
            part = entries[begin : begin + BLOBS_AT_ONCE]
            blobs = await asyncio.gather(*(self._catalogue.get(one.digest) for one in part), return_exceptions=True)
            for entry, blob in zip(part, blobs, strict=True):
                if isinstance(blob, BaseException):
                    if not isinstance(blob, LookupError | ValueError):
                        raise blob  # the registry is away: better no answer than half of one
                    continue
                try:
                    yield entry, TaskEmbedding.from_bytes(blob)
                except MetasepiaError:
                    continue


class _Table:
    """The vectors of one space, in one array with room to grow."""

    def __init__(self, dims: int) -> None:
        self.rows: dict[str, int] = {}
        """By digest."""
        self._vectors = np.empty((16, dims), np.float32)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def num_bytes(self) -> int:
        return len(self.rows) * self._vectors.shape[1] * 4

    def add(self, digest: str, vector: np.ndarray) -> None:
        row = len(self.rows)
        if row == len(self._vectors):
            self._vectors = np.concatenate([self._vectors, np.empty_like(self._vectors[: max(16, row // 2)])])
        self._vectors[row] = vector
        self.rows[digest] = row

    def keep_only(self, digests: Iterable[str]) -> None:
        alive = set(digests)
        if all(digest in alive for digest in self.rows):
            return
        kept = [(digest, row) for digest, row in self.rows.items() if digest in alive]
        rows = [row for _, row in kept]
        self._vectors = np.concatenate([self._vectors[rows], np.empty((16, self._vectors.shape[1]), np.float32)])
        self.rows = {digest: place for place, (digest, _) in enumerate(kept)}

    def cosines(self, vector: np.ndarray) -> dict[str, float]:
        found = self._vectors[: len(self.rows)] @ vector
        return {digest: _cosine(found[row]) for digest, row in self.rows.items()}


def _cosine(value: Any) -> float:
    return float(np.clip(value, -1, 1))


def _entry(artefact: Artefact) -> _Entry | None:
    """None for a job that is not done, and for a card that says too little."""
    card: dict[str, Any] = artefact.card
    space, dims, kind, expert = card.get("space"), card.get("dims"), card.get("kind"), card.get("expert")
    if card.get("status") != "done" or not isinstance(space, str) or not isinstance(dims, int):
        return None
    expert = expert if isinstance(expert, str) else None
    return _Entry(artefact.name, artefact.digest, str(kind), expert, space, dims)


def _json(cosine: float, entry: _Entry) -> dict[str, Any]:
    return {
        "id": entry.id,
        "name": entry.id,
        "kind": entry.kind,
        "cosine": round(cosine, 6),
        "expert": entry.expert,
    }
