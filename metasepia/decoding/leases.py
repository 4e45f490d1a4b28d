"""Which experts the ranks hold: bounded in bytes, leased by the rows that use them, the longest unused go first.

Rank 0's scheduler decides, and the plan tells (`StepPlan.forget`, `StepPlan.learn`), so every rank's table changes
between the same two steps. An expert comes in three moves: it is *wanted* of the owner, who gives it to every rank,
which keep it aside; it has *arrived*; a plan *learns* it. Only the owner gives and takes back what is aside, in the
order in which it was asked, so that a copy that comes again is never taken for one that went.

A row begins once all its experts are held. From then on nothing takes them from it; while it waits, only a row before
it can. Where rows that have begun hold too much, what they will have done with soonest is *leaving*: no row behind the
one that needs the room may begin with it. So the first row in order always gets its experts, after a time bounded by
the rows that run.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from metasepia.decoding.inflight import Entry
from metasepia.digests import short
from metasepia.errors import InvalidRequest, MetasepiaError

MAX_COMING = 4
"""Experts asked for or aside at once, beside those of the first row that lacks one."""


@dataclass(frozen=True, kw_only=True)
class Moves:
    """What the owner has to do, in this order."""

    unwanted: tuple[str, ...] = ()
    """Take these back from every rank's side: nobody waits for them and there is no room."""
    wanted: tuple[str, ...] = ()
    """Give these to every rank, then call `arrived`; or `refuse`."""

    def __bool__(self) -> bool:
        return bool(self.unwanted or self.wanted)


@dataclass
class _Held:
    num_bytes: int
    used: int
    """The step in which a row used it last."""
    pinned: bool = False


