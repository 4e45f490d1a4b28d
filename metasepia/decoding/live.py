"""The rows that decode, with their keys and values, in bands of about equal length.

All rows of one `RowCache` pay for the columns of its longest. On a CPU reading those columns costs as much as reading
the weights once rows are a few hundred tokens long, so rows are kept in bands, each with a cache of its own, and each
band's attention is an operator of its own: cheaper than padding from a few dozen columns on, and far simpler than
pages (which need a gather a layer and step; torch has no kernel for them on a CPU). A row that outgrows
its band is copied to the next, once for each doubling of its length.
"""

import bisect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from metasepia.decoding.cache import RowCache, Segment
from metasepia.decoding.steps import NewRow

BANDS = (64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
"""Longest rows of each band but the last."""


@dataclass
class LiveRow:
    """A row that decodes."""

    new: NewRow
    length: int
    """Tokens whose keys are in the cache."""


class LiveRows:
    """Rows in the order in which a batch holds them: band after band."""

    def __init__(self, bounds: Sequence[int] = BANDS, *, keys_by_dim: bool = False) -> None:
        """`bounds`: the longest row of each band but the last; none for models that take all rows in one cache."""
        self._bounds, self._keys_by_dim = tuple(bounds), keys_by_dim
        self._caches = [self._cache() for _ in range(len(bounds) + 1)]
        self._rows: list[list[LiveRow]] = [[] for _ in self._caches]

    def __iter__(self) -> Iterator[LiveRow]:
        return (row for rows in self._rows for row in rows)

    def __len__(self) -> int:
        return sum(map(len, self._rows))

    def join(self, rows: Sequence[tuple[NewRow, int]], source: RowCache) -> None:
        """Takes rows whose prompts were read: each with its row of `source`, where it ends at the last column."""
        by_band: dict[int, list[tuple[NewRow, int]]] = {}
        for one in rows:
            by_band.setdefault(self._band_of(len(one[0].token_ids)), []).append(one)
        for band, joining in by_band.items():
            self._reserve(band, len(joining), max(len(new.token_ids) for new, _ in joining))
            for new, index in joining:
                self._caches[band].join(source, index, len(new.token_ids))
                self._rows[band].append(LiveRow(new, len(new.token_ids)))

    def leave(self, leaves: Callable[[LiveRow], bool]) -> None:
        """Drops the rows of which `leaves` says so."""
        for band, rows in enumerate(self._rows):
            for index in reversed([i for i, row in enumerate(rows) if leaves(row)]):
                self._remove(band, index)

    def segments(self) -> list[Segment]:
        """The bands in use, each with room for one more column a row. Call it before each step."""
        for band, bound in enumerate(self._bounds):
            for index in reversed([i for i, row in enumerate(self._rows[band]) if row.length > bound]):
                row = self._rows[band][index]
                self._reserve(band + 1, 1, row.length)
                self._caches[band + 1].join(self._caches[band], index, row.length)
                self._rows[band + 1].append(row)
                self._remove(band, index)
        found = []
        for band, rows in enumerate(self._rows):
            if rows:
                self._reserve(band, 0, 0)
                longest = self._caches[band].width
                found.append(Segment(self._caches[band], [longest - row.length for row in rows]))
        return found

    def extend(self) -> None:
        """Keeps the column that the last step wrote."""
        for cache, rows in zip(self._caches, self._rows, strict=True):
            if rows:
                cache.extend(1)
            for row in rows:
                row.length += 1

    def _band_of(self, length: int) -> int:
        return bisect.bisect_left(self._bounds, length)

    def _reserve(self, band: int, num_new: int, longest: int) -> None:
        rows, cache = self._rows[band], self._caches[band]
        if rows:
            cache.trim(max(row.length for row in rows))
        cache.reserve(len(rows) + num_new, max(longest, cache.width))

    def _remove(self, band: int, index: int) -> None:
        rows, cache = self._rows[band], self._caches[band]
        cache.leave(index)
        last = rows.pop()
        if index < len(rows):
            rows[index] = last
        if not rows:
            self._caches[band] = self._cache()

    def _cache(self) -> RowCache:
        return RowCache(0, 0, keys_by_dim=self._keys_by_dim)
