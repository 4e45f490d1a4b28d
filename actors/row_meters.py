"""What a backbone's scheduler tells of its rows and steps, as metrics and spans. Lives where the scheduler does."""

import time
from collections.abc import Mapping

from actors import meters, tracing
from cluster.settings import BackboneSettings
from metasepia.decoding.scheduling import Scheduler
from metasepia.decoding.watching import RowStory, StepStory
from metasepia.digests import short
from metasepia.rows import Adapter


class RowMeters:
    """Watches one scheduler. `tell` is called again and again, the rest from the scheduler's thread."""

    def __init__(self, settings: BackboneSettings) -> None:
        self._settings = settings
        self._scheduler: Scheduler | None = None
        self._id = settings.id
        self._counted: dict[str, int] = {}
        self._batch: tuple[tuple[str | None, ...], float, float] | None = None
        """Rows that decode together, since when, until when; only where one of them is traced."""
        self._batches: dict[str, list[str]] = {}
        """By row, the spans of the batches that it was in."""
        self._left: dict[str, RowStory] = {}
        """Traced rows that ended in this step, which is told after them."""

    def follow(self, scheduler: Scheduler) -> None:
        """The scheduler that tells us, for what it holds."""
        self._scheduler = scheduler
        meters.SAMPLING.follow(self.tell)

    def stepped(self, step: StepStory) -> None:
        id_ = self._id
        meters.STEPS.inc(backbone=id_)
        meters.STEP.observe(step.seconds, backbone=id_)
        meters.STEP_ROWS.observe(step.num_live + step.num_read, backbone=id_)
        used = step.num_live + step.read_tokens
        meters.BATCH_TOKENS.inc(used, part="backbone", model=id_, what="used")
        meters.BATCH_TOKENS.inc(step.padding_tokens, part="backbone", model=id_, what="padding")
        end = step.begun_s + step.seconds
        for begun_s, traced in step.groups:
            tracing.batch("prefill", traced, begun_s, end, backbone=id_, rows=len(traced))
        self._follow(step.live, step.begun_s, end)

    def ended(self, row: RowStory) -> None:
        id_ = self._id
        meters.ROWS.inc(backbone=id_, outcome=row.outcome)
        if row.begun_s is not None:
            meters.ROW_QUEUE.observe(row.begun_s - row.submitted_s, backbone=id_)
            if row.first_s is not None:
                meters.ROW_PREFILL.observe(row.first_s - row.begun_s, backbone=id_)
        if row.traceparent is not None:
            self._left[row.traceparent] = row

    def _trace(self, parent: str, row: RowStory, batches: list[str]) -> None:
        id_ = self._id
        begun_s = row.ended_s if row.begun_s is None else row.begun_s
        tracing.record("queued", parent, row.submitted_s, begun_s, backbone=id_, prompt_tokens=row.num_prompt)
        if row.num_tokens and row.first_s is not None:
            told = {"tokens": row.num_tokens, "outcome": row.outcome, "reused_tokens": row.num_reused}
            tracing.record("decode", parent, row.first_s, row.ended_s, batches, backbone=id_, **told)

    def _follow(self, live: tuple[str | None, ...], begin: float, end: float) -> None:
        """A span for each while in which the same rows decode."""
        if self._batch is not None and self._batch[0] != live:
            self._close()
        if self._batch is not None:
            self._batch = (live, self._batch[1], end)
        elif any(live):
            self._batch = (live, begin, end)
        if not self._left.keys().isdisjoint(live):
            self._close()
        for parent, row in self._left.items():
            self._trace(parent, row, self._batches.pop(parent, []))
        self._left.clear()

    def _close(self) -> None:
        assert self._batch is not None
        (rows, begin, end), self._batch = self._batch, None
        made = tracing.linked_span("decode batch", rows, begin, end, backbone=self._id, rows=len(rows))
        for one in rows:
            if one is not None and made is not None:
                self._batches.setdefault(one, []).append(made)

    def tell(self) -> None:
        """Gauges of what the scheduler holds, and how far its counters went since the last time."""
        assert self._scheduler is not None
        load, id_ = self._scheduler.load(), self._id
        meters.QUEUED.set(load.num_waiting, backbone=id_)
        meters.RUNNING_ROWS.set(load.num_live + load.num_reading, backbone=id_)
        meters.QUEUED_TOKENS.set(load.num_waiting_tokens, backbone=id_)
        meters.CACHE.set(load.cache_tokens / self._settings.max_batch_tokens, backbone=id_)
        meters.PREFIX_TOKENS.set(load.prefix_tokens, backbone=id_)
        meters.EXPERTS.set(load.experts, backbone=id_)
        meters.EXPERT_BYTES.set(load.expert_bytes, backbone=id_)
        if load.experts:
            each = max(1, load.expert_bytes // load.experts)
            meters.EXPERT_ROOM.set(self._settings.max_expert_bytes // each, backbone=id_)
        meters.REUSED_TOKENS.inc(self._since("reused", load.reused_tokens), backbone=id_)
        meters.PUT_BACK.inc(self._since("put_back", load.put_back), backbone=id_)
        meters.EXPERTS_MOVED.inc(self._since("in", load.experts_learnt), backbone=id_, way="in")
        meters.EXPERTS_MOVED.inc(self._since("out", load.experts_forgotten), backbone=id_, way="out")
        self._tell_adapters(self._scheduler.adapters())

    def _tell_adapters(self, adapters: Mapping[Adapter, tuple[int, int]]) -> None:
        found: dict[tuple[str, str], int] = {}
        for adapter, (running, waiting) in adapters.items():
            name = short(adapter[0][0]) if len(adapter) == 1 else "mixture"
            for state, count in (("running", running), ("waiting", waiting)):
                if count:
                    found[name, state] = found.get((name, state), 0) + count
        meters.ADAPTER_ROWS.keep_only(found.keys(), backbone=self._id)
        for (name, state), count in found.items():
            meters.ADAPTER_ROWS.set(count, backbone=self._id, adapter=name, state=state)

    def _since(self, what: str, now: int) -> int:
        before, self._counted[what] = self._counted.get(what, 0), now
        return now - before


class Pace:
    """How fast one row's tokens come, as its backbone's owner sees them: rebuilds of the gang included."""

    def __init__(self, backbone: str, begin_unix_s: float) -> None:
        self._backbone, self._begin_s = backbone, begin_unix_s
        self._first_s: float | None = None
        self._num_later = 0

    def tokens(self, count: int, last: bool) -> None:
        """More of them are there."""
        now = time.time()
        if self._first_s is None:
            self._first_s = now
            meters.FIRST_TOKEN.observe(now - self._begin_s, backbone=self._backbone)
        else:
            self._num_later += count
        if last and self._num_later:
            meters.PER_TOKEN.observe((now - self._first_s) / self._num_later, backbone=self._backbone)