class Leases:
    """The experts of one gang. Not locked: the scheduler calls it behind its own lock."""

    def __init__(self, max_bytes: int, *, always: frozenset[str] = frozenset()) -> None:
        """`always`: digests that every rank has from the start and that cost nothing (the identity)."""
        self.max_bytes, self._always = max_bytes, always
        self._held: dict[str, _Held] = {}
        self._asked: set[str] = set()
        self._aside: dict[str, int] = {}
        self._errors: dict[str, MetasepiaError] = {}
        self._forget: list[str] = []
        self._learn: list[str] = []
        self._wanted: list[str] = []
        self._unwanted: list[str] = []
        self.num_learnt = 0
        """Since the start."""
        self.num_forgotten = 0

    @property
    def num_held(self) -> int:
        return len(self._held)

    @property
    def num_bytes(self) -> int:
        return sum(one.num_bytes for one in self._held.values())

    def pin(self, digest: str, num_bytes: int) -> None:
        """Every rank holds it already, and for ever."""
        self._held[digest] = _Held(num_bytes, 0, pinned=True)

    def arrived(self, digest: str, num_bytes: int) -> None:
        """Every rank has it aside, asked for or not."""
        self._asked.discard(digest)
        if digest in self._held:
            self._unwanted.append(digest)
        else:
            self._aside[digest] = num_bytes

    def refuse(self, digest: str, error: MetasepiaError) -> None:
        """It cannot be had: rows that wait for it are answered so."""
        self._asked.discard(digest)
        self._errors[digest] = error

    def changes(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """What the next plan forgets, and then learns; handed out once."""
        changes = tuple(self._forget), tuple(self._learn)
        self._forget.clear()
        self._learn.clear()
        return changes

    def moves(self) -> Moves:
        """What the owner has to do; handed out once."""
        moves = Moves(unwanted=tuple(self._unwanted), wanted=tuple(self._wanted))
        self._unwanted.clear()
        self._wanted.clear()
        return moves

    # -- planning ------------------------------------------------------------------------------------------------------

    def assign(
        self, waiting: Sequence[Entry], begun: Mapping[str, int], step: int, *, max_rows: int
    ) -> list[tuple[Entry, MetasepiaError]]:
        """Leases to the first `max_rows` of the waiting rows, in order; `Entry.leased` says which may begin.

        `begun`: the experts of rows that have begun, with the steps until the last of them ends, about. Returns the
        rows that can never have theirs, with the reason.
        """
        for digest in begun:
            if digest in self._held:
                self._held[digest].used = step
        failed: list[tuple[Entry, MetasepiaError]] = []
        if not self._aside and not self._errors and all(entry.leased for entry in waiting[:max_rows]):
            return failed  # nearly always: nothing came, and who has a lease keeps it
        ahead, first = set[str](), True
        """Held for rows further ahead: of those only what is begun gives way."""
        leaving: set[str] | None = None
        """Not None: a row ahead waits for room, which these will give."""
        for place, entry in enumerate(waiting[:max_rows]):
            digests = self._experts_of(entry)
            error = next((self._errors[digest] for digest in digests if digest in self._errors), None)
            if error is not None:
                failed.append((entry, error))
                continue
            missing = [digest for digest in digests if digest not in self._held]
            if missing:
                entry.leased = False
                self._want(missing, first=first)
                first = False
                if leaving is None and all(digest in self._aside for digest in missing):
                    try:
                        leaving = self._make_room(missing, digests, ahead, waiting[place + 1 :], begun)
                    except InvalidRequest as refused:
                        failed.append((entry, refused))
                        continue
                    if leaving is None:
                        self._take_in(missing, step)
                        entry.leased = True
            else:
                entry.leased = not (leaving and leaving.intersection(digests))
            ahead.update(digest for digest in digests if digest in self._held and (entry.leased or leaving is None))
        self._errors.clear()
        self._settle(waiting, begun, step, full=leaving is not None)
        return failed

    def _experts_of(self, entry: Entry) -> tuple[str, ...]:
        return tuple(digest for digest, _ in entry.row.adapter if digest not in self._always)

    def _want(self, missing: Sequence[str], *, first: bool) -> None:
        for digest in missing:
            coming = len(self._asked) + len(self._aside)
            if digest not in self._asked and digest not in self._aside and (first or coming < MAX_COMING):
                self._asked.add(digest)
                self._wanted.append(digest)

    def _make_room(
        self,
        missing: Sequence[str],
        digests: Sequence[str],
        ahead: set[str],
        behind: Sequence[Entry],
        begun: Mapping[str, int],
    ) -> set[str] | None:
        """Room for what is missing of a row's experts, by forgetting idle ones; None when there is.

        Otherwise nothing is forgotten, and those that are to leave are returned: no row behind may begin with them.
        """
        needed = sum(self._aside[digest] for digest in missing)
        for_good = {name: one for name, one in self._held.items() if name in digests or one.pinned}
        least = needed + sum(one.num_bytes for one in for_good.values())
        if least > self.max_bytes:
            names = ", ".join(short(digest) for digest in digests)
            pinned = " beside the pinned one" if any(one.pinned for one in for_good.values()) else ""
            raise InvalidRequest(
                "model",
                f"the experts of this row ({names}) take {least / 2**20:.3g} MiB{pinned}, and this replica holds "
                f"{self.max_bytes / 2**20:.3g} MiB of them (its setting max_expert_mib)",
            )
        keep = ahead.union(for_good)
        chosen, free = self._idle(needed, keep.union(begun), behind)
        if free < needed:
            # Soonest free first. The choice stands until they are: no row behind begins with them, and others may.
            for digest in sorted(begun, key=lambda one: (begun[one], one)):
                if free < needed and digest in self._held and digest not in keep:
                    chosen.append(digest)
                    free += self._held[digest].num_bytes
            self._withdraw(behind, set(chosen))
            return set(chosen)
        self._withdraw(behind, set(chosen))
        self._drop(chosen)
        return None

    def _idle(self, needed: int, keep: set[str], behind: Sequence[Entry]) -> tuple[list[str], int]:
        """Experts to forget for `needed` bytes, and the bytes that are free then: those that no row waits for come
        first, and of them the longest unused.
        """
        waited_for = {digest for entry in behind if entry.leased for digest in self._experts_of(entry)}
        idle = [digest for digest in self._held if digest not in keep]
        idle.sort(key=lambda digest: (digest in waited_for, self._held[digest].used))
        free, chosen = self.max_bytes - self.num_bytes, []
        for digest in idle:
            if free >= needed:
                break
            chosen.append(digest)
            free += self._held[digest].num_bytes
        return chosen, free

    def _withdraw(self, entries: Sequence[Entry], digests: set[str]) -> None:
        for entry in entries:
            if entry.leased and not digests.isdisjoint(self._experts_of(entry)):
                entry.leased = False

    def _drop(self, digests: Sequence[str]) -> None:
        for digest in digests:
            del self._held[digest]
        self._forget += digests
        self.num_forgotten += len(digests)

    def _take_in(self, digests: Sequence[str], step: int) -> None:
        for digest in digests:
            self._held[digest] = _Held(self._aside.pop(digest), step)
        self._learn += digests
        self.num_learnt += len(digests)

    def _settle(self, waiting: Sequence[Entry], begun: Mapping[str, int], step: int, *, full: bool) -> None:
        """What is aside and no row waits for is learnt in the place of idle ones, or not wanted."""
        if not self._aside:
            return
        used = {digest for entry in waiting for digest in self._experts_of(entry)}
        pinned = {digest for digest, one in self._held.items() if one.pinned}
        for digest in [digest for digest in self._aside if digest not in used]:
            chosen, free = self._idle(self._aside[digest], used.union(begun, pinned), ())
            if full or free < self._aside[digest]:
                del self._aside[digest]
                self._unwanted.append(digest)
            else:
                self._drop(chosen)
                self._take_in([digest], step)
