"""What the scheduler knows of its rows: the bounds they must keep, where each of them is, how fast they go."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from metasepia.decoding.steps import NewRow
from metasepia.errors import InvalidRequest, MetasepiaError, UnknownName, WindowExceeded
from metasepia.models.prepared import PreparedBackbone
from metasepia.rows import MAX_TOP_LOGPROBS, Adapter, HiddenStates, Row, Scores, TokenChunk

if TYPE_CHECKING:
    from metasepia.decoding.prefixes import Prefix

Answer = TokenChunk | Scores | HiddenStates | MetasepiaError
"""What a row's callback receives: token chunks, the last with `finish`; or one Scores or HiddenStates; or one error."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds of one scheduler."""

    max_rows: int
    """Rows that decode together."""
    max_batch_tokens: int
    """Rows times the longest row, prompt and answer: once over the rows that decode, once over prompts being read."""
    max_queued_tokens: int
    """Waiting prompts and their answers. Background rows (priority below 0) may fill half as much, and are not counted
    when others arrive: they never cause a refusal."""
    max_prefix_tokens: int = 0
    """Prefixes kept for the rows that name them; 0 keeps none."""
    step_target_s: float = 0.25
    """Prompts are read in pieces that take about this long, so that live rows keep streaming."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """What the scheduler holds now, for metrics and routing."""

    num_live: int
    num_reading: int
    num_waiting: int
    num_waiting_tokens: int
    cache_tokens: int
    """Reserved by rows that decode or will: rows times the longest row."""
    tokens_per_s: float
    """Prompt and answer tokens done a second, recently; 0 before the first step."""
    steps: int
    prefix_tokens: int
    """Of kept prefixes."""
    reused_tokens: int
    """Taken from kept prefixes instead of read, since the start."""
    put_back: int = 0
    """Times that a background row made way for another, since the start."""
    experts: int = 0
    """Held by each rank; 0 where they are not leased."""
    expert_bytes: int = 0
    experts_learnt: int = 0
    """Since the start."""
    experts_forgotten: int = 0


def check(row: Row, prepared: PreparedBackbone, limits: Limits) -> None:
    """Refuses a row that this backbone can never run: UnknownName, InvalidRequest, WindowExceeded."""
    if row.backbone != prepared.digest:
        raise UnknownName("backbone", row.backbone, (prepared.digest,))
    if not row.token_ids:
        raise InvalidRequest("token_ids", "a row needs at least one token")
    tokens = (*row.token_ids, *row.sent, *row.prefix)
    if not 0 <= min(tokens) <= max(tokens) < prepared.vocab_size:
        raise InvalidRequest("token_ids", f"tokens must lie from 0 to {prepared.vocab_size - 1}")
    total = len(row.token_ids)
    if row.want == "tokens":
        sampling = row.sampling
        if not 0 <= sampling.temperature <= 2:  # written so that NaN fails too
            raise InvalidRequest("temperature", f"must lie from 0 to 2, got {sampling.temperature}")
        if not 0 < sampling.top_p <= 1:
            raise InvalidRequest("top_p", f"must lie above 0 and at most at 1, got {sampling.top_p}")
        if not max(1, len(row.sent)) <= sampling.max_tokens:
            raise InvalidRequest("max_tokens", f"must be at least {max(1, len(row.sent))}, got {sampling.max_tokens}")
        total += sampling.max_tokens
    if row.want == "logprobs" and not 1 <= row.score_from <= total:
        raise InvalidRequest("score_from", f"must lie from 1 to {total}, got {row.score_from}")
    if not 0 <= row.top_logprobs <= MAX_TOP_LOGPROBS:
        raise InvalidRequest("top_logprobs", f"must lie from 0 to {MAX_TOP_LOGPROBS}, got {row.top_logprobs}")
    if row.want == "hidden_states":
        num_layers = prepared.num_layers
        if not row.hidden.layers or not all(-num_layers - 1 <= layer <= num_layers for layer in row.hidden.layers):
            raise InvalidRequest("layers", f"must name layers from {-num_layers - 1} to {num_layers}")
        spans = row.hidden.spans
        if (row.hidden.pooling == "spans") != bool(spans) or not all(0 <= b < e <= total for b, e in spans):
            raise InvalidRequest("spans", f"must be parts [begin, end) of the {total} tokens, given with pooling spans")
    bound = min(prepared.window, limits.max_batch_tokens)
    if total > bound:
        raise WindowExceeded("token_ids" if len(row.token_ids) > bound else "max_tokens", total, bound)


@dataclass
class Times:
    """Of one row, filled in as it goes."""

    begun_s: float | None = None
    """Its prompt began to be read."""
    first_s: float | None = None
    """Its first token was there, or its whole answer."""
    num_reused: int = 0
    """Tokens of its prompt taken from a kept prefix."""
    num_tokens: int = 0
    """Of its answer."""


@dataclass(eq=False)
class Entry:
    row: Row
    answer: Callable[[Answer], None]
    key: int
    submitted_s: float
    place: int
    """Orders rows of one priority: that of arrival, also after it was put back."""
    token: int = -1
    """Live rows: the token chosen last, to be fed next."""
    answered: list[int] = field(default_factory=list)
    """Tokens chosen since it began."""
    leased: bool = True
    """Its experts are held, and stay while it waits unless a row before it needs their room (`leases`)."""
    reads_prefix: bool = False
    """It is no caller's: it is read for the rows that share it."""
    waits_for_prefix: bool = False
    """It is read after a kept prefix, of which it takes the first `shared` tokens."""
    shared: int = 0
    prefix: "Prefix | None" = None
    times: Times = field(default_factory=Times)

    @property
    def ready(self) -> bool:
        return self.leased and (not self.waits_for_prefix or (self.prefix is not None and self.prefix.held))

    @property
    def order(self) -> tuple[int, int]:
        return -self.row.priority, self.place

    @property
    def generates(self) -> bool:
        return self.row.want == "tokens"

    @property
    def is_background(self) -> bool:
        return self.row.priority < 0

    @property
    def kind(self) -> tuple[object, ...]:
        """Rows of one kind can be read together."""
        if self.reads_prefix:
            return "prefix", self.key
        hidden = dataclasses.replace(self.row.hidden, spans=()) if self.row.want == "hidden_states" else None
        return self.row.want, hidden, self.row.priority

    @property
    def read_len(self) -> int:
        """Its columns in a group."""
        return len(self.row.token_ids) + len(self.row.sent)

    @property
    def own_len(self) -> int:
        """Tokens to be read, after those of a prefix that is held."""
        return self.read_len - (self.shared if self.waits_for_prefix else 0)

    @property
    def total_len(self) -> int:
        return len(self.row.token_ids) + (self.row.sampling.max_tokens if self.generates else 0)

    @property
    def left_len(self) -> int:
        """Steps until it ends, about: what is still to be chosen."""
        return self.row.sampling.max_tokens - len(self.row.sent) - len(self.answered) if self.generates else 1

    def put_back(self, key: int) -> None:
        """To be read again from its beginning, under another key, together with what it has answered."""
        self.row = dataclasses.replace(self.row, sent=(*self.row.sent, *self.answered))
        self.key, self.token, self.answered = key, -1, []
        self.prefix, self.waits_for_prefix = None, self.shared > 0

    def new_row(self) -> NewRow:
        row = self.row
        return NewRow(
            key=self.key,
            token_ids=(*row.token_ids, *row.sent) if self.generates else row.token_ids,
            adapter=row.adapter,
            want="prefix" if self.reads_prefix else row.want,
            sampling=row.sampling,
            seed=row.seed,
            score_from=row.score_from,
            top_logprobs=row.top_logprobs,
            hidden=row.hidden,
            reuse=(self.prefix.key, self.shared) if self.prefix is not None else None,
        )


