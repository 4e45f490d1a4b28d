"""Reasoning modules for many callers: contexts and queries that wait together share a forward. Serve wraps it.

No torch until one is made, so that the gateway may import this module.
"""

import asyncio
import contextlib
import dataclasses
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from actors import heap, logs, meters, tracing
from actors.audits import AuditThread, explained_in_steps, self_check_in_steps
from actors.labelled import context_of, labelled_vectors
from actors.messages import Build, Built, Classified, Classify, Explain, Explained, LabelledVectors
from actors.waiting import answer_within, remaining_s
from cluster.settings import ReasoningSettings
from metasepia.errors import (
    DeadlineExceeded,
    InvalidRequest,
    MetasepiaError,
    Overloaded,
    Unavailable,
    UnknownName,
)
from metasepia.reasoning.examples import check_finite
from metasepia.reasoning.named import PREFIX, EmbeddedContext

if TYPE_CHECKING:
    from metasepia.reasoning.context import CompiledContext
    from metasepia.reasoning.shipped import LoadedModule

ROUND_BYTES = 2 << 30
"""Queries times the bytes of their compiled context that one round reads; who arrives meanwhile waits for it."""
ROUND_S = 0.25
"""A round that has compiled contexts for this long answers those; the others are compiled in the next."""


class Blobs(Protocol):
    """The registry, as far as the pool asks it."""

    async def get(self, digest: str) -> bytes: ...


@dataclass
class _Question:
    """Queries that wait, none where only the compiled context is wanted; all but `answer` belong to the worker."""

    module: "LoadedModule"
    digest: str
    labelled: LabelledVectors | None
    """None where `compiled` is there already."""
    queries: np.ndarray
    deadline_unix_s: float
    traceparent: str | None = None
    arrived_unix_s: float = field(default_factory=time.time)
    begun: bool = False
    """A forward had some of its queries."""
    compiled: "CompiledContext | None" = None
    when: Literal["now", "before"] = "before"
    answer: "Future[np.ndarray]" = field(default_factory=Future)
    """Probabilities [queries, classes]; `compiled` is set once it is there."""
    answered: list[np.ndarray] = field(default_factory=list)
    num_answered: int = 0

    @property
    def size(self) -> int:
        return max(1, len(self.queries))

    def fail(self, error: Exception) -> None:
        with contextlib.suppress(InvalidStateError):  # the caller is gone
            self.answer.set_exception(error)

    def finish(self) -> None:
        assert self.compiled is not None
        empty = np.empty((0, len(self.compiled.classes)), np.float32)
        with contextlib.suppress(InvalidStateError):
            self.answer.set_result(np.concatenate([empty, *self.answered]))


