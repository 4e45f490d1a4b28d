"""Which rows run in the next step: bounded queue, priorities, deadlines, joins and leaves between steps.

No torch and no Ray: the scheduler hands `StepPlan`s to a callable and reads `StepResult`s. Waiting rows go by priority,
then arrival; rows that generate and rows that are only read (scores, hidden states) take turns at equal priority.
Prompts are read in pieces of about `step_target_s`, and a short prompt may overtake a long one that is being read.

Rows of priority below 0 are *background* (a search's population). They fill what others leave: where one of these has
no room, background rows that have begun are put back to wait, and go on later with the tokens that they have sent. The
queue has room of its own for them, so however many there are, no other row is refused for them.
"""

import itertools
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np

from metasepia.decoding.inflight import Answer, Entry, Group, Limits, Load, Rates, State, check
from metasepia.decoding.leases import Leases, Moves
from metasepia.decoding.prefixes import Prefixes
from metasepia.decoding.room import Room
from metasepia.decoding.steps import Advance, Begin, Chosen, StepPlan, StepResult
from metasepia.decoding.watching import Reading, StepStory, Watcher, mark_answered, mark_begun, story
from metasepia.errors import DeadlineExceeded, InvalidRequest, MetasepiaError, Unavailable
from metasepia.models.prepared import PreparedBackbone
from metasepia.rows import Adapter, Executed, HiddenStates, Row, Scores, TokenChunk

logger = logging.getLogger(__name__)

MAX_GROUPS = 3
"""Groups of prompts being read at once; more only delay each other. For rows that are not background, those of
background rows do not count.
"""
MIN_BUDGET = 64
"""Tokens read in one step, whatever was measured."""
MAX_BUDGET = 8192
MAX_LOOKAHEAD = 512
"""Waiting rows looked through for companions of the first."""