@dataclass
class Group:
    """Rows being read together; columns [0, done) are read, or were taken from prefixes."""

    entries: list[Entry]
    width: int
    num_rows: int
    """As begun: rows that leave meanwhile are still computed."""
    done: int
    adapters: tuple[Adapter, ...]
    """As begun, for the same reason."""
    begun_s: float

    @classmethod
    def of(cls, entries: list[Entry], now: float) -> "Group":
        width = max(entry.read_len for entry in entries)
        adapters = tuple(entry.row.adapter for entry in entries)
        return cls(entries, width, len(entries), width - max(entry.own_len for entry in entries), adapters, now)

    @property
    def priority(self) -> int:
        return self.entries[0].row.priority

    @property
    def is_background(self) -> bool:
        return self.priority < 0

    @property
    def num_reused(self) -> int:
        """As begun: tokens in the columns that are done."""
        return sum(max(0, self.done - (self.width - entry.read_len)) for entry in self.entries)

    @property
    def remaining(self) -> int:
        return self.width - self.done


@dataclass
class Rates:
    """Running means, for the size of the next piece and for `retry_after_s`."""

    decode_s: float = 0.0
    read_per_s: float = 0.0
    tokens_per_s: float = 0.0

    def observe(self, elapsed_s: float, num_read: int, num_chosen: int, fed: bool) -> None:
        if num_read + num_chosen == 0:
            return  # rows only left
        elapsed_s = max(elapsed_s, 1e-6)
        self.tokens_per_s = _running(self.tokens_per_s, (num_read + num_chosen) / elapsed_s)
        if num_read == 0:
            self.decode_s = _running(self.decode_s, elapsed_s)
        else:
            reading_s = max(elapsed_s - (self.decode_s if fed else 0.0), 0.2 * elapsed_s)
            self.read_per_s = _running(self.read_per_s, num_read / reading_s)


def _running(mean: float, value: float) -> float:
    return value if mean == 0 else 0.7 * mean + 0.3 * value


@dataclass
class State:
    """Everything behind the lock. A row is in exactly one of waiting, a group, live."""

    entries: dict[str, Entry] = field(default_factory=dict)
    waiting: list[Entry] = field(default_factory=list)
    groups: dict[int, Group] = field(default_factory=dict)
    live: dict[int, Entry] = field(default_factory=dict)
    drops: set[int] = field(default_factory=set)
    """Keys that the decoder may still hold and must forget in the next step."""
    steps: int = 0
    closed: bool = False

    def reading(self) -> Iterator[Entry]:
        return itertools.chain.from_iterable(group.entries for group in self.groups.values())

    def forget(self, entry: Entry) -> None:
        """Takes a row out from wherever it is, for good."""
        del self.entries[entry.row.request_id]
        self.take_out(entry)

    def take_out(self, entry: Entry) -> None:
        """Takes a row out from where it is; the decoder forgets its key."""
        if entry in self.waiting:
            self.waiting.remove(entry)
            return
        self.drops.add(entry.key)
        self.live.pop(entry.key, None)
        for name, group in list(self.groups.items()):
            group.entries = [one for one in group.entries if one is not entry]
            if not group.entries:
                del self.groups[name]
