"""Reasoning modules for many callers: contexts and queries that wait together share a forward. Serve wraps it.

No torch until one is made, so that the gateway may import this module.
"""

import contextlib
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

from actors.messages import Classified, Classify, LabelledVectors
from actors.waiting import answer_within, remaining_s
from cluster.settings import ReasoningSettings
from metasepia.errors import DeadlineExceeded, InvalidRequest, MetasepiaError, Overloaded, Unavailable, UnknownName

if TYPE_CHECKING:
    from metasepia.reasoning.context import CompiledContext
    from metasepia.reasoning.shipped import LoadedModule

ROUND_ROWS = 8192
"""Queries times compiled rows that one round answers; a request that arrives meanwhile waits for them."""


@dataclass
class _Request:
    """A question that waits; all but `answer` belong to the worker."""

    message: Classify
    answer: "Future[Classified]" = field(default_factory=Future)
    compiled: "CompiledContext | None" = None
    when: Literal["now", "before"] = "before"
    answered: list[np.ndarray] = field(default_factory=list)
    num_answered: int = 0

    def fail(self, error: Exception) -> None:
        with contextlib.suppress(InvalidStateError):  # the caller is gone
            self.answer.set_exception(error)

    def finish(self) -> None:
        assert self.compiled is not None
        result = Classified(
            classes=self.compiled.classes,
            probabilities=np.concatenate(self.answered),
            context=self.compiled.digest,
            module=self.message.module,
            compiled=self.when,
        )
        with contextlib.suppress(InvalidStateError):
            self.answer.set_result(result)


