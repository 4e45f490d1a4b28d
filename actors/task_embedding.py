"""Embeds tasks for many callers: those that wait for the same method go together. A plain class; Serve wraps it.

The method `agreement` takes its text vectors from the graph's own encoder and needs no torch here; `prefix` and
`fisher` load the encoder's weights when they are first asked for. Each method has a thread of its own, so that one that
trains for a minute keeps nobody waiting who asks for another.
"""

import asyncio
import contextlib
import itertools
import logging
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from actors.waiting import answer_within, remaining_s
from cluster.settings import TaskSettings
from metasepia.embedding import methods
from metasepia.embedding.answers import Answers
from metasepia.embedding.probes import ProbeTexts
from metasepia.embedding.space import EmbeddingMethod, MethodName, Space, TaskEmbedding, TaskKind
from metasepia.errors import (
    DeadlineExceeded,
    InvalidRequest,
    MetasepiaError,
    Overloaded,
    Unavailable,
    WindowExceeded,
)

if TYPE_CHECKING:
    from metasepia.encoders import TextEncoder

logger = logging.getLogger("metasepia.tasks")

TORCH_FREE: tuple[MethodName, ...] = ("agreement",)
TEXTS_A_CALL = 512
STUCK_S = 60.0
"""A batch of the method without gradients that takes longer is taken for one that never ends."""
_PART = "the embedding of tasks"


