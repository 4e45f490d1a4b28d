"""What fits beside what runs: the bounds of decoder and queue, and how background rows make way for others."""

import bisect
from collections.abc import Iterator

from metasepia.decoding.inflight import Entry, Group, Limits, State
from metasepia.errors import Overloaded

MAX_RETRY_S = 600.0


class Room:
    """The bounds of one scheduler over its state. Not locked: the scheduler calls it behind its own lock."""

    def __init__(self, state: State, limits: Limits, keys: Iterator[int]) -> None:
        self._state, self._limits, self._keys = state, limits, keys
        self.num_put_back = 0
        """Times that a background row made way for another."""

    # -- the queue -----------------------------------------------------------------------------------------------------

    def queue(self, entry: Entry) -> None:
        bisect.insort(self._state.waiting, entry, key=lambda one: one.order)

    def check_queue(self, entry: Entry, tokens_per_s: float) -> None:
        """Raises Overloaded when a new row finds the queue full, with the seconds that it takes to drain.

        Counted are rows of its own priority or a higher one; for a background row all, against half the bound.
        """
        bound = self._limits.max_queued_tokens // (2 if entry.is_background else 1)
        counted = [
            one.total_len
            for one in self._state.waiting
            if entry.is_background or one.row.priority >= entry.row.priority
        ]
        over = sum(counted) + entry.total_len - bound
        if over > 0 and counted:
            seconds = over / tokens_per_s if tokens_per_s else 1.0
            raise Overloaded("the backbone's queue", min(max(seconds, 1.0), MAX_RETRY_S))

    def waiting_tokens(self) -> int:
        return sum(entry.total_len for entry in self._state.waiting)

    # -- the decoder ---------------------------------------------------------------------------------------------------

    def generating(self) -> list[Entry]:
        return [*self._state.live.values(), *(entry for entry in self._state.reading() if entry.generates)]

    def fits(self, new: list[Entry]) -> bool:
        """Whether these rows keep the bounds; a row that is alone always does (checked on arrival)."""
        return self._reads_fit(new, list(self._state.groups.values())) and self._decodes_fit(new, self.generating())

    def _reads_fit(self, new: list[Entry], groups: list[Group]) -> bool:
        read = sum(group.num_rows * group.width for group in groups)
        longest = max(entry.read_len for entry in new)
        return (not groups and len(new) == 1) or read + len(new) * longest <= self._limits.max_batch_tokens

    def _decodes_fit(self, new: list[Entry], generating: list[Entry]) -> bool:
        if not new[0].generates:
            return True
        rows = [*generating, *new]
        longest = max(entry.total_len for entry in rows)
        return len(rows) <= self._limits.max_rows and len(rows) * longest <= self._limits.max_batch_tokens

    def make_way(self, head: Entry) -> None:
        """Puts background rows back, the latest first, until `head` fits; none where it would not fit without them."""
        if head.is_background or self.fits([head]):
            return
        state, others = self._state, [group for group in self._state.groups.values() if not group.is_background]
        generating = [entry for entry in self.generating() if not entry.is_background]
        if not (self._reads_fit([head], others) and self._decodes_fit([head], generating)):
            return
        groups = [group for group in state.groups.values() if group.is_background]
        live = [entry for entry in state.live.values() if entry.is_background]
        while not self._reads_fit([head], list(state.groups.values())):
            self._put_back(groups.pop().entries)
        while not self._decodes_fit([head], self.generating()):
            reading = [group for group in groups if group.entries[0].generates]
            if live:
                self._put_back([live.pop()])
            else:
                self._put_back(reading[-1].entries)
                groups.remove(reading[-1])

    def _put_back(self, entries: list[Entry]) -> None:
        """Rows that have begun wait again, in the places that they had."""
        state = self._state
        for entry in list(entries):
            state.take_out(entry)
            entry.put_back(next(self._keys))
            self.queue(entry)
            self.num_put_back += 1
