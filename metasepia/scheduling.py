"""Which rows run in the next step: bounded queue, priorities, deadlines, joins and leaves between steps.

No torch and no Ray: the scheduler hands `StepPlan`s to a callable and reads `StepResult`s.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass

from metasepia.errors import MetasepiaError
from metasepia.prepared import PreparedBackbone
from metasepia.rows import HiddenStates, Row, Scores, TokenChunk
from metasepia.steps import StepPlan, StepResult

Answer = TokenChunk | Scores | HiddenStates | MetasepiaError
"""What a row's callback receives: token chunks, the last with `finish`; or one Scores or HiddenStates; or one error."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds of one scheduler."""

    max_rows: int
    """Rows that decode together."""
    max_batch_tokens: int
    """Rows times the longest row (prompt and answer), over all rows that hold a cache."""
    max_queued_tokens: int
    """Waiting prompts and their answers."""
    step_target_s: float = 0.25
    """Prompts are read in pieces that take about this long, so that live rows keep streaming."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """What the scheduler holds now, for metrics and routing."""

    num_live: int
    num_waiting: int
    num_waiting_tokens: int
    cache_tokens: int
    """Reserved: rows times the longest row."""
    tokens_per_s: float
    """Drain rate: prompt and answer tokens done a second, recently."""
    steps: int


class Scheduler:
    """Continuous batching over one decoder. Methods may be called from any thread."""

    def __init__(self, run: Callable[[StepPlan], StepResult], limits: Limits, prepared: PreparedBackbone) -> None: ...

    def submit(self, row: Row, answer: Callable[[Answer], None]) -> None:
        """Queues a row. `answer` is called from the scheduler's thread and must not block.

        Raises, before anything is queued: UnknownName for another backbone's digest, InvalidRequest and WindowExceeded
        for a row that can never run, DeadlineExceeded for one that is late already, Overloaded when the queue is full,
        with the seconds that it takes to drain at the measured rate.
        """
        raise NotImplementedError

    def cancel(self, request_id: str) -> bool:
        """Drops a row without an answer, before the next step. False if it is not here (any more)."""
        raise NotImplementedError

    def load(self) -> Load:
        raise NotImplementedError

    def step(self) -> bool:
        """Plans, runs and answers one step; False if there was nothing to do."""
        raise NotImplementedError

    def run_forever(self, stop: threading.Event) -> None:
        """Steps until `stop` is set; sleeps while nothing waits.

        Raises what `run` raises. No row is answered then: the owner has to submit them again to a new scheduler, with
        `Row.sent` holding what had left. A row past its deadline is answered DeadlineExceeded, alone.
        """
        raise NotImplementedError