class ReasoningPool:
    """Owns reasoning modules, their compiled contexts, and the threads that run them.

    Each round answers a share of every waiting request, in turn, in one forward over all their contexts. A request that
    fails, fails alone. A context that is named by its digest and not here, or no longer, is fetched from the registry
    and compiled, once for all who wait for it.
    """

    def __init__(
        self, settings: ReasoningSettings, blobs: Blobs | None = None, loaded: "Sequence[LoadedModule] | None" = None
    ) -> None:
        """`loaded` None loads the modules of the settings. Raises UnknownName, CorruptArtefact."""
        import torch

        from metasepia.reasoning import shipped
        from metasepia.reasoning.context import ContextPool

        logs.begin()
        torch.set_num_threads(settings.threads)
        heap.give_back_for_ever()
        self._settings, self._blobs = settings, blobs
        modules = loaded or [shipped.load(name) for name in settings.modules]
        self._modules = {one.digest: one for one in modules}
        self._contexts = ContextPool(int(settings.cache_mib * 2**20))
        self._contexts_lock = threading.Lock()  # the worker writes, the event loop looks
        self._fetching: dict[str, asyncio.Task[LabelledVectors]] = {}
        self._arrived = threading.Condition()
        self._inbox: list[_Question] = []
        self._num_queued = 0
        self._queries_per_s: float | None = None
        self._num_queries = self._num_forwards = self._num_compiled = self._num_fetched = 0
        self._stopping = False
        self._worker = threading.Thread(target=self._work, name="reasoning pool", daemon=True)
        self._worker.start()
        self._audits = AuditThread("the audits of the reasoning pool", settings.max_queued_audits, self._begin_thread)
        meters.SAMPLING.follow(self._tell)

    def _tell(self) -> None:
        meters.POOL_QUEUED.set(self._num_queued)
        meters.POOL_AUDITS.set(self._audits.num_jobs)
        meters.POOL_KEPT.set(len(self._contexts))
        meters.POOL_BYTES.set(self._contexts.num_bytes)

    @property
    def digest(self) -> str:
        """Of the first module."""
        return next(iter(self._modules))

    def statistics(self) -> dict[str, float]:
        """Queries, fused forwards, contexts compiled and fetched so far; contexts kept; queries and audits waiting or
        running now.
        """
        return {
            "queries": self._num_queries,
            "forwards": self._num_forwards,
            "contexts_compiled": self._num_compiled,
            "contexts_fetched": self._num_fetched,
            "contexts_kept": len(self._contexts),
            "context_bytes": self._contexts.num_bytes,
            "context_hits": self._contexts.num_hits,
            "queued_queries": self._num_queued,
            "queued_audits": self._audits.num_jobs,
            "queries_per_s": self._queries_per_s or 0.0,
        }

    async def classify(self, message: Classify) -> Classified:
        """Probabilities of each query's classes, in the order of the queries.

        Raises UnknownName for another module's digest and for a context's that the registry has not got,
        InvalidRequest for a context or queries that cannot be answered, Overloaded when `max_queued_queries` wait,
        DeadlineExceeded.
        """
        module = self._module(message.module)
        _check_queries(message.queries, message.context)
        num_queries, limit = len(message.queries), self._settings.max_queued_queries
        if num_queries > limit:
            raise InvalidRequest("inputs", f"{num_queries} queries; at most {limit} at once")
        if self._num_queued + num_queries > limit:
            raise Overloaded("the queue of the reasoning pool", self._retry_after_s())
        question = await self._question(module, message.context, message.queries, message.deadline_unix_s)
        question.traceparent = message.traceparent
        probabilities = await self._ask(question)
        assert question.compiled is not None
        return Classified(
            classes=question.compiled.classes,
            probabilities=probabilities,
            context=question.digest,
            module=message.module,
            compiled=question.when,
        )

    async def build(self, message: Build) -> Built:
        """Compiles and keeps a context; its self-check leaves others' queries their turns. Raises as `classify` does,
        Overloaded also when `max_queued_audits` wait.
        """
        module = self._module(message.module)
        compiled = await self._compiled(module, message.context, message.deadline_unix_s)
        steps = self_check_in_steps(context_of(message.context), module, compiled)
        # A context is worth having without it: the self-check may use half of the time that is left.
        until_s = time.time() + remaining_s(message.deadline_unix_s, "building the context") / 2
        try:
            self_check = await self._audits.run(steps, "the self-check", until_s)
        except DeadlineExceeded:
            self_check = None
        return Built(classes=compiled.classes, num_bytes=compiled.num_bytes, self_check=self_check)

    async def explain(self, message: Explain) -> Explained:
        """The influence of each example on the answers, by leaving it out. Raises as `build` does."""
        module = self._module(message.module)
        _check_queries(message.queries, message.context)
        given = message.context
        labelled = await self._fetch(given, message.deadline_unix_s) if isinstance(given, str) else given
        compiled = await self._compiled(module, labelled, message.deadline_unix_s)
        steps = explained_in_steps(context_of(labelled), module, compiled, message.queries, message.nearest)
        return await self._audits.run(steps, "the explanation", message.deadline_unix_s)

    async def check(self, timeout_s: float = 10.0) -> None:
        """One real forward of every module, past the queue's limit. Raises Unavailable when none comes back."""
        for module in self._modules.values():
            vectors = np.eye(4, 8, dtype=np.float32)
            labelled = LabelledVectors(digest=f"check {module.digest}", vectors=vectors, labels=("a", "b", "a", "b"))
            try:
                question = await self._question(module, labelled, vectors[:1], time.time() + timeout_s)
                probabilities = await self._ask(question)
            except DeadlineExceeded:
                raise Unavailable("the reasoning pool", 1.0) from None
            if not np.isfinite(probabilities).all():
                raise Unavailable("the reasoning pool (its answers are not finite)", 60.0)

    async def check_health(self) -> None:
        """Called by Serve, which replaces a replica whose worker has died."""
        if not self._worker.is_alive():
            raise Unavailable("the reasoning pool", 1.0)

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve, where the number of replicas is not fixed (`serve.load.autoscaling`)."""
        return {"queued": float(self._num_queued)}

    def stop(self) -> None:
        """Ends the threads; what waits fails with Unavailable."""
        self._audits.stop()
        with self._arrived:
            self._stopping = True
            self._arrived.notify()
        self._worker.join()

    def _module(self, digest: str) -> "LoadedModule":
        if digest not in self._modules:
            raise UnknownName("reasoning module", digest, tuple(self._modules))
        return self._modules[digest]

    async def _compiled(
        self, module: "LoadedModule", labelled: LabelledVectors, deadline_unix_s: float
    ) -> "CompiledContext":
        none = np.empty((0, labelled.vectors.shape[1]), np.float32)
        question = await self._question(module, labelled, none, deadline_unix_s)
        await self._ask(question)
        assert question.compiled is not None
        return question.compiled

    async def _question(
        self, module: "LoadedModule", given: LabelledVectors | str, queries: np.ndarray, deadline_unix_s: float
    ) -> _Question:
        """With the compiled context where it is here, else with what it is compiled from."""
        digest = given if isinstance(given, str) else given.digest
        with self._contexts_lock:
            # Held by the question from here on: nothing evicts it before its answer.
            compiled = self._contexts.get(digest)
        labelled = None if isinstance(given, str) else given
        if compiled is None and isinstance(given, str):
            labelled = await self._fetch(given, deadline_unix_s)
            _check_queries(queries, labelled)
        if compiled is not None:
            meters.POOL_CONTEXTS.inc(how="kept")
        return _Question(module, digest, labelled, queries, deadline_unix_s, compiled=compiled)

    async def _fetch(self, digest: str, deadline_unix_s: float) -> LabelledVectors:
        """From the registry, once for all who want it now. Raises UnknownName, CorruptArtefact, DeadlineExceeded."""
        task = self._fetching.get(digest)
        if task is None:
            task = self._fetching[digest] = asyncio.create_task(self._read(digest))
            task.add_done_callback(lambda _: self._fetching.pop(digest, None))
        try:
            async with asyncio.timeout(remaining_s(deadline_unix_s, "fetching the context")):
                return await asyncio.shield(task)  # who leaves must not take it from the others
        except TimeoutError:
            raise DeadlineExceeded("fetching the context", 0.0) from None

    async def _read(self, digest: str) -> LabelledVectors:
        if self._blobs is None:
            raise UnknownName("context", PREFIX + digest, ())
        blob = await self._blobs.get(digest)
        embedded = await asyncio.to_thread(EmbeddedContext.from_bytes, blob, digest)
        self._num_fetched += 1
        meters.POOL_CONTEXTS.inc(how="fetched")
        return labelled_vectors(embedded)

    async def _ask(self, question: _Question) -> np.ndarray:
        if not self._worker.is_alive():
            raise Unavailable("the reasoning pool", 1.0)
        timeout_s = remaining_s(question.deadline_unix_s, "the classification")
        self._num_queued += question.size
        try:
            with self._arrived:
                self._inbox.append(question)
                self._arrived.notify()
            return await answer_within(question.answer, timeout_s, "the classification")
        finally:
            self._num_queued -= question.size

    def _retry_after_s(self) -> float:
        """How long the queries that wait now will take, at the speed last measured; from 1 to 60."""
        return min(60.0, max(1.0, self._num_queued / self._queries_per_s)) if self._queries_per_s else 1.0

    def _begin_thread(self) -> None:
        import torch

        torch.set_num_threads(self._settings.threads)  # OpenMP keeps this for each thread

    def _work(self) -> None:
        self._begin_thread()
        waiting: list[_Question] = []
        while True:
            with self._arrived:
                while not (self._inbox or waiting or self._stopping):
                    self._arrived.wait()
                arrived, self._inbox = self._inbox, []
                if self._stopping:
                    for question in (*waiting, *arrived):
                        question.fail(Unavailable("the reasoning pool", 1.0))
                    return
            waiting += arrived
            for question in waiting:
                if question.deadline_unix_s <= time.time():
                    question.fail(DeadlineExceeded("the classification", 0.0))
            alive = [question for question in waiting if not question.answer.done()]
            num_served = self._round(alive)
            # Those served go behind those that the round's budget did not reach.
            waiting = [q for q in (*alive[num_served:], *alive[:num_served]) if not q.answer.done()]

    def _round(self, questions: Sequence[_Question]) -> int:
        """Compiles what is missing and answers a share of each question; how many questions had one."""
        budget, num_served = ROUND_BYTES, 0
        shares: list[tuple[_Question, np.ndarray]] = []
        began_s = time.monotonic()
        fresh: dict[str, CompiledContext] = {}
        for question in questions:
            share = budget // (len(questions) - num_served)  # what earlier questions did not use passes to later ones
            num_served += 1
            if question.compiled is None:
                question.compiled = self._compile(question, fresh)
            if question.compiled is None:
                continue
            if not len(question.queries):
                question.finish()
            else:
                cost = max(1, question.compiled.num_bytes)
                taken = question.queries[question.num_answered :][: max(1, share // cost)]
                shares.append((question, taken))
                budget -= len(taken) * cost
            if budget <= 0 or (fresh and time.monotonic() - began_s > ROUND_S):
                break
        self._answer(shares)
        num_queries = sum(len(queries) for _, queries in shares)
        if num_queries:
            speed = num_queries / max(time.monotonic() - began_s, 1e-6)
            self._queries_per_s = speed if self._queries_per_s is None else 0.8 * self._queries_per_s + 0.2 * speed
        return num_served

    def _compile(self, question: _Question, fresh: "dict[str, CompiledContext]") -> "CompiledContext | None":
        from metasepia.reasoning.context import compile_context

        with self._contexts_lock:
            # One too large for the pool is still shared by the questions of this round.
            found = self._contexts.get(question.digest) or fresh.get(question.digest)
        if found is not None:
            return found
        assert question.labelled is not None
        began_unix_s = time.time()
        try:
            compiled = compile_context(context_of(question.labelled), question.module)
        except MetasepiaError as error:
            question.fail(error)
            return None
        except Exception as error:  # a failure of one context must not take the worker with it
            question.fail(Unavailable(f"the reasoning pool ({type(error).__name__}: {error})", 1.0))
            return None
        found = fresh[question.digest] = dataclasses.replace(compiled, digest=question.digest)
        question.when = "now"
        self._num_compiled += 1
        meters.POOL_CONTEXTS.inc(how="compiled")
        tracing.record("compile context", question.traceparent, began_unix_s, time.time(), context=question.digest)
        with self._contexts_lock:
            self._contexts.put(found)
        return found

    def _answer(self, shares: Sequence[tuple[_Question, np.ndarray]]) -> None:
        """One forward over all contexts of a module."""
        by_module: dict[str, list[tuple[_Question, np.ndarray]]] = {}
        for question, queries in shares:
            by_module.setdefault(question.module.digest, []).append((question, queries))
        for some in by_module.values():
            self._answer_together(some)

    def _answer_together(self, shares: Sequence[tuple[_Question, np.ndarray]]) -> None:
        from metasepia.reasoning.context import answer

        asked = [(question.compiled, queries) for question, queries in shares if question.compiled is not None]
        began_unix_s = time.time()
        try:
            answers = answer(shares[0][0].module.module, asked)
        except Exception as error:
            # Out of memory, most likely: halves may fit, and a question that fails alone fails nobody else.
            if len(shares) > 1:
                self._answer_together(shares[: len(shares) // 2])
                self._answer_together(shares[len(shares) // 2 :])
            elif isinstance(error, MetasepiaError):
                shares[0][0].fail(error)
            else:
                shares[0][0].fail(Unavailable(f"the reasoning pool ({type(error).__name__}: {error})", 1.0))
            return
        self._num_forwards += 1
        _measure(shares, began_unix_s)
        for (question, queries), probabilities in zip(shares, answers, strict=True):
            self._num_queries += len(queries)
            if not np.isfinite(probabilities).all():
                question.fail(
                    InvalidRequest("inputs", "no finite answer comes of such vectors; bring them to unit norm")
                )
                continue
            question.answered.append(probabilities)
            question.num_answered += len(queries)
            if question.num_answered >= len(question.queries):
                question.finish()


def _measure(shares: Sequence[tuple[_Question, np.ndarray]], began_unix_s: float) -> None:
    """A forward that went well."""
    now, num_queries = time.time(), sum(len(queries) for _, queries in shares)
    meters.POOL_FORWARD.observe(now - began_unix_s)
    meters.POOL_BATCH.observe(num_queries)
    meters.POOL_QUERIES.inc(num_queries)
    for question, _ in shares:
        if not question.begun:
            question.begun = True
            meters.POOL_QUEUE.observe(began_unix_s - question.arrived_unix_s)
            tracing.record("reasoning queue", question.traceparent, question.arrived_unix_s, began_unix_s)
    traced = [question.traceparent for question, _ in shares]
    tracing.batch("reasoning", traced, began_unix_s, now, queries=num_queries, contexts=len(shares))


def _check_queries(queries: np.ndarray, context: LabelledVectors | str) -> None:
    if queries.ndim != 2 or not len(queries):
        raise InvalidRequest("inputs", f"no queries: their vectors have the shape {list(queries.shape)}")
    if isinstance(context, LabelledVectors) and context.vectors.ndim == 2:
        width = context.vectors.shape[1]
        if queries.shape[1] != width:
            raise InvalidRequest("inputs", f"vectors of {queries.shape[1]} numbers; those of the examples have {width}")
    check_finite("inputs", queries)
