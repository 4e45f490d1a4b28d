"""Task embeddings made and registered: at once where the answers are at hand, else as jobs that survive any death.

A job is one entry of the registry's kind `embedding`, there before it is acknowledged: its blob holds what was asked
and the answers so far, its card how far it is. When it is done, blob and card are those of the embedding.
"""

import asyncio
import contextlib
import hashlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np

from actors.messages import TaskAsked
from actors.mixture_searches import Catalogue
from actors.task_embedding import Task, TaskEmbedder
from cluster.settings import TaskSettings
from metasepia.blackbox.boxes import BlackBox
from metasepia.dispatch.task import KEY, MIN_TEXTS, describe
from metasepia.embedding.answers import Answers
from metasepia.embedding.jobs import TaskJob, TaskProgress, parts_of
from metasepia.embedding.methods import CONSTANT
from metasepia.embedding.space import Space, TaskEmbedding
from metasepia.errors import (
    InvalidRequest,
    MetasepiaError,
    NameTaken,
    Outdated,
    Overloaded,
    Unavailable,
    UnknownName,
    WindowExceeded,
)
from metasepia.registry.entries import Artefact
from metasepia.rows import Executed

T = TypeVar("T")

logger = logging.getLogger("metasepia.tasks")

TEXTS_A_CHECKPOINT = 64
"""Probe texts that are asked between two checkpoints; a kill loses at most so many answers."""
_PAGE = 1000


@dataclass(frozen=True)
class Opened:
    """A black box, and what was run for its last answers."""

    box: BlackBox
    executed: Callable[[], Executed | None]


class OpenBox(Protocol):
    """Makes a black box of what was asked.

    Raises InvalidRequest for a prompt that it cannot be asked with, Outdated for a model that is not served here.
    """

    def __call__(self, box: Mapping[str, Any]) -> Opened: ...


class Turns:
    """How many jobs, whoever they are of, ask a model or hold their answers at once."""

    def __init__(self, max_batch: int) -> None:
        self.asking, self.embedding = asyncio.Semaphore(1), asyncio.Semaphore(max_batch)