class TextVectors(Protocol):
    """The surrogate, somewhere else. What it is can be read once it is `ready`."""

    digest: str
    width: int
    window: int

    async def ready(self) -> None: ...

    async def embed(self, texts: Sequence[str], deadline_unix_s: float) -> np.ndarray:
        """Unit-norm float32 [texts, width]. Raises WindowExceeded and InvalidRequest naming `texts[i]`."""
        ...


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task to embed. `background` ones wait until nobody else does."""

    name: str
    kind: TaskKind
    answers: Answers
    method: MethodName
    seed: int = 0
    source: Mapping[str, Any] = field(default_factory=dict)
    vectors: Mapping[str, np.ndarray] | None = None
    """`text_vectors` of its answers; None: they are asked for."""
    background: bool = False
    deadline_unix_s: float = float("inf")


@dataclass
class _Waiting:
    task: Task
    vectors: Mapping[str, np.ndarray]
    """Of its texts, where they were asked for."""
    answer: "Future[TaskEmbedding]" = field(default_factory=Future)

    def fail(self, error: Exception) -> None:
        with contextlib.suppress(InvalidStateError):  # the caller is gone
            self.answer.set_exception(error)

    def finish(self, embedding: TaskEmbedding) -> None:
        with contextlib.suppress(InvalidStateError):
            self.answer.set_result(embedding)


class TaskEmbedder:
    """Owns the methods of one surrogate and one set of probe texts, and the threads that run them."""

    def __init__(
        self,
        settings: TaskSettings,
        probes: ProbeTexts,
        vectors: TextVectors,
        load: "Callable[[], TextEncoder]",
    ) -> None:
        """`load` gives the weights that `vectors` answers with; called once, when a method first needs gradients."""
        self._settings, self.probes, self._vectors = settings, probes, vectors
        self._load_lock, self._load = threading.Lock(), load
        self._loaded: TextEncoder | None = None
        self._workers: dict[MethodName, _Worker] = {}
        self._num_texts = 0

    async def space(self, method: MethodName) -> Space:
        """Where the method's vectors lie; makes the method, which takes seconds the first time for one of torch."""
        return (await self._worker(method).method()).space

    async def embed(self, task: Task) -> TaskEmbedding:
        """Raises InvalidRequest for a task without an embedding (`texts[i]` or `replies[i]` of one that is too long),
        Overloaded when `max_queued` tasks wait, DeadlineExceeded.
        """
        timeout_s = remaining_s(task.deadline_unix_s, _PART)
        if task.answers.is_constant:
            raise InvalidRequest("answers", methods.CONSTANT)
        if self.num_queued >= self._settings.max_queued:
            raise Overloaded("the queue of tasks to embed", self._worker(task.method).retry_after_s())
        worker = self._worker(task.method)
        async with worker.one_more():
            async with _within(timeout_s):
                await worker.method()
                known = task.vectors
                if known is None:
                    known = await self.text_vectors(task.answers, task.deadline_unix_s)
            waiting = _Waiting(task, known)
            worker.put(waiting)
            left_s = remaining_s(task.deadline_unix_s, _PART)
            return await answer_within(waiting.answer, left_s, _PART)

    async def text_vectors(self, answers: Answers, deadline_unix_s: float = float("inf")) -> dict[str, np.ndarray]:
        """The surrogate's vectors of texts and replies that are not probe texts. Raises WindowExceeded by `texts[i]`
        or `replies[i]`.
        """
        found: dict[str, np.ndarray] = {}
        if answers.texts != self.probes.texts:
            found |= await self._ask(answers.texts, "texts", deadline_unix_s)
        if answers.is_open:
            found |= await self._ask(answers.replies, "replies", deadline_unix_s)
        return found

    async def _ask(self, texts: Sequence[str], param: str, deadline_unix_s: float) -> dict[str, np.ndarray]:
        first = {text: place for place, text in reversed([*enumerate(texts)])}
        once = list(first)
        self._num_texts += len(once)
        found: dict[str, np.ndarray] = {}
        for begin in range(0, len(once), TEXTS_A_CALL):
            part = once[begin : begin + TEXTS_A_CALL]
            try:
                vectors = await self._vectors.embed(part, deadline_unix_s)
            except InvalidRequest as error:
                raise _in_field(error, param, [first[text] for text in part]) from None
            found |= zip(part, vectors, strict=True)
        return found

    @property
    def num_queued(self) -> int:
        return sum(one.num_queued for one in self._workers.values())

    async def check(self, timeout_s: float = 10.0) -> None:
        """One real embedding, of two labels by turns, past the queue's limit. Raises Unavailable.

        Until the first task comes nothing is made that one needs (the probe texts' vectors take seconds), so that a
        graph starts without it: then this says only that the part and its encoder answer. So it does while a batch
        runs that is not `STUCK_S` old: many large data sets take longer than a probe waits.
        """
        worker = self._worker(TORCH_FREE[0])
        if not worker.num_batches or 0 < worker.busy_s < STUCK_S:
            async with _within(timeout_s):
                await self._vectors.ready()
            return
        labels = np.eye(2, dtype=np.float32)[np.arange(len(self.probes)) % 2]
        answers = Answers(texts=self.probes.texts, labels=("a", "b"), probabilities=labels)
        waiting = _Waiting(Task(name="ready?", kind="model", answers=answers, method=TORCH_FREE[0]), {})
        try:
            async with _within(timeout_s):
                await worker.method()
                worker.put(waiting)
                await answer_within(waiting.answer, timeout_s, _PART)
        except DeadlineExceeded:
            raise Unavailable(_PART, 1.0) from None

    def statistics(self) -> dict[str, float]:
        """Tasks and batches so far, tasks that wait or run, texts asked of the encoder, methods that are loaded."""
        workers = self._workers.values()
        return {
            "tasks": sum(one.num_tasks for one in workers),
            "batches": sum(one.num_batches for one in workers),
            "queued": self.num_queued,
            "texts": self._num_texts,
            "methods": sum(one.is_made for one in workers),
        }

    def stop(self) -> None:
        """Ends the threads; what waits fails with Unavailable."""
        for one in self._workers.values():
            one.stop()

    def _worker(self, method: MethodName) -> "_Worker":
        if method not in self._workers:
            self._workers[method] = _Worker(method, self._settings, lambda: self._make(method))
        return self._workers[method]

    async def _make(self, name: MethodName) -> "tuple[EmbeddingMethod, _Known | None]":
        await self._vectors.ready()
        if name in TORCH_FREE:
            known = _Known(self._vectors, asyncio.get_running_loop())
            return await asyncio.to_thread(methods.method, name, known, self.probes), known  # pyright: ignore[reportArgumentType]
        return await asyncio.to_thread(self._make_on_weights, name), None

    def _make_on_weights(self, name: MethodName) -> EmbeddingMethod:
        with self._load_lock:
            if self._loaded is None:
                import torch

                torch.set_num_threads(self._settings.threads)
                loaded = self._load()
                if loaded.digest != self._vectors.digest:
                    raise Unavailable(f"the surrogate (other weights than those of {self._vectors.digest[:12]})", 60.0)
                self._loaded = loaded  # not before: the next caller would take it as it is
        return methods.method(name, self._loaded, self.probes)


