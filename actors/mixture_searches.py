"""Few-shot searches as jobs: queued, run one at a time, written down each generation, resumed after any death.

A job is two entries of the registry's kind `search`: what was asked, under its digest, and under the job's id a
checkpoint whose card says how far it is. Both are there before the job is acknowledged. Its rows have a priority below
zero, few of them are asked for at a time, and one that finds no room waits: a search gives way to everybody.
"""

import asyncio
import hashlib
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from actors.yielding import Rows, Yielding
from metasepia.errors import MetasepiaError, Outdated, Overloaded, Unavailable
from metasepia.registry.entries import Artefact
from metasepia.rows import Adapter
from metasepia.search.cross_entropy import Generation
from metasepia.search.fewshot import search, split
from metasepia.search.jobs import ID, Progress, SearchJob, found_json, job_shots
from metasepia.search.picture import picture

T = TypeVar("T")

logger = logging.getLogger("metasepia.search")

MAX_FINISHED = 100
"""Finished jobs that are kept; the oldest are deleted when a new one comes."""


@dataclass(frozen=True, kw_only=True)
class Searched:
    """One backbone that can be searched on."""

    id: str
    digest: str
    rows: Rows
    text_of: Callable[[Sequence[int]], str]


class Catalogue(Protocol):
    """What is used of `actors.registry.RegistryClient`."""

    async def resolve(self, kind: Any, name: str, owner: str) -> Artefact: ...
    async def get(self, digest: str, owner: str | None = None) -> bytes: ...
    async def list(self, kind: Any, owner: str, *, after: str = "", limit: int = 1000) -> Sequence[Artefact]: ...
    async def put(
        self,
        kind: Any,
        blob: bytes,
        *,
        digest: str,
        name: str | None,
        owner: str,
        card: dict[str, object] | None = None,
        replace: bool = True,
    ) -> Artefact: ...
    async def delete(self, kind: Any, name: str, owner: str) -> Artefact: ...


Register = Callable[[SearchJob, Adapter, Mapping[str, object]], Awaitable[str]]
"""Registers the mixture that a job found, with what its card says of the search; its digest."""


