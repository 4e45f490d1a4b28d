"""What somebody may want to know of a scheduler's work: how long each row waited, was read and decoded, and with whom.

The scheduler tells a `Watcher` from its own thread, between steps; nothing here changes what it does.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from metasepia.decoding.inflight import Answer, Entry, Group
from metasepia.rows import TokenChunk

Traced = tuple[str | None, ...]
"""`Row.traceparent` of the rows of a batch."""


@dataclass(frozen=True, kw_only=True)
class RowStory:
    """A row that was answered to its end; moments in the scheduler's clock."""

    traceparent: str | None
    submitted_s: float
    begun_s: float | None
    """Its prompt began to be read; None where it ended before."""
    first_s: float | None
    """Its first token was there, or its whole answer; None where it ended before."""
    ended_s: float
    num_prompt: int
    num_reused: int
    """Tokens of the prompt taken from a kept prefix."""
    num_tokens: int
    """Of its answer, those of this scheduler."""
    outcome: str
    """stop, length, whole (scores and hidden states), or the class of its error."""


@dataclass(frozen=True, kw_only=True)
class StepStory:
    """A step that was run."""

    begun_s: float
    seconds: float
    num_live: int
    """Rows that decoded."""
    num_read: int
    """Rows of the groups that were read."""
    read_tokens: int
    padding_tokens: int
    """Computed for nothing, left of shorter prompts or for rows that had left."""
    live: Traced
    groups: tuple[tuple[float, Traced], ...]
    """Groups whose last part was read in this step: when they began, and their rows."""


@runtime_checkable
class Watcher(Protocol):
    """Must not block, and raise nothing."""

    def stepped(self, step: StepStory) -> None: ...
    def ended(self, row: RowStory) -> None: ...


@dataclass
class Reading:
    """What one step reads."""

    num_rows: int = 0
    tokens: int = 0
    padding: int = 0
    finished: list[tuple[float, Traced]] = field(default_factory=list)

    def add(self, group: Group, num_columns: int) -> None:
        """After the group's `done` was moved on by `num_columns`."""
        begin, used = group.done - num_columns, 0
        for entry in group.entries:
            used += max(0, group.done - max(begin, group.width - entry.own_len))
        self.num_rows += group.num_rows
        self.tokens += used
        self.padding += num_columns * group.num_rows - used
        if group.remaining == 0:
            self.finished.append((group.begun_s, tuple(one.row.traceparent for one in group.entries)))


def story(entry: Entry, answer: Answer, now: float) -> RowStory | None:
    """None where the answer is not the row's last."""
    if isinstance(answer, TokenChunk):
        if answer.finish is None:
            return None
        outcome: str = answer.finish
    else:
        outcome = type(answer).__name__ if isinstance(answer, Exception) else "whole"
    times = entry.times
    return RowStory(
        traceparent=entry.row.traceparent,
        submitted_s=entry.submitted_s,
        begun_s=times.begun_s,
        first_s=times.first_s,
        ended_s=now,
        num_prompt=len(entry.row.token_ids),
        num_reused=times.num_reused,
        num_tokens=times.num_tokens,
        outcome=outcome,
    )


def mark_begun(entries: Sequence[Entry], now: float) -> None:
    """Their prompts are about to be read; a row that was put back began before."""
    for entry in entries:
        if entry.times.begun_s is None:
            entry.times.begun_s, entry.times.num_reused = now, entry.shared if entry.prefix is not None else 0


def mark_answered(entry: Entry, answer: Answer, now: float) -> None:
    """A token, or a whole answer, is there."""
    if entry.times.first_s is None and not isinstance(answer, Exception):
        entry.times.first_s = now
    if isinstance(answer, TokenChunk):
        entry.times.num_tokens += len(answer.token_ids)
