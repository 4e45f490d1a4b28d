"""Slow work beside a fast worker: explanations and self-checks of contexts, on one thread, in turn.

A job is a generator: it works until it yields, and another job has its turn then. So a long explanation delays a short
self-check by a step, and answers to queries, which have a thread of their own, by a share of the processor.
"""

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from actors.messages import Explained, SelfChecked
from actors.waiting import answer_within, remaining_s
from metasepia.errors import DeadlineExceeded, MetasepiaError, Overloaded, Unavailable

if TYPE_CHECKING:
    from metasepia.reasoning.context import CompiledContext, Context
    from metasepia.reasoning.shipped import LoadedModule

Steps = Generator[None, None, Any]
"""Work in steps; what it returns is the answer."""

STEP_S = 0.1
"""About how long one step of an explanation takes."""


@dataclass
class _Job:
    steps: Steps
    what: str
    deadline_unix_s: float
    answer: "Future[Any]" = field(default_factory=Future)

    def fail(self, error: Exception) -> None:
        with contextlib.suppress(InvalidStateError):  # the caller is gone
            self.answer.set_exception(error)


class AuditThread:
    """Runs jobs in turn, at most `max_jobs` at a time; a job whose caller has gone or whose time is up ends."""

    def __init__(self, name: str, max_jobs: int, prepare: Callable[[], None]) -> None:
        """`prepare` runs in the thread, first."""
        self._name, self._max_jobs, self._prepare = name, max_jobs, prepare
        self._arrived = threading.Condition()
        self._jobs: deque[_Job] = deque()
        self._num_jobs = 0
        self._stopping = False
        self._seconds = 1.0
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    @property
    def num_jobs(self) -> int:
        """Waiting or running now."""
        return self._num_jobs

    async def run(self, steps: Steps, what: str, deadline_unix_s: float) -> Any:
        """What the steps return. Raises Overloaded, DeadlineExceeded, and what the steps raise."""
        if not self._thread.is_alive():
            raise Unavailable(self._name, 1.0)
        if self._num_jobs >= self._max_jobs:
            raise Overloaded(f"the queue of {self._name}", min(60.0, max(1.0, self._seconds * self._num_jobs)))
        timeout_s = remaining_s(deadline_unix_s, what)
        job, began_s = _Job(steps, what, deadline_unix_s), time.monotonic()
        self._num_jobs += 1
        try:
            with self._arrived:
                self._jobs.append(job)
                self._arrived.notify()
            answer = await answer_within(job.answer, timeout_s, what)
            self._seconds = 0.8 * self._seconds + 0.2 * (time.monotonic() - began_s) / self._num_jobs
            return answer
        finally:
            self._num_jobs -= 1

    def stop(self) -> None:
        """Ends the thread after the step that it is in; what waits fails with Unavailable."""
        with self._arrived:
            self._stopping = True
            self._arrived.notify()
        self._thread.join()

    def _work(self) -> None:
        self._prepare()
        while True:
            with self._arrived:
                while not (self._jobs or self._stopping):
                    self._arrived.wait()
                if self._stopping:
                    for job in self._jobs:
                        job.fail(Unavailable(self._name, 1.0))
                    return
                job = self._jobs.popleft()
            if self._step(job):
                with self._arrived:
                    self._jobs.append(job)

    def _step(self, job: _Job) -> bool:
        """Whether there is more to do."""
        if job.answer.done():
            return False
        if job.deadline_unix_s <= time.time():
            job.fail(DeadlineExceeded(job.what, 0.0))
            return False
        try:
            next(job.steps)
            return True
        except StopIteration as done:
            with contextlib.suppress(InvalidStateError):
                job.answer.set_result(done.value)
        except MetasepiaError as error:
            job.fail(error)
        except Exception as error:  # a failure of one job must not take the thread with it
            job.fail(Unavailable(f"{self._name} ({type(error).__name__}: {error})", 1.0))
        return False


def self_check_in_steps(context: "Context", module: "LoadedModule", compiled: "CompiledContext") -> Steps:
    """Gives a SelfChecked."""
    from metasepia.reasoning import audit

    checked = yield from audit.self_check_in_steps(context, module, compiled)
    return SelfChecked(accuracy=checked.accuracy, num_left_out=checked.num_left_out, method=checked.method)


def explained_in_steps(
    context: "Context", module: "LoadedModule", compiled: "CompiledContext", queries: np.ndarray, nearest: int
) -> Steps:
    """Gives an Explained; as many examples a step as took about STEP_S before."""
    from metasepia.reasoning import audit

    parts: list[np.ndarray] = []
    begin, count, num_examples = 0, 1, len(context.labels)
    while begin < num_examples:
        began_s = time.monotonic()
        only = range(begin, min(begin + count, num_examples))
        parts.append(audit.influences(context, module, compiled, queries, only=only).values)
        begin += count
        seconds = max(time.monotonic() - began_s, 1e-6)
        count = max(1, min(2 * count, int(count * STEP_S / seconds)))
        yield
    found = audit.nearest(context, queries, nearest)
    return Explained(
        classes=compiled.classes,
        influences=np.concatenate(parts, axis=1),
        nearest=found.examples,
        similarity=found.similarity,
    )