class Scheduler:
    """Continuous batching over one decoder. Methods may be called from any thread; one thread steps."""

    def __init__(
        self,
        run: Callable[[StepPlan], StepResult],
        limits: Limits,
        prepared: PreparedBackbone,
        *,
        leases: Leases | None = None,
        move: Callable[[Moves], None] | None = None,
        watcher: Watcher | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`leases`: who may begin depends on the experts that the decoder holds, which the plans change; `move` is told
        which ones to bring, from the scheduler's thread, and must not block. None: `run` refuses what it lacks.
        """
        self._leases, self._move, self._watcher = leases, move, watcher
        self._run, self._limits, self._prepared, self._clock = run, limits, prepared, clock
        self._state, self._rates = State(), Rates()
        self._prefixes = Prefixes(limits.max_prefix_tokens)
        self._changed = threading.Condition()
        self._keys, self._groups = itertools.count(), itertools.count()
        self._room = Room(self._state, limits, self._keys)
        self._last_generated = False
        self._stirred = False
        """Something came since the last step began."""

    # -- from any thread -----------------------------------------------------------------------------------------------

    def submit(self, row: Row, answer: Callable[[Answer], None]) -> None:
        """Queues a row. `answer` is called from the scheduler's thread and must not block.

        Raises, before anything is queued: UnknownName for another backbone's digest, InvalidRequest and WindowExceeded
        for a row that can never run, DeadlineExceeded for one that is late already, Overloaded when the queue is full,
        with the seconds that it takes to drain at the measured rate, Unavailable once stepping has ended.
        """
        now, key = self._clock(), next(self._keys)
        entry = Entry(row, answer, key, now, place=key, leased=self._leases is None or not row.adapter)
        check(row, self._prepared, self._limits)
        self._prefixes.admit(entry)
        if row.deadline_unix_s <= now:
            raise DeadlineExceeded("the row", 0.0)
        with self._changed:
            if self._state.closed:
                raise Unavailable("the backbone", 5.0)
            if row.request_id in self._state.entries:
                raise InvalidRequest("request_id", f"{row.request_id} is in flight already")
            self._room.check_queue(entry, self._rates.tokens_per_s)
            self._state.entries[row.request_id] = entry
            self._room.queue(entry)
            self._stir()

    def expert_arrived(self, digest: str, num_bytes: int) -> None:
        """Every rank has the expert aside: asked for, or not."""
        assert self._leases is not None
        with self._changed:
            self._leases.arrived(digest, num_bytes)
            self._stir()

    def expert_pinned(self, digest: str, num_bytes: int) -> None:
        """Every rank holds the expert, for good."""
        assert self._leases is not None
        with self._changed:
            self._leases.pin(digest, num_bytes)

    def expert_refused(self, digest: str, error: MetasepiaError) -> None:
        """An expert that was asked for cannot be had; the rows that wait for it are answered with the error."""
        assert self._leases is not None
        with self._changed:
            self._leases.refuse(digest, error)
            self._stir()

    def _stir(self) -> None:
        self._stirred = True
        self._changed.notify_all()

    def cancel(self, request_id: str) -> bool:
        """Drops a row without an answer, before the next step. False if it is not here (any more)."""
        with self._changed:
            entry = self._state.entries.get(request_id)
            if entry is not None:
                self._state.forget(entry)
                self._stir()
            return entry is not None

    def load(self) -> Load:
        with self._changed:
            state = self._state
            generating = self._room.generating()
            return Load(
                num_live=len(state.live),
                num_reading=sum(1 for _ in state.reading()),
                num_waiting=len(state.waiting),
                num_waiting_tokens=self._room.waiting_tokens(),
                cache_tokens=len(generating) * max((entry.total_len for entry in generating), default=0),
                tokens_per_s=self._rates.tokens_per_s,
                steps=state.steps,
                prefix_tokens=self._prefixes.num_tokens,
                reused_tokens=self._prefixes.reused,
                put_back=self._room.num_put_back,
                **self._expert_load(),
            )

    def adapters(self) -> dict[Adapter, tuple[int, int]]:
        """Rows that run and rows that wait, by adapter; those of the base weights are left out."""
        with self._changed:
            state = self._state
            running = Counter(one.row.adapter for one in (*state.live.values(), *state.reading()))
            waiting = Counter(one.row.adapter for one in state.waiting)
        return {one: (running[one], waiting[one]) for one in running | waiting if one}

    def _expert_load(self) -> dict[str, int]:
        leases = self._leases
        if leases is None:
            return {}
        return {
            "experts": leases.num_held,
            "expert_bytes": leases.num_bytes,
            "experts_learnt": leases.num_learnt,
            "experts_forgotten": leases.num_forgotten,
        }

    # -- the stepping thread -------------------------------------------------------------------------------------------

    def run_forever(self, stop: threading.Event) -> None:
        """Steps until `stop` is set; sleeps while nothing waits.

        Raises what `run` raises. No row is answered then: the owner submits them again to a new scheduler, with
        `Row.sent` holding what had left.
        """
        try:
            while not stop.is_set():
                if not self.step():
                    with self._changed:
                        if not self._stirred:  # rows may wait for experts
                            self._changed.wait(0.2)
        finally:
            with self._changed:
                self._state.closed = True

    def step(self) -> bool:
        """Plans, runs and answers one step; False if there was nothing to do."""
        with self._changed:
            self._stirred = False
            answers = self._expire(self._clock())
            self._assign_prefixes()
            answers += self._assign_experts()
            plan = self._plan()
            reading = self._reading(plan) if plan is not None else Reading()
            live = tuple(one.row.traceparent for one in self._state.live.values())
            moves = self._leases.moves() if self._leases is not None else None
        self._deliver(answers)
        if moves and self._move is not None:
            self._move(moves)
        if plan is None:
            return False
        started = self._clock()
        result = self._run(plan)
        elapsed_s = self._clock() - started
        with self._changed:
            self._observe(plan, result, elapsed_s)
            answers = self._absorb(plan, result)
        self._deliver(answers)
        if self._watcher is not None:
            self._watcher.stepped(
                StepStory(
                    begun_s=started,
                    seconds=elapsed_s,
                    num_live=len(live),
                    num_read=reading.num_rows,
                    read_tokens=reading.tokens,
                    padding_tokens=reading.padding,
                    live=live,
                    groups=tuple(reading.finished),
                )
            )
        return True

    def _reading(self, plan: StepPlan) -> Reading:
        reading = Reading()
        for one in plan.advance:
            reading.add(self._state.groups[one.group], one.num_columns)
        return reading

    def _deliver(self, answers: list[tuple[Entry, Answer]]) -> None:
        now = self._clock()
        for entry, answer in answers:
            mark_answered(entry, answer, now)
            if self._watcher is not None and (told := story(entry, answer, now)) is not None:
                self._watcher.ended(told)
            try:
                entry.answer(answer)
            except Exception:  # its reader is gone: that row alone ends
                logger.warning("row %s: nobody takes its answer; dropped", entry.row.request_id, exc_info=True)
                self.cancel(entry.row.request_id)

    def _expire(self, now: float) -> list[tuple[Entry, Answer]]:
        late = [entry for entry in self._state.entries.values() if entry.row.deadline_unix_s <= now]
        for entry in late:
            self._state.forget(entry)
        return [
            (entry, DeadlineExceeded("the row", round(entry.row.deadline_unix_s - entry.submitted_s, 3)))
            for entry in late
        ]

    # -- planning ------------------------------------------------------------------------------------------------------

    def _plan(self) -> StepPlan | None:
        state = self._state
        begin: list[Begin] = []
        while entries := self._next_group():
            name = next(self._groups)
            state.waiting = [entry for entry in state.waiting if entry not in entries]
            now = self._clock()
            mark_begun(entries, now)
            group = state.groups[name] = Group.of(entries, now)
            self._prefixes.reused += group.num_reused
            begin.append(Begin(group=name, rows=tuple(entry.new_row() for entry in entries)))
        drop, state.drops = tuple(sorted(state.drops)), set()
        feed = tuple((key, entry.token) for key, entry in state.live.items())
        advance = tuple(self._advances())
        forget, learn = self._leases.changes() if self._leases is not None else ((), ())
        if not (forget or learn or drop or feed or advance):
            return None
        state.steps += 1
        return StepPlan(
            step=state.steps,
            forget=forget,
            learn=learn,
            drop=drop,
            feed=feed,
            begin=tuple(begin),
            advance=advance,
        )

    def _assign_prefixes(self) -> None:
        """Queues the prefixes that waiting rows lack. Dropped ones are forgotten before anything begins: whoever used
        them has its own copy by then.
        """
        state = self._state
        readers, dropped = self._prefixes.assign(state.waiting, self._keys, self._clock(), max_rows=MAX_LOOKAHEAD)
        state.drops.update(dropped)
        for reader in readers:
            state.entries[reader.row.request_id] = reader
            self._room.queue(reader)

    def _assign_experts(self) -> list[tuple[Entry, Answer]]:
        """Decides which waiting rows have their experts. Returns those that can never have them, which end."""
        state = self._state
        if self._leases is None:
            return []
        begun: dict[str, int] = {}
        for entry in (*state.live.values(), *state.reading()):
            for digest, _ in entry.row.adapter:
                begun[digest] = max(begun.get(digest, 0), entry.left_len)
        for group in state.groups.values():  # rows that left it are still computed
            for adapter in group.adapters:
                for digest, _ in adapter:
                    begun.setdefault(digest, 1)
        failed = self._leases.assign(state.waiting, begun, state.steps, max_rows=MAX_LOOKAHEAD)
        for entry, _ in failed:
            if entry.reads_prefix:
                self._prefixes.failed(entry, state.waiting)
            state.forget(entry)
        return list(failed)

    def _budget(self) -> int:
        """Tokens to read in one step; twice as many while no live row waits for it."""
        seconds = self._limits.step_target_s * (1 if self._state.live else 2)
        wanted = int(self._rates.read_per_s * seconds)
        return min(max(wanted, MIN_BUDGET), MAX_BUDGET)

    def _advances(self) -> Iterator[Advance]:
        groups = list(self._state.groups.items())
        # The oldest every fourth step, so that short prompts cannot keep a long one waiting for ever.
        if self._state.steps % 4:
            groups.sort(key=lambda item: (-item[1].priority, item[1].remaining))
        else:
            groups.sort(key=lambda item: item[1].is_background)
        budget = self._budget()
        for name, group in groups:
            columns = min(group.remaining, max(budget // group.num_rows, 1))
            budget -= columns * group.num_rows
            group.done += columns
            yield Advance(group=name, num_columns=columns)
            if budget < MIN_BUDGET // 2:
                return

    def _next_group(self) -> list[Entry]:
        """The rows that begin next: the first that has room, and others of its kind and about its length."""
        state = self._state
        heads: dict[bool, Entry] = {}
        for entry in state.waiting:
            if entry.ready and entry.generates not in heads:
                heads[entry.generates] = entry  # in order: who has no room blocks those of his sort behind him
                if len(heads) == 2:
                    break
        for entry in heads.values():
            self._room.make_way(entry)
        able = [entry for entry in heads.values() if self._room.fits([entry])]
        if not able:
            return []
        head = min(able, key=lambda one: (-one.row.priority, one.generates == self._last_generated, one.place))
        rivals = [group for group in state.groups.values() if head.is_background or not group.is_background]
        if len(rivals) >= MAX_GROUPS:
            return []
        for group in rivals:
            overtakes = head.row.priority > group.priority or 2 * head.own_len <= group.remaining
            if not overtakes:
                return []
        self._last_generated = head.generates
        chosen, budget = [head], max(self._budget(), head.own_len)
        for entry in itertools.islice(state.waiting, MAX_LOOKAHEAD):
            if entry is head or not entry.ready or entry.kind != head.kind:
                continue
            lengths = [one.own_len for one in (*chosen, entry)]
            if len(lengths) * max(lengths) <= budget and max(lengths) <= max(2 * min(lengths), 16):
                if not self._room.fits([*chosen, entry]):
                    break
                chosen.append(entry)
        return chosen

    # -- what came back ------------------------------------------------------------------------------------------------

    def _observe(self, plan: StepPlan, result: StepResult, elapsed_s: float) -> None:
        rows = {name: group.num_rows for name, group in self._state.groups.items()}
        num_read = sum(rows.get(one.group, 1) * one.num_columns for one in plan.advance)
        self._rates.observe(elapsed_s, num_read, len(result.chosen), bool(plan.feed))

    def _absorb(self, plan: StepPlan, result: StepResult) -> list[tuple[Entry, Answer]]:
        state = self._state
        flying = {**state.live, **{entry.key: entry for entry in state.reading()}}
        answers: list[tuple[Entry, Answer]] = []
        for key, error in result.failed.items():
            if key in flying:
                answers.append((flying[key], error))
                if flying[key].reads_prefix:
                    self._prefixes.failed(flying[key], state.waiting)
                state.forget(flying.pop(key))
        for key, array in result.arrays.items():
            if key in flying:
                entry, executed = flying[key], result.executed[key]
                answers.append((entry, _array_answer(entry.row, array, executed)))
                state.forget(entry)
        for key, chosen in result.chosen.items():
            if key in flying:
                answers.append((flying[key], self._token_answer(flying[key], chosen, result.executed[key])))
        for name, group in list(state.groups.items()):
            if group.remaining == 0:  # its rows went live above, or left; a prefix is kept from now on
                for entry in group.entries:
                    if entry.reads_prefix:
                        self._prefixes.read(entry)
                        del state.entries[entry.row.request_id]
                del state.groups[name]
        return answers

    def _token_answer(self, entry: Entry, chosen: Chosen, executed: Executed) -> TokenChunk:
        sampling, before = entry.row.sampling, len(entry.row.sent) + len(entry.answered)
        finish: Literal["stop", "length"] | None = None
        kept = True
        if before >= sampling.max_tokens:  # a row run again whose last chunk was lost
            finish, kept = "length", False
        elif chosen.token_id in sampling.stop_token_ids:
            finish, kept = "stop", False
        elif before + 1 == sampling.max_tokens:
            finish = "length"
        if finish is None:
            entry.token = chosen.token_id
            entry.answered.append(chosen.token_id)
            self._state.live[entry.key] = entry
        else:
            self._state.forget(entry)
        return TokenChunk(
            request_id=entry.row.request_id,
            token_ids=(chosen.token_id,) if kept else (),
            logprobs=(chosen.logprob,) if kept else (),
            top=(chosen.top,) if kept and chosen.top else (),
            finish=finish,
            executed=executed if finish or len(entry.answered) == 1 else None,
        )


def _array_answer(row: Row, array: np.ndarray, executed: Executed) -> Scores | HiddenStates:
    if row.want == "logprobs":
        if array.ndim == 1:
            return Scores(request_id=row.request_id, logprobs=array, executed=executed)
        own, ids, best = np.split(array, [1, 1 + array.shape[1] // 2], axis=1)
        return Scores(
            request_id=row.request_id,
            logprobs=own[:, 0].astype(np.float32),
            executed=executed,
            top_ids=ids.astype(np.int64),
            top_logprobs=best,
        )
    return HiddenStates(request_id=row.request_id, states=array, executed=executed)