class TaskJobs:
    """The embeddings of one owner. All methods belong to one event loop."""

    def __init__(
        self,
        catalogue: Catalogue,
        embedder: TaskEmbedder,
        open_box: OpenBox,
        settings: TaskSettings,
        *,
        owner: str,
        turns: "Turns | None" = None,
    ) -> None:
        """`turns`: shared with other owners' jobs."""
        self._catalogue, self._embedder, self._open_box = catalogue, embedder, open_box
        self._settings, self._owner = settings, owner
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._writing: dict[str, asyncio.Task[Artefact]] = {}
        turns = turns or Turns(settings.max_batch)
        self._asking, self._embedding = turns.asking, turns.embedding
        self._submitting = asyncio.Lock()

    @property
    def num_unfinished(self) -> int:
        return len(self._tasks)

    async def recover(self) -> int:
        """Goes on with every job that was not finished when this process began, oldest first; how many."""
        unfinished = [one async for one in self._every() if is_unfinished(one)]
        for one in sorted(unfinished, key=lambda one: (str(one.card["asked_unix_s"]), one.name)):
            self._spawn(one.name)
        return len(unfinished)

    async def make(self, asked: TaskAsked) -> tuple[Artefact, bool]:
        """The task's entry, durable when this returns, and whether it was there before.

        The same request is the same entry: one that is done or on its way is answered as it stands, one that failed is
        tried again. Raises NameTaken for a name that stands for another task, InvalidRequest and WindowExceeded naming
        `texts[i]` or `replies[i]`, Overloaded, DeadlineExceeded, and what `OpenBox` raises.
        """
        method = asked.method or self._settings.method
        space = await self._embedder.space(method)
        answers, source = asked.answers, dict(asked.source)
        if answers is not None and asked.leave_out:
            answers, left = await self._fitting(answers, asked.deadline_unix_s)
            source |= {"left_out": left} if left else {}
        job = TaskJob(
            kind=asked.kind, method=method, space=space.digest, seed=asked.seed, answers=answers, box=asked.box
        )
        id_ = asked.name or job.id
        known = await self._known(id_, job)
        if known is not None and known.card["status"] != "failed":
            return await self._as_it_stands(known, asked.expert), True
        card = self._card(job, space, asked.expert, source)
        if asked.background or answers is None:
            return await self._queue(id_, job, card, asked.expert)
        embedding, card = await self._embedded(id_, job, answers, card, asked.deadline_unix_s)
        try:
            done = await self._put(id_, embedding.to_bytes(), embedding.digest, card, replace=known is not None)
        except NameTaken:  # by the same request at the same time, or by another one
            done = await self._known(id_, job)
            if done is None:
                raise
        return done, False

    async def cancel(self, id_: str) -> None:
        """Ends a job that waits or runs; nothing of it is written down after this."""
        task = self._tasks.pop(id_, None)
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await asyncio.gather(*filter(None, [self._writing.get(id_)]), return_exceptions=True)

    async def stop(self) -> None:
        """Drops the tasks and leaves the jobs to whoever recovers them."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # -- making --------------------------------------------------------------------------------------------------------

    async def _fitting(self, answers: Answers, deadline_unix_s: float) -> tuple[Answers, int]:
        """The answers to the texts that fit the surrogate's window, and how many do not.

        A text is refused before any is embedded, so halves that hold long texts are halved again at little cost.
        """

        async def fit(rows: list[int]) -> list[int]:
            if not rows:
                return []
            try:
                part = answers.only(rows) if len(rows) > 1 else answers.only(rows * 2)
                await self._embedder.text_vectors(part, deadline_unix_s)
            except WindowExceeded:
                middle = len(rows) // 2
                return [] if len(rows) == 1 else await fit(rows[:middle]) + await fit(rows[middle:])
            return rows

        if answers.is_open:
            return answers, 0
        kept = await fit([*range(answers.num_texts)])
        left = answers.num_texts - len(kept)
        if left and (len(kept) < 2 or answers.only(kept).is_constant):
            raise InvalidRequest(
                "texts",
                f"{left} of {answers.num_texts} are longer than the surrogate's window, and without them {CONSTANT}",
            )
        return (answers.only(kept) if left else answers), left

    async def _embedded(
        self, id_: str, job: TaskJob, answers: Answers, card: dict[str, Any], deadline_unix_s: float
    ) -> tuple[TaskEmbedding, dict[str, Any]]:
        """The embedding and its card. A job's own waits as long as others are before it."""
        background = deadline_unix_s == float("inf")
        vectors = await self._patiently(lambda: self._embedder.text_vectors(answers, deadline_unix_s), background)
        task = Task(
            name=id_,
            kind=job.kind,
            answers=answers,
            method=job.method,
            seed=job.seed,
            source=card["source"],
            vectors=vectors,
            background=background,
            deadline_unix_s=deadline_unix_s,
        )
        embedding = await self._patiently(lambda: self._embedder.embed(task), background)
        found = {
            "status": "done",
            "answers": answers.digest,
            "labels": list(answers.labels),
            "num_texts": answers.num_texts,
            "dims": embedding.dims,
            "noise": embedding.noise,
            "notes": list(answers.notes),
            "progress": None,
            "error": None,
        }
        if job.kind == "data_set" and answers.num_texts >= MIN_TEXTS:
            texts = np.stack([vectors[text] for text in answers.texts])
            region = await asyncio.to_thread(describe, texts, encoder=embedding.space.surrogate, seed=job.seed)
            found[KEY] = region.to_card()
        return embedding, card | found

    async def _queue(self, id_: str, job: TaskJob, card: dict[str, Any], expert: str | None) -> tuple[Artefact, bool]:
        if job.box:
            self._open_box(job.box)  # what cannot be asked is refused now, and not in a while
        async with self._submitting:
            known = await self._known(id_, job)  # whoever was before this one may have put something else there
            if known is not None and known.card["status"] != "failed":
                return await self._as_it_stands(known, expert), True
            if (before := self._tasks.get(id_)) is not None:
                await asyncio.gather(before, return_exceptions=True)  # it has failed, and is about to end
            if self.num_unfinished >= self._settings.max_jobs:
                raise Overloaded("the queue of tasks to embed in the background", 30.0)
            progress = TaskProgress(job=job)
            if known is not None:  # it failed; what it had stays
                progress = TaskProgress.from_bytes(await self._catalogue.get(known.digest, self._owner))
            card = card | {"status": "queued", "progress": self._progress_json(progress)}
            card["asked_unix_s"] = round(time.time(), 3)
            written = await self._write(id_, progress, card)
            self._spawn(id_)
        return written, False

    async def _as_it_stands(self, known: Artefact, expert: str | None) -> Artefact:
        """What was asked for before; the same embedding may come to be for another expert's requests.

        A job that nobody runs goes on: its deletion may have got no further than its end, or it failed where that
        could not be written down.
        """
        if is_unfinished(known):
            if known.name not in self._tasks:
                self._spawn(known.name)
            return known
        if expert is None or known.card["expert"] == expert:
            return known
        blob = await self._catalogue.get(known.digest, self._owner)
        return await self._put(known.name, blob, known.digest, {**known.card, "expert": expert})

    # -- running -------------------------------------------------------------------------------------------------------

    def _spawn(self, id_: str) -> None:
        if (before := self._tasks.get(id_)) is not None and not before.done():
            return  # the same request, at the same time, has begun it
        task = asyncio.create_task(self._run(id_), name=id_)
        self._tasks[id_] = task

        def ended(one: asyncio.Task[None]) -> None:
            if self._tasks.get(id_) is one:
                del self._tasks[id_]

        task.add_done_callback(ended)

    async def _run(self, id_: str) -> None:
        async with self._embedding:  # so many hold their answers in memory
            try:
                found = await self._patiently(lambda: self._find(id_))
                blob = await self._patiently(lambda: self._catalogue.get(found.digest, self._owner))
                progress, card = TaskProgress.from_bytes(blob), {**found.card, "status": "running"}
                space = await self._patiently(lambda: self._embedder.space(progress.job.method))
                if space.digest != progress.job.space:
                    raise Outdated(f"the task {id_}", "space", progress.job.space, (space.digest,))
                answers = progress.job.answers
                if answers is None:
                    async with self._asking:
                        progress, card = await self._answered(id_, progress, card)
                    answers = progress.answered
                    assert answers is not None
                    card = {**card, "executed": progress.executed, "source": {**card["source"], **progress.source}}
                    if answers.is_constant:
                        raise InvalidRequest("answers", CONSTANT)
                embedding, done = await self._embedded(id_, progress.job, answers, card, float("inf"))
                await self._patiently(lambda: self._put(id_, embedding.to_bytes(), embedding.digest, done))
            except UnknownName as error:
                if error.kind != "embedding":  # else its name was deleted: nobody asks for it any more
                    await self._fail(id_, error)
            except Exception as error:
                await self._fail(id_, error)

    async def _answered(
        self, id_: str, progress: TaskProgress, card: dict[str, Any]
    ) -> tuple[TaskProgress, dict[str, Any]]:
        """The black box's answers to all probe texts, written down part by part."""
        opened, texts = self._open_box(progress.job.box), self._embedder.probes.texts
        for part in parts_of(len(texts), progress.num_answered, TEXTS_A_CHECKPOINT):
            answers = await opened.box.answer([texts[i] for i in part])
            ran = opened.executed()
            progress = progress.more(answers, None if ran is None else executed_json(ran), opened.box.source())
            card = {**card, "progress": self._progress_json(progress)}
            now, written = progress, card
            await self._patiently(lambda now=now, written=written: self._write(id_, now, written))
        return progress, card

    async def _fail(self, id_: str, error: Exception) -> None:
        if not isinstance(error, MetasepiaError):
            logger.error("the task %s failed", id_, exc_info=error)
        why = str(error) if isinstance(error, MetasepiaError) else f"an unexpected {type(error).__name__}"
        with contextlib.suppress(UnknownName):
            try:
                now = await self._patiently(lambda: self._find(id_))
                kept = await self._patiently(lambda: self._catalogue.get(now.digest, self._owner))
                card = {**now.card, "status": "failed", "error": why}
                await self._patiently(lambda: self._put(id_, kept, now.digest, card))
            except UnknownName:
                raise
            except MetasepiaError as other:
                logger.error("the task %s: that it failed could not be written down: %s", id_, other)

    async def _patiently(self, ask: Callable[[], Awaitable[T]], patient: bool = True) -> T:
        """The answer of a part that may be away or full, however long it is."""
        while True:
            try:
                return await ask()
            except (Unavailable, Overloaded) as error:
                if not patient:
                    raise
                await asyncio.sleep(min(error.retry_after_s, 5.0))

    # -- the registry --------------------------------------------------------------------------------------------------

    async def _every(self) -> AsyncIterator[Artefact]:
        after = ""
        while True:
            page = await self._catalogue.list("embedding", self._owner, after=after, limit=_PAGE)
            for one in page:
                if one.owner == self._owner:
                    yield one
            if len(page) < _PAGE:
                return
            after = page[-1].name

    async def _known(self, id_: str, job: TaskJob) -> Artefact | None:
        """What has the id now. Raises NameTaken for another task."""
        try:
            found = await self._find(id_)
        except UnknownName:
            return None
        if found.card["job"] != job.digest:
            raise NameTaken("task", id_, found.digest, "delete it first, or choose another name")
        return found

    async def _find(self, id_: str) -> Artefact:
        return await self._catalogue.resolve("embedding", id_, self._owner)

    async def _write(self, id_: str, progress: TaskProgress, card: dict[str, Any]) -> Artefact:
        blob = progress.to_bytes()
        return await self._put(id_, blob, hashlib.sha256(blob).hexdigest(), card)

    async def _put(self, id_: str, blob: bytes, digest: str, card: dict[str, Any], *, replace: bool = True) -> Artefact:
        put = self._catalogue.put(
            "embedding", blob, digest=digest, name=id_, owner=self._owner, card=card, replace=replace
        )
        task = self._writing[id_] = asyncio.ensure_future(put)
        task.add_done_callback(lambda one: self._writing.pop(id_, None) if self._writing.get(id_) is one else None)
        return await asyncio.shield(task)

    def _card(self, job: TaskJob, space: Space, expert: str | None, source: dict[str, Any]) -> dict[str, Any]:
        return {
            "status": "queued",
            "kind": job.kind,
            "job": job.digest,
            "method": job.method,
            "space": space.digest,
            "surrogate": space.surrogate,
            "probes": space.probes,
            "seed": job.seed,
            "expert": expert,
            "model": source.get("model"),
            "prompt": job.box.get("prompt"),
            "source": source,
            "labels": [] if job.answers is None else list(job.answers.labels),
            "num_texts": len(self._embedder.probes) if job.answers is None else job.answers.num_texts,
            "executed": None,
            "noise": None,
            "error": None,
        }

    def _progress_json(self, progress: TaskProgress) -> dict[str, int] | None:
        if not progress.job.box:
            return None
        return {"answered": progress.num_answered, "of": len(self._embedder.probes)}


def is_unfinished(found: Artefact) -> bool:
    return found.card.get("status") in ("queued", "running")


def executed_json(executed: Executed) -> dict[str, Any]:
    """In values that JSON has."""
    return {
        "backbone": executed.backbone,
        "factors": executed.factors,
        "adapter": [[digest, weight] for digest, weight in executed.adapter],
        "path": executed.path,
        "dtype": executed.dtype,
        "tp_size": executed.tp_size,
    }
