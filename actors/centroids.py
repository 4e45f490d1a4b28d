"""The one place of a graph's online centroids; all mathematics is in metasepia.centroids.

Gateways come and go and there may be several, so each adds up what it sees and sends the sums here. There is one such
place, in the part that mixes experts: that is a single replica too, on no request's way, and a process of its own would
take a laptop 150 MB and seconds of its start for a few vectors.

Saved every `save_every_s` while something comes, and at an orderly end, in one file that is replaced whole. So a kill
loses what came since: at most `save_every_s` and the time of one write. What was saved survives the process and, once
`save` has returned, the machine. A part that comes back on another node finds its file where `home` is shared.
"""

import asyncio
import contextlib
import logging
import os
import threading
from collections.abc import Sequence
from pathlib import Path

from cluster.settings import CentroidSettings
from metasepia.centroids import Centroid, CentroidFacts, CentroidKey, KnownMean, OnlineCentroids
from metasepia.errors import CorruptArtefact
from metasepia.local_disk import sync_directory
from metasepia.registry.entries import LOCAL

logger = logging.getLogger("metasepia.centroids")

FILE = "online.safetensors"
BROKEN = ".broken"
"""Ends the name of a file that could not be read and was put aside."""

Seen = tuple[tuple[CentroidKey, Centroid], ...]
"""What a gateway has added up."""


class TenantsCentroids:
    """Each tenant's online centroids, in a file of its own: the limits are each one's, and no name meets another's.

    Tenants are made by whoever runs the door, one at a time; each takes what its tasks take.
    """

    def __init__(self, settings: CentroidSettings, directory: Path) -> None:
        self._settings, self._directory = settings, directory
        self._own: dict[str, Centroids] = {}

    async def check_room(self, owner: str, keys: Sequence[CentroidKey]) -> None:
        await self._of(owner).check_room(keys)

    async def absorb(self, owner: str, seen: Seen) -> tuple[CentroidFacts, ...]:
        return await self._of(owner).absorb(seen)

    async def compare(self, owner: str, seen: Seen) -> tuple[tuple[CentroidFacts, float], ...]:
        return await self._of(owner).compare(seen)

    async def facts(self, owner: str) -> tuple[CentroidFacts, ...]:
        return await self._of(owner).facts()

    async def forget(self, owner: str, task: str) -> int:
        return await self._of(owner).forget(task)

    async def known_means(self, owner: str, backbone: str) -> tuple[KnownMean, ...]:
        return await self._of(owner).known_means(backbone)

    async def stop(self) -> None:
        """Saves what is not saved yet."""
        for one in self._own.values():
            await one.stop()

    def _of(self, owner: str) -> "Centroids":
        if owner not in self._own:
            directory = self._directory if owner == LOCAL else self._directory / "tenants" / owner
            self._own[owner] = Centroids(self._settings, directory)
        return self._own[owner]


class Centroids:
    """One tenant's online centroids with their file. All methods but `save` belong to one event loop."""

    def __init__(self, settings: CentroidSettings, directory: Path) -> None:
        """Goes on from the file in `directory`, if there is one; one that is damaged is put aside and told."""
        self._settings, self._file = settings, directory / FILE
        self._kept = self._restored()
        self._num_changes = self._num_saved = 0
        self._writing = threading.Lock()
        self._saver: asyncio.Task[None] | None = None

    def _restored(self) -> OnlineCentroids:
        try:
            return OnlineCentroids.of_file(str(self._file), self._settings.limits)
        except FileNotFoundError:
            pass
        except CorruptArtefact as error:
            aside = self._file.with_name(self._file.name + BROKEN)
            logger.error("%s; it is kept as %s, and the centroids begin anew", error, aside)
            self._file.replace(aside)
        return OnlineCentroids(self._settings.limits)

    async def check_room(self, keys: Sequence[CentroidKey]) -> None:
        """Raises InvalidRequest, naming `task`, where the limits leave no room for the keys."""
        self._kept.check_room(keys)

    async def absorb(self, seen: Seen) -> tuple[CentroidFacts, ...]:
        """Adds what a gateway has seen, and tells how these centroids stand then. What finds no room is left out.

        Not to be repeated: the same states would count twice. A caller that is not answered lets them go.
        """
        self._kept.merge(seen)
        self._changed()
        return self._kept.facts(key for key, _ in seen)

    async def compare(self, seen: Seen) -> tuple[tuple[CentroidFacts, float], ...]:
        """How centroids stand, and how far from each the mean of `seen` is, in spreads; nothing is added."""
        points = {key: one.total.mean for key, one in seen}
        return tuple((fact, self._kept[fact.key].distance(points[fact.key])) for fact in self._kept.facts(points))

    async def facts(self) -> tuple[CentroidFacts, ...]:
        """Of all, in order."""
        return self._kept.facts()

    async def forget(self, task: str) -> int:
        """Drops a task, at once also on disk; returns how many centroids it had."""
        num_gone = self._kept.forget(task)
        if num_gone:
            self._changed()
            await self.save()
        return num_gone

    async def known_means(self, backbone: str) -> tuple[KnownMean, ...]:
        """What `auto` may route by, on the backbone of this digest."""
        return self._kept.known_means(backbone, self._settings.min_count)

    # -- on disk -------------------------------------------------------------------------------------------------------

    def _changed(self) -> None:
        self._num_changes += 1
        if self._saver is None or self._saver.done():
            self._saver = asyncio.create_task(self._save_while_changing())

    async def _save_while_changing(self) -> None:
        while self._num_saved < self._num_changes:
            await asyncio.sleep(self._settings.save_every_s)
            with contextlib.suppress(OSError):  # told; the next change tries again
                await self.save()

    async def save(self) -> None:
        """Writes the file anew if something has changed. Raises OSError, having logged it: a full disk, say."""
        number = self._num_changes
        if number == self._num_saved:
            return
        blob = self._kept.to_bytes()
        try:
            await asyncio.to_thread(self._write, number, blob)
        except OSError as error:
            logger.error("the centroids could not be saved in %s: %s", self._file, error)
            raise

    def _write(self, number: int, blob: bytes) -> None:
        with self._writing:
            if number <= self._num_saved:  # a later state was written while this one waited
                return
            self._file.parent.mkdir(parents=True, exist_ok=True)
            part = self._file.with_name(f"{self._file.name}.{os.getpid()}.part")
            try:
                with part.open("wb") as file:
                    file.write(blob)
                    file.flush()
                    os.fsync(file.fileno())
                part.replace(self._file)
            finally:
                part.unlink(missing_ok=True)
            sync_directory(self._file.parent)
            self._num_saved = number

    async def stop(self) -> None:
        """Saves what is not saved yet."""
        if self._saver is not None:
            self._saver.cancel()
        with contextlib.suppress(OSError):
            await self.save()