class Searches:
    """The jobs of one owner. All methods belong to one event loop."""

    def __init__(
        self,
        catalogue: Catalogue,
        backbones: Mapping[str, Searched],
        register: Register,
        *,
        owner: str,
        max_unfinished: int,
        turn: asyncio.Semaphore | None = None,
    ) -> None:
        """`backbones` by digest. `turn`: of those, of other owners too, that run one after another."""
        self._catalogue, self._backbones, self._register = catalogue, dict(backbones), register
        self._owner, self._max_unfinished = owner, max_unfinished
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._writing: dict[str, asyncio.Task[Artefact]] = {}
        self._turn = turn or asyncio.Semaphore(1)
        self._submitting = asyncio.Lock()

    async def recover(self) -> int:
        """Goes on with every job that was not finished when this process began, oldest first; how many."""
        unfinished = [one for one in await self._jobs() if _is_unfinished(one)]
        for one in sorted(unfinished, key=lambda one: (str(one.card["created_unix_s"]), one.name)):
            self._spawn(one.name)
        return len(unfinished)

    async def submit(self, job: SearchJob) -> dict[str, Any]:
        """Queues a search, durable when this returns. The same request again is the same job: one that runs or is done
        is answered as it stands, one that failed or was cancelled goes on from its checkpoint.

        Raises Overloaded when `max_unfinished` jobs wait or run, and what `split` raises.
        """
        split(job.shots(str), job.num_shots, job.settings.seed)  # all that can be wrong with the examples
        async with self._submitting:
            jobs = await self._jobs()
            known = next((one for one in jobs if one.name == job.id), None)
            if known is not None and known.card["status"] in ("queued", "running", "done"):
                return self._json(known)
            if sum(map(_is_unfinished, jobs)) >= self._max_unfinished:
                raise Overloaded("the queue of searches", 30.0)
            finished = sorted(
                (one for one in jobs if not _is_unfinished(one) and one.name != job.id),
                key=lambda one: one.created_unix_s,
            )
            for old in finished[: max(0, len(finished) - MAX_FINISHED + 1)]:
                await self._catalogue.delete("search", old.name, self._owner)
            await self._catalogue.put(
                "search", job.to_bytes(), digest=job.digest, name=None, owner=self._owner, card={}
            )
            progress = Progress(job.begin()) if known is None else await self._progress(known)
            card = self._card(job) if known is None else {**known.card, "status": "queued", "error": None}
            written = await self._write(job.id, progress, card)
            self._spawn(job.id)
            return self._json(written)

    async def get(self, id_: str) -> dict[str, Any]:
        """Raises UnknownName."""
        return self._json(await self._find(id_))

    async def listing(self) -> list[dict[str, Any]]:
        """The newest first."""
        jobs = sorted(await self._jobs(), key=lambda one: str(one.card["created_unix_s"]), reverse=True)
        return [self._json(one) for one in jobs]

    async def trace(self, id_: str) -> list[dict[str, Any]]:
        """An entry a generation. Raises UnknownName."""
        progress = await self._progress(await self._find(id_))
        return [dict(one) for one in progress.trace]

    async def picture(self, id_: str) -> bytes:
        """SVG. Raises UnknownName."""
        found = await self._find(id_)
        job = await self._job(found)
        return picture(job.names, (await self._progress(found)).trace, job.by)

    async def cancel(self, id_: str) -> dict[str, Any]:
        """Ends a job that waits or runs, and keeps what it has; one that is finished stays as it is."""
        found = await self._find(id_)
        task = self._tasks.pop(id_, None)
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            # Its last checkpoint may still be on its way, and must not come after the word that it was cancelled.
            await asyncio.gather(*filter(None, [self._writing.get(id_)]), return_exceptions=True)
            found = await self._find(id_)
        if _is_unfinished(found):
            found = await self._write(id_, await self._progress(found), {**found.card, "status": "cancelled"})
        return self._json(found)

    async def stop(self) -> None:
        """Drops the tasks and leaves the jobs to whoever recovers them."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # -- running -------------------------------------------------------------------------------------------------------

    def _spawn(self, id_: str) -> None:
        task = asyncio.create_task(self._run(id_), name=id_)
        self._tasks[id_] = task

        def ended(one: asyncio.Task[None]) -> None:
            if self._tasks.get(id_) is one:
                del self._tasks[id_]

        task.add_done_callback(ended)

    async def _run(self, id_: str) -> None:
        async with self._turn:
            try:
                found = await self._patiently(lambda: self._find(id_))
                job = await self._patiently(lambda: self._job(found))
                progress = await self._patiently(lambda: self._progress(found))
                card = {**found.card, "status": "running"}
                await self._patiently(lambda: self._write(id_, progress, card))
                backbone = self._backbones.get(job.backbone)
                if backbone is None:
                    raise Outdated(f"search {id_}", "backbone", job.backbone, tuple(self._backbones))
                await self._search(job, backbone, progress, card)
            except Exception as error:
                await self._fail(id_, error)

    async def _fail(self, id_: str, error: Exception) -> None:
        if not isinstance(error, MetasepiaError):
            logger.error("search %s failed", id_, exc_info=error)
        why = str(error) if isinstance(error, MetasepiaError) else f"an unexpected {type(error).__name__}"
        try:
            now = await self._patiently(lambda: self._find(id_))
            kept = await self._patiently(lambda: self._catalogue.get(now.digest, self._owner))
            await self._patiently(lambda: self._put(id_, kept, {**now.card, "status": "failed", "error": why}))
        except MetasepiaError as other:
            logger.error("search %s: that it failed could not be written down: %s", id_, other)

    async def _search(self, job: SearchJob, backbone: Searched, progress: Progress, card: dict[str, Any]) -> None:
        shots, held_out = split(job.shots(backbone.text_of), job.num_shots, job.settings.seed)
        now = progress

        async def told(generation: Generation) -> None:
            nonlocal now
            now = now.told(generation)
            # Its state is the search's own object: written down here, before the next generation changes it.
            written = {**card, **_progress_json(now, job)}
            await self._patiently(lambda: self._write(job.id, now, written))

        rows = Yielding(backbone.digest, backbone.rows)
        found = await search(rows, shots, held_out, now.state, job.scoring, told=told)
        result = found_json(found, job, len(held_out))
        facts: dict[str, object] = {"search": {"id": job.id, "job": job.digest, **result}}
        mixture = await self._patiently(lambda: self._register(job, found.adapter, facts))
        done = {**card, **_progress_json(now, job), "status": "done"}
        done["result"] = {"mixture": mixture, "model": f"{backbone.id}:mix@{mixture}", **result}
        await self._patiently(lambda: self._write(job.id, now, done))

    async def _patiently(self, ask: Callable[[], Awaitable[T]]) -> T:
        """The registry's answer, however long it is away."""
        while True:
            try:
                return await ask()
            except Unavailable as error:
                await asyncio.sleep(min(error.retry_after_s, 5.0))

    # -- the registry --------------------------------------------------------------------------------------------------

    async def _jobs(self) -> list[Artefact]:
        jobs: list[Artefact] = []
        after = ID
        while True:
            page = await self._catalogue.list("search", self._owner, after=after, limit=1000)
            jobs += [one for one in page if one.name.startswith(ID)]
            if len(page) < 1000:
                return jobs
            after = page[-1].name

    async def _find(self, id_: str) -> Artefact:
        return await self._catalogue.resolve("search", id_, self._owner)

    async def _job(self, found: Artefact) -> SearchJob:
        return SearchJob.from_bytes(await self._catalogue.get(str(found.card["job"]), self._owner))

    async def _progress(self, found: Artefact) -> Progress:
        return Progress.from_bytes(await self._catalogue.get(found.digest, self._owner))

    async def _write(self, id_: str, progress: Progress, card: dict[str, Any]) -> Artefact:
        return await self._put(id_, progress.to_bytes(), card)

    async def _put(self, id_: str, blob: bytes, card: dict[str, Any]) -> Artefact:
        digest = hashlib.sha256(blob).hexdigest()
        put = self._catalogue.put("search", blob, digest=digest, name=id_, owner=self._owner, card=card)
        task = self._writing[id_] = asyncio.ensure_future(put)
        task.add_done_callback(lambda one: self._writing.pop(id_, None) if self._writing.get(id_) is one else None)
        return await asyncio.shield(task)

    def _card(self, job: SearchJob) -> dict[str, Any]:
        return {
            "status": "queued",
            "created_unix_s": round(time.time(), 3),
            "job": job.digest,
            "backbone": self._backbones[job.backbone].id,
            "experts": [name for name, _ in job.candidates],
            "score": job.by,
            "start": job.start_json,
            "per_layer": job.settings.per_layer,
            "population": job.settings.population,
            "max_generations": job.settings.generations,
            "shots": job_shots(job),
            "held_out": len(job.examples) - job_shots(job),
            "generations": 0,
            "evaluations": 0,
            "best": None,
            "result": None,
            "error": None,
        }

    def _json(self, found: Artefact) -> dict[str, Any]:
        return {"id": found.name, "object": "mixture.search", "checkpoint": found.digest, **found.card}


def _is_unfinished(found: Artefact) -> bool:
    return found.card["status"] in ("queued", "running")


def _progress_json(progress: Progress, job: SearchJob) -> dict[str, Any]:
    last = progress.trace[-1] if progress.trace else None
    best = None
    if last is not None:
        value, likelihood = last["scores"][last["best"]]
        weights = dict(zip(job.names, last["weights"], strict=True))
        best = {"value": value, "likelihood": likelihood, "weights": weights}
    return {"generations": progress.state.generation, "evaluations": progress.state.evaluations, "best": best}