class _Worker:
    """One method and its thread."""

    def __init__(
        self,
        name: MethodName,
        settings: TaskSettings,
        make: "Callable[[], Awaitable[tuple[EmbeddingMethod, _Known | None]]]",
    ) -> None:
        self.name, self._settings, self._make = name, settings, make
        self.num_queued = self.num_tasks = self.num_batches = self.num_put = 0
        self._seconds_a_task: float | None = None
        self._began_s: float | None = None
        self._arrived = threading.Condition()
        self._inbox: list[_Waiting] = []
        self._stopping = False
        self._made: tuple[EmbeddingMethod, _Known | None] | None = None
        self._making: asyncio.Task[EmbeddingMethod] | None = None
        self._thread: threading.Thread | None = None

    @property
    def busy_s(self) -> float:
        """How long its batch has been running; 0 where none is."""
        began_s = self._began_s
        return 0.0 if began_s is None else time.monotonic() - began_s

    @property
    def is_made(self) -> bool:
        return self._made is not None

    async def method(self) -> EmbeddingMethod:
        """Made once; one that could not be made is tried again by the next caller."""
        if self._made is not None:
            return self._made[0]
        if self._making is None or self._making.done():
            self._making = asyncio.create_task(self._make_it())
        return await asyncio.shield(self._making)

    async def _make_it(self) -> EmbeddingMethod:
        self._made = await self._make()
        return self._made[0]

    @contextlib.asynccontextmanager
    async def one_more(self) -> AsyncIterator[None]:
        self.num_queued += 1
        try:
            yield
        finally:
            self.num_queued -= 1

    def put(self, waiting: _Waiting) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=f"tasks {self.name}", daemon=True)
            self._thread.start()
        with self._arrived:
            self.num_put += 1
            self._inbox.append(waiting)
            self._arrived.notify()

    def stop(self) -> None:
        with self._arrived:
            self._stopping = True
            self._arrived.notify()
        if self._thread is not None:
            self._thread.join()

    def retry_after_s(self) -> float:
        """How long what waits now will take, at the speed last measured; from 1 to 60."""
        return min(60.0, max(1.0, self.num_queued * (self._seconds_a_task or 1.0)))

    def _work(self) -> None:
        if self.name not in TORCH_FREE:
            import torch

            torch.set_num_threads(self._settings.threads)  # OpenMP keeps this for each thread
        waiting: list[_Waiting] = []
        while True:
            with self._arrived:
                while not (self._inbox or waiting or self._stopping):
                    self._arrived.wait()
                waiting += self._inbox
                self._inbox = []
                stopping = self._stopping
            if stopping:
                for one in waiting:
                    one.fail(Unavailable(_PART, 1.0))
                return
            now = time.time()
            for one in waiting:
                if one.task.deadline_unix_s <= now:
                    one.fail(DeadlineExceeded(_PART, 0.0))
            waiting = [one for one in waiting if not one.answer.done()]
            batch = _next_batch(waiting, self._settings.max_batch)
            if batch:
                self._began_s = time.monotonic()
                self._embed(batch)
                self._began_s = None
                waiting = [one for one in waiting if not one.answer.done()]

    def _embed(self, batch: "list[_Waiting]") -> None:
        """All answers of the batch; a task that fails, fails alone."""
        assert self._made is not None  # nothing is put before
        method, known = self._made
        began_s = time.monotonic()

        def told(_done: int, _total: int) -> None:
            if self._stopping or all(one.answer.done() for one in batch):
                raise _Abandoned

        named: list[methods.NamedTask] = [
            (one.task.name, one.task.kind, one.task.answers, one.task.source) for one in batch
        ]
        try:
            with known.given([one.vectors for one in batch]) if known else contextlib.nullcontext():
                found = methods.embed_tasks(method, named, seed=batch[0].task.seed, told=told)
        except _Abandoned:
            return  # those who are left in the batch, if it is the end, are told of it by the loop
        except Exception as error:
            if len(batch) > 1:
                for one in batch:
                    if not one.answer.done():
                        self._embed([one])
                return
            if not isinstance(error, MetasepiaError):
                logger.error("the task %s could not be embedded", batch[0].task.name, exc_info=error)
            batch[0].fail(error)
            return
        self.num_batches += 1
        self.num_tasks += len(batch)
        speed = (time.monotonic() - began_s) / len(batch)
        self._seconds_a_task = speed if self._seconds_a_task is None else 0.8 * self._seconds_a_task + 0.2 * speed
        for one, embedding in zip(batch, found, strict=True):
            one.finish(embedding)


