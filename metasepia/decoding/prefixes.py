"""Which prefixes a decoder keeps: read once for all rows that name them, bounded in tokens; the oldest goes first.

Rank 0's scheduler decides and the plan tells: a prefix is read like a row, under a key, and dropped by that key. The
bound is in tokens because ranks may hold different numbers of heads: each keeps and drops the same.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from metasepia.decoding.inflight import Entry
from metasepia.errors import MetasepiaError
from metasepia.rows import HiddenStatesWanted, Row

MIN_SHARED = 16
"""Fewer tokens are read again with the row."""
PATIENCE_S = 5.0
"""A row for whose prefix there is no room is read whole after this time."""


@dataclass(eq=False)
class Prefix:
    """Tokens whose keys and values the decoder keeps, or is about to."""

    reader: Entry
    held: bool = False
    """Read to its end."""
    used: int = 0
    """When a row asked for it last, in rows."""

    @property
    def key(self) -> int:
        return self.reader.key

    @property
    def num_tokens(self) -> int:
        return len(self.reader.row.token_ids)


class Prefixes:
    """Prefixes by adapter and tokens. Not locked: the scheduler calls it behind its own lock."""

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._by_tokens: dict[object, Prefix] = {}
        self._asked = 0
        self.reused = 0
        """Tokens that rows took from here instead of reading them."""

    @property
    def num_tokens(self) -> int:
        return sum(one.num_tokens for one in self._by_tokens.values())

    def admit(self, entry: Entry) -> None:
        """Looks at a new row: whether it will wait for a prefix, and how much of it it can take."""
        row = entry.row
        if not MIN_SHARED <= len(row.prefix) <= self._max_tokens:
            return
        sequence = (*row.token_ids, *row.sent)
        bound = min(len(row.prefix), _reusable(row, len(sequence)))
        shared = next((i for i in range(bound) if sequence[i] != row.prefix[i]), bound)
        if shared >= MIN_SHARED:
            entry.shared, entry.waits_for_prefix = shared, True

    def assign(
        self, waiting: Sequence[Entry], keys: Iterator[int], now: float, *, max_rows: int
    ) -> tuple[list[Entry], list[int]]:
        """Gives the first `max_rows` waiting rows their prefixes.

        Returns the readers of new ones, with keys of their own, to be queued, and the keys to drop for them.
        """
        in_use = {id(entry.prefix) for entry in waiting if entry.prefix is not None}
        readers: list[Entry] = []
        dropped: list[int] = []
        no_room: set[object] = set()
        for entry in waiting[:max_rows]:
            if not entry.waits_for_prefix or entry.prefix is not None:
                continue
            name = (entry.row.adapter, entry.row.prefix)
            prefix = self._by_tokens.get(name)
            if prefix is None and (name in no_room or not self._make_room(len(entry.row.prefix), in_use, dropped)):
                no_room.add(name)
                entry.waits_for_prefix = now - entry.submitted_s <= PATIENCE_S
                continue
            if prefix is None:
                prefix = self._by_tokens[name] = Prefix(_reader(entry, next(keys), now))
                readers.append(prefix.reader)
            self._asked += 1
            prefix.used, entry.prefix = self._asked, prefix
            in_use.add(id(prefix))
        return readers, dropped

    def _make_room(self, num_tokens: int, in_use: set[int], dropped: list[int]) -> bool:
        """Drops what nobody waiting uses, the longest unused first; nothing where that is not enough."""
        free = [(name, one) for name, one in self._by_tokens.items() if one.held and id(one) not in in_use]
        free.sort(key=lambda item: item[1].used)
        short = self.num_tokens + num_tokens - self._max_tokens
        if sum(one.num_tokens for _, one in free) < short:
            return False
        for name, one in free:
            if short <= 0:
                break
            short -= one.num_tokens
            dropped.append(one.key)
            del self._by_tokens[name]
        return True

    def read(self, reader: Entry) -> None:
        """The decoder holds it from now on."""
        for one in self._by_tokens.values():
            if one.reader is reader:
                one.held = True

    def failed(self, reader: Entry, waiting: Sequence[Entry]) -> None:
        """It cannot be read: rows that waited for it are read whole, and find out for themselves."""
        self._by_tokens = {name: one for name, one in self._by_tokens.items() if one.reader is not reader}
        for entry in waiting:
            if entry.prefix is not None and entry.prefix.reader is reader:
                entry.prefix, entry.waits_for_prefix = None, False


def _reusable(row: Row, num_tokens: int) -> int:
    """How many of a row's first tokens give nothing that it asks for."""
    if row.want == "logprobs":
        return row.score_from - 1
    if row.want == "hidden_states" and row.hidden.pooling in ("mean", "none"):
        return 0
    if row.want == "hidden_states" and row.hidden.pooling == "spans":
        return min(begin for begin, _ in row.hidden.spans)
    return num_tokens - 1


def _reader(entry: Entry, key: int, now: float) -> Entry:
    row = Row(
        request_id=f"\0prefix {key}",  # no caller's name
        backbone=entry.row.backbone,
        token_ids=entry.row.prefix,
        adapter=entry.row.adapter,
        priority=entry.row.priority,
        want="hidden_states",
        hidden=HiddenStatesWanted(layers=(-1,), pooling="last"),
    )
    return Entry(row, _nobody, key, now, place=key, leased=entry.leased, reads_prefix=True)


def _nobody(answer: object) -> None:
    assert isinstance(answer, MetasepiaError)  # a reader is answered by errors only, and its rows meet them again