class ReasoningPool:
    """Owns one reasoning module, its compiled contexts, and the thread that runs them.

    Each round answers a share of every waiting request, in turn, in one forward over all their contexts. A request that
    fails, fails alone.
    """

    def __init__(self, settings: ReasoningSettings, loaded: "LoadedModule | None" = None) -> None:
        """`loaded` None loads that of the settings. Raises UnknownName, CorruptArtefact."""
        import torch

        from metasepia.reasoning import shipped
        from metasepia.reasoning.context import ContextPool

        torch.set_num_threads(settings.threads)
        self._settings = settings
        self._loaded = loaded or shipped.load(settings.module)
        self._contexts = ContextPool(int(settings.cache_mib * 2**20))
        self._arrived = threading.Condition()
        self._inbox: list[_Request] = []
        self._num_queued = 0
        self._queries_per_s: float | None = None
        self._num_queries = self._num_forwards = self._num_compiled = 0
        self._stopping = False
        self._worker = threading.Thread(target=self._work, name="reasoning pool", daemon=True)
        self._worker.start()

    @property
    def digest(self) -> str:
        return self._loaded.digest

    def statistics(self) -> dict[str, float]:
        """Queries, fused forwards and compiled contexts so far; contexts kept; queries waiting or running now."""
        return {
            "queries": self._num_queries,
            "forwards": self._num_forwards,
            "contexts_compiled": self._num_compiled,
            "contexts_kept": len(self._contexts),
            "context_bytes": self._contexts.num_bytes,
            "context_hits": self._contexts.num_hits,
            "queued_queries": self._num_queued,
            "queries_per_s": self._queries_per_s or 0.0,
        }

    async def classify(self, message: Classify) -> Classified:
        """Probabilities of each query's classes, in the order of the queries.

        Raises UnknownName for another module's digest, InvalidRequest for a context or queries that cannot be answered,
        Overloaded when `max_queued_queries` wait, DeadlineExceeded.
        """
        if message.module != self._loaded.digest:
            raise UnknownName("reasoning module", message.module, (self._loaded.digest,))
        _check_queries(message.queries, message.context)
        num_queries, limit = len(message.queries), self._settings.max_queued_queries
        if num_queries > limit:
            raise InvalidRequest("inputs", f"{num_queries} queries; at most {limit} at once")
        if self._num_queued + num_queries > limit:
            raise Overloaded("the queue of the reasoning pool", self._retry_after_s())
        return await self._ask(_Request(message))

    async def check(self, timeout_s: float = 10.0) -> None:
        """One real forward, past the queue's limit. Raises Unavailable when none comes back."""
        vectors = np.eye(4, self._loaded.module.shape.dims, dtype=np.float32)
        context = LabelledVectors(vectors=vectors, labels=("a", "b", "a", "b"))
        message = Classify(
            module=self.digest, context=context, queries=vectors[:1], deadline_unix_s=time.time() + timeout_s
        )
        try:
            classified = await self._ask(_Request(message))
        except DeadlineExceeded:
            raise Unavailable("the reasoning pool", 1.0) from None
        if not np.isfinite(classified.probabilities).all():
            raise Unavailable("the reasoning pool (its answers are not finite)", 60.0)

    async def check_health(self) -> None:
        """Called by Serve, which replaces a replica whose worker has died."""
        if not self._worker.is_alive():
            raise Unavailable("the reasoning pool", 1.0)

    def stop(self) -> None:
        """Ends the worker; what waits fails with Unavailable."""
        with self._arrived:
            self._stopping = True
            self._arrived.notify()
        self._worker.join()

    async def _ask(self, request: _Request) -> Classified:
        if not self._worker.is_alive():
            raise Unavailable("the reasoning pool", 1.0)
        timeout_s = remaining_s(request.message.deadline_unix_s, "the classification")
        num_queries = len(request.message.queries)
        self._num_queued += num_queries
        try:
            with self._arrived:
                self._inbox.append(request)
                self._arrived.notify()
            return await answer_within(request.answer, timeout_s, "the classification")
        finally:
            self._num_queued -= num_queries

    def _retry_after_s(self) -> float:
        """How long the queries that wait now will take, at the speed last measured; from 1 to 60."""
        return min(60.0, max(1.0, self._num_queued / self._queries_per_s)) if self._queries_per_s else 1.0

    def _work(self) -> None:
        import torch

        torch.set_num_threads(self._settings.threads)  # OpenMP keeps this for each thread
        waiting: list[_Request] = []
        while True:
            with self._arrived:
                while not (self._inbox or waiting or self._stopping):
                    self._arrived.wait()
                arrived, self._inbox = self._inbox, []
                if self._stopping:
                    for request in (*waiting, *arrived):
                        request.fail(Unavailable("the reasoning pool", 1.0))
                    return
            waiting += arrived
            for request in waiting:
                if request.message.deadline_unix_s <= time.time():
                    request.fail(DeadlineExceeded("the classification", 0.0))
            alive = [request for request in waiting if not request.answer.done()]
            num_served = self._round(alive)
            # Those served go behind those that the round's budget did not reach.
            waiting = [r for r in (*alive[num_served:], *alive[:num_served]) if not r.answer.done()]

    def _round(self, requests: Sequence[_Request]) -> int:
        """Compiles what is missing and answers a share of each request; how many requests had one."""
        budget, num_served = ROUND_ROWS, 0
        shares: list[tuple[_Request, np.ndarray]] = []
        began_s = time.monotonic()
        fresh: dict[str, CompiledContext] = {}
        for request in requests:
            share = budget // (len(requests) - num_served)  # what earlier requests did not use passes to later ones
            num_served += 1
            if request.compiled is None:
                request.compiled = self._compile(request, fresh)
            if request.compiled is None:
                continue
            num_rows = len(request.compiled.rows)
            taken = request.message.queries[request.num_answered :][: max(1, share // num_rows)]
            shares.append((request, taken))
            budget -= len(taken) * num_rows
            if budget <= 0:
                break
        self._answer(shares)
        num_queries = sum(len(queries) for _, queries in shares)
        if num_queries:
            speed = num_queries / max(time.monotonic() - began_s, 1e-6)
            self._queries_per_s = speed if self._queries_per_s is None else 0.8 * self._queries_per_s + 0.2 * speed
        return num_served

    def _compile(self, request: _Request, fresh: "dict[str, CompiledContext]") -> "CompiledContext | None":
        from metasepia.reasoning.context import Context, compile_context

        given = request.message.context
        try:
            context: Context = Context.of(given.vectors, given.labels, seed=given.seed)
            digest = context.digest(self.digest)
            # One too large for the pool is still shared by the requests of this round.
            found = self._contexts.get(digest) or fresh.get(digest)
            if found is None:
                found = fresh[digest] = compile_context(context, self._loaded)
                request.when = "now"
                self._num_compiled += 1
                self._contexts.put(found)
        except MetasepiaError as error:
            request.fail(error)
            return None
        except Exception as error:  # a failure of one context must not take the worker with it
            request.fail(Unavailable(f"the reasoning pool ({type(error).__name__}: {error})", 1.0))
            return None
        return found

    def _answer(self, shares: Sequence[tuple[_Request, np.ndarray]]) -> None:
        from metasepia.reasoning.context import answer

        if not shares:
            return
        asked = [(request.compiled, queries) for request, queries in shares if request.compiled is not None]
        try:
            answers = answer(self._loaded.module, asked)
        except Exception as error:
            # Out of memory, most likely: halves may fit, and a request that fails alone fails nobody else.
            if len(shares) > 1:
                self._answer(shares[: len(shares) // 2])
                self._answer(shares[len(shares) // 2 :])
            elif isinstance(error, MetasepiaError):
                shares[0][0].fail(error)
            else:
                shares[0][0].fail(Unavailable(f"the reasoning pool ({type(error).__name__}: {error})", 1.0))
            return
        self._num_forwards += 1
        for (request, queries), probabilities in zip(shares, answers, strict=True):
            self._num_queries += len(queries)
            request.answered.append(probabilities)
            request.num_answered += len(queries)
            if request.num_answered >= len(request.message.queries):
                request.finish()


def _check_queries(queries: np.ndarray, context: LabelledVectors) -> None:
    if queries.ndim != 2 or not len(queries):
        raise InvalidRequest("inputs", f"no queries: their vectors have the shape {list(queries.shape)}")
    if context.vectors.ndim == 2 and queries.shape[1] != context.vectors.shape[1]:
        raise InvalidRequest(
            "inputs", f"vectors of {queries.shape[1]} numbers; those of the examples have {context.vectors.shape[1]}"
        )
    if not np.isfinite(queries).all():
        bad = int(np.flatnonzero(~np.isfinite(queries).all(axis=1))[0])
        raise InvalidRequest(f"inputs[{bad}]", "its vector holds NaN or infinity")