class _Abandoned(Exception):
    """Nobody waits for this batch any more."""


def _next_batch(waiting: "Sequence[_Waiting]", most: int) -> "list[_Waiting]":
    """Tasks that can be embedded in one go: of one seed, and background ones only where no others wait."""
    urgent = [one for one in waiting if not one.task.background] or list(waiting)
    return list(itertools.islice((one for one in urgent if one.task.seed == urgent[0].task.seed), most))


class _Known:
    """The surrogate as a method without gradients sees it, from its thread: vectors at hand, or asked for.

    Those of the probe texts are asked for once; a batch brings its own along.
    """

    def __init__(self, vectors: TextVectors, loop: asyncio.AbstractEventLoop) -> None:
        self.digest, self.width, self.window = vectors.digest, vectors.width, vectors.window
        self._vectors, self._loop = vectors, loop
        self._given: Sequence[Mapping[str, np.ndarray]] = ()

    @contextlib.contextmanager
    def given(self, vectors: Sequence[Mapping[str, np.ndarray]]) -> Iterator[None]:
        self._given = vectors
        try:
            yield
        finally:
            self._given = ()

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        found = np.empty((len(texts), self.width), np.float32)
        missing: list[int] = []
        for place, text in enumerate(texts):
            vector = next((one[text] for one in self._given if text in one), None)
            if vector is None:
                missing.append(place)
            else:
                found[place] = vector
        for begin in range(0, len(missing), TEXTS_A_CALL):
            part = missing[begin : begin + TEXTS_A_CALL]
            found[part] = self._wait(self._vectors.embed([texts[i] for i in part], float("inf")))
        return found

    def _wait(self, asked: Awaitable[np.ndarray]) -> np.ndarray:
        async def answer() -> np.ndarray:
            return await asked

        return asyncio.run_coroutine_threadsafe(answer(), self._loop).result()


@contextlib.asynccontextmanager
async def _within(timeout_s: float) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(None if timeout_s == float("inf") else timeout_s):
            yield
    except TimeoutError as error:
        if isinstance(error, MetasepiaError):
            raise
        raise DeadlineExceeded(_PART, round(timeout_s, 3)) from None


def _in_field(error: InvalidRequest, param: str, places: Sequence[int]) -> InvalidRequest:
    """A complaint about `texts[i]` of a call, about the task's own `texts[j]` or `replies[j]`."""
    name, _, rest = (error.param or "").partition("[")
    if name != "texts" or not rest[:-1].isdigit() or int(rest[:-1]) >= len(places):
        return error
    field_ = f"{param}[{places[int(rest[:-1])]}]"
    if isinstance(error, WindowExceeded):
        way_out = "shorten it, or leave such texts out with long_texts" if param == "texts" else "shorten it"
        return WindowExceeded(field_, error.num_tokens, error.window, way_out)
    return InvalidRequest(field_, error.message)
