"""The owner's part in a gang's experts: it brings what the scheduler asks for, from files or the registry, and pins.

Which experts the ranks hold is decided by rank 0's scheduler (`metasepia.decoding.leases`); nothing of that is kept
here, so the next gang begins anew and asks for what its rows need.
"""

import asyncio
import contextlib
import inspect
import logging
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

from ray.exceptions import RayError, RayTaskError

from actors.gang import Gang, Pinned
from cluster.settings import BackboneSettings
from metasepia.decoding.leases import Moves
from metasepia.digests import is_digest, short
from metasepia.errors import InvalidSettings, MetasepiaError, Unavailable, UnknownName

logger = logging.getLogger("metasepia.gang")

Fetch = Callable[[str], bytes | Awaitable[bytes]]
"""Bytes of an expert by digest; raises UnknownName."""
Resolve = Callable[[str], str | Awaitable[str]]
"""The digest that an expert's name stands for now; raises UnknownName."""


class GangExperts:
    """Brings experts to whichever gang asks. All methods belong to one event loop."""

    def __init__(self, settings: BackboneSettings, fetch: Fetch | None, resolve: Resolve | None) -> None:
        self._settings, self._fetch, self._resolve = settings, fetch, resolve
        self._paths: dict[str, Path] = {}
        self._moving: dict[tuple[Gang, str], asyncio.Task[None]] = {}
        self.served: Pinned | None = None
        """The pin of the last gang that started."""

    async def put(self, gang: Gang | None, digest: str, path: Path) -> None:
        """An expert from a file, for this gang and those that come. Raises CorruptArtefact, and forgets it then."""
        self._paths[digest] = path
        if gang is None:
            return
        task = self._then(gang, digest, lambda: self._give(gang, digest))
        try:
            await asyncio.shield(task)
        except RayTaskError as error:
            del self._paths[digest]
            await gang.take_back_expert(digest)
            raise cause(error) from None
        except RayError:
            return  # rows of the next gang ask for it

    def follow(self, gang: Gang, moves: Moves) -> None:
        """Does what the gang's scheduler asks, of one expert in the order in which it was asked."""
        for digest in moves.unwanted:
            self._then(gang, digest, lambda digest=digest: self._take_back(gang, digest))
        for digest in moves.wanted:
            self._then(gang, digest, lambda digest=digest: self._bring(gang, digest))

    async def stop(self) -> None:
        for task in list(self._moving.values()):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task

    # -- one expert ----------------------------------------------------------------------------------------------------

    def _then(self, gang: Gang, digest: str, work: Callable[[], Coroutine[Any, Any, None]]) -> "asyncio.Task[None]":
        """After what is under way with this expert. Later moves of it never overtake earlier ones."""
        key = (gang, digest)
        before = self._moving.get(key)

        async def in_turn() -> None:
            if before is not None:
                await asyncio.wait({before})
            await work()

        task = self._moving[key] = asyncio.create_task(in_turn())

        def ended(task: "asyncio.Task[None]") -> None:
            if self._moving.get(key) is task:
                del self._moving[key]
            if not task.cancelled():
                task.exception()  # whoever waits for it has it; nobody else need

        task.add_done_callback(ended)
        return task

    async def _take_back(self, gang: Gang, digest: str) -> None:
        with contextlib.suppress(RayError):
            await gang.take_back_expert(digest)

    async def _bring(self, gang: Gang, digest: str) -> None:
        try:
            await self._give(gang, digest)
            return
        except RayTaskError as error:
            reason: Exception = cause(error)
        except RayError:
            return  # the gang died: its rows go to the next one, whose scheduler asks again
        except Exception as error:  # whatever it is, the rows that wait must hear of it
            reason = error
        if not isinstance(reason, MetasepiaError):
            logger.error("gang %s: expert %s cannot be brought: %r", self._settings.id, short(digest), reason)
            reason = Unavailable(f"expert {short(digest)} ({type(reason).__name__}: {reason})", 5.0)
        with contextlib.suppress(RayError):
            await gang.take_back_expert(digest)  # some ranks may have it
            await gang.rank0.refuse_expert.remote(digest, reason)

    async def _give(self, gang: Gang, digest: str) -> None:
        await gang.put_expert(digest, await self._read(digest))

    async def _read(self, digest: str) -> bytes:
        if digest in self._paths:
            return await asyncio.to_thread(self._paths[digest].read_bytes)
        if self._fetch is None:
            raise UnknownName("expert", digest, tuple(sorted(self._paths)))
        fetched = self._fetch(digest)
        return await fetched if inspect.isawaitable(fetched) else fetched

    # -- the pin -------------------------------------------------------------------------------------------------------

    async def pinned(self) -> Pinned | None:
        """The expert that the settings pin, resolved now; None where they pin none.

        The one that served last where the name stands for nothing any more. Raises InvalidSettings, naming it, when
        none did.
        """
        name = self._settings.pinned
        if not name:
            return None
        try:
            digest = name if is_digest(name) else await self._digest(name)
            return Pinned(digest, await self._read(digest))
        except (MetasepiaError, OSError) as error:
            if self.served is None:
                raise self.bad_pin(error) from error
            logger.error("gang %s: pin %s: %s; keeping the one before", self._settings.id, name, error)
            return self.served

    def bad_pin(self, error: Exception) -> InvalidSettings:
        field = f"backbones[{self._settings.id}].pinned"
        return InvalidSettings(field, self._settings.pinned, f"an expert that this backbone can serve ({error})")

    async def _digest(self, name: str) -> str:
        if self._resolve is None:
            raise UnknownName("expert", name, tuple(sorted(self._paths)))
        found = self._resolve(name)
        return await found if inspect.isawaitable(found) else found


def cause(error: RayTaskError) -> Exception:
    """What a rank raised, without Ray's wrapping."""
    return error.cause if isinstance(error.cause, Exception) else error
