"""Inputs too many for one request: cut, sent a few at once, and put together again in their order.

The server's limits are settings of its own, so a first guess is made (`NUM_ITEMS`, `NUM_BYTES`), and a part that it
refuses for its size is halved until it goes through. What is finished is never lost to a part that fails.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from metasepia.client.calls import ARROW, SKIPPED, Steps, Together, encoded
from metasepia.client.errors import BadInput, Failure, Invalid, MetasepiaError, Refused, moved

T = TypeVar("T")

NUM_ITEMS = 512
NUM_BYTES = 2 << 20
"""Of items in one request; a server reads 8 MiB where its settings do not say otherwise."""
_LIMITS = re.compile(r"\bmax_(inputs|explained|states_mib|json_states_mib)\b")
"""Settings of the server that bound one request's inputs, as its refusals name them."""


class Cut(ABC):
    """Items, and the places where they are cut into requests."""

    content_type: str

    def __init__(self, field: str, sizes: Sequence[int], head_bytes: int, num_items: int | None) -> None:
        """`sizes`: of each item in a body's bytes; `head_bytes`: of what every body has beside its items.

        `num_items` None: NUM_ITEMS a request.
        """
        self.field, self._sizes, self._head_bytes = field, sizes, head_bytes
        self.bounds: list[tuple[int, int]] = []
        begin, num_bytes = 0, 0
        for place, size in enumerate(sizes):
            if place > begin and (place - begin >= (num_items or NUM_ITEMS) or num_bytes + size > NUM_BYTES):
                self.bounds.append((begin, place))
                begin, num_bytes = place, 0
            num_bytes += size
        if sizes:
            self.bounds.append((begin, len(sizes)))

    @abstractmethod
    def body(self, begin: int, end: int) -> bytes:
        """Of the request for items begin to end - 1."""

    def is_too_much(self, begin: int, end: int, error: MetasepiaError) -> bool:
        """Whether the server would serve fewer of these items at a time."""
        if not isinstance(error, Invalid) or end - begin < 2:
            return False
        if error.status == 413:  # nothing is won where the examples alone are too long
            return sum(self._sizes[begin:end]) > self._head_bytes
        return error.status == 400 and _LIMITS.search(error.message) is not None


class JsonCut(Cut):
    """A body is an object, with a list of some items beside its other fields."""

    content_type = "application/json"

    def __init__(self, tree: Mapping[str, Any], field: str, items: Sequence[Any], num_items: int | None) -> None:
        """Fields that are None are left out. Raises BadInput for an item that is not JSON."""
        self._head = encoded({name: value for name, value in tree.items() if value is not None})
        self._encoded = [encoded(one) for one in items]
        super().__init__(field, [len(one) + 1 for one in self._encoded], len(self._head), num_items)

    def body(self, begin: int, end: int) -> bytes:
        items = b",".join(self._encoded[begin:end])
        return self._head[:-1] + (b"" if self._head == b"{}" else b",") + f'"{self.field}":['.encode() + items + b"]}"


class VectorCut(Cut):
    """A body is an Arrow stream: a row for each labelled vector, then one without a label for each of some items."""

    content_type = ARROW

    def __init__(
        self,
        tree: Mapping[str, Any],
        field: str,
        items: Sequence[Sequence[float]],
        num_items: int | None,
        examples: Sequence[tuple[Sequence[float], str]],
    ) -> None:
        """All vectors of one width. Raises BadInput for a number that is not finite."""
        import numpy as np

        self._items, self._vectors = items, [vector for vector, _ in examples]
        for name, vectors in (("examples", self._vectors), (field, items)):
            finite = np.isfinite(np.array(vectors, np.float32)).all(axis=-1)
            if not finite.all():
                raise BadInput(f"{name}[{int(finite.argmin())}]", "a number of the vector is not finite")
        self._labels = [label for _, label in examples]
        self._options = encoded({name: value for name, value in tree.items() if value is not None})
        size = 4 * len(items[0])
        super().__init__(field, [size] * len(items), len(self._options) + size * len(examples), num_items)

    def body(self, begin: int, end: int) -> bytes:
        import numpy as np
        import pyarrow as pa

        rows = np.array([*self._vectors, *self._items[begin:end]], np.float32)
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), rows.shape[1])
        labels = pa.array([*self._labels, *[None] * (end - begin)], pa.string())
        batch = pa.record_batch({"vector": vectors, "label": labels}).replace_schema_metadata(
            {b"metasepia": self._options}
        )
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, batch.schema) as writer:
            writer.write_batch(batch)
        return sink.getvalue().to_pybytes()


def together(
    cut: Cut,
    part: Callable[[int, int], Steps[T]],
    progress: bool | None,
    what: str,
) -> Steps[tuple[list[tuple[int, int, T]], list[Failure]]]:
    """The finished pieces (begin, end, answer) in order, and the failures.

    Raises the error itself where nothing is finished.
    """
    finished: list[tuple[int, int, T]] = []
    failures: list[Failure] = []

    def run(begin: int, end: int) -> Steps[None]:
        try:
            answer = yield from part(begin, end)
        except MetasepiaError as error:
            if cut.is_too_much(begin, end, error):
                yield from halves(begin, end)
                return
            failures.append(
                Failure(begin, end, moved(error, cut.field, begin) if isinstance(error, Refused) else error)
            )
            raise
        finished.append((begin, end, answer))

    def halves(begin: int, end: int) -> Steps[None]:
        errors: list[MetasepiaError] = []
        middle = (begin + end) // 2
        for half in ((begin, middle), (middle, end)):
            try:
                yield from run(*half)
            except MetasepiaError as error:
                errors.append(error)
        if errors:
            raise errors[0]

    bounds = cut.bounds
    with bar(bounds[-1][1] if bounds else 0, what, len(bounds) > 1 if progress is None else progress) as advance:
        outcomes: list[Any] = yield Together(
            [run(begin, end) for begin, end in bounds],
            lambda place: advance(bounds[place][1] - bounds[place][0]),
            goes_on,
        )
    for outcome in outcomes:
        if isinstance(outcome, Exception) and not isinstance(outcome, MetasepiaError):
            raise outcome  # our own mistake
    if failures and not finished:
        raise min(failures, key=lambda one: one.begin).error
    first = min(failures, key=lambda one: one.begin, default=None)
    for (begin, end), outcome in zip(bounds, outcomes, strict=True):
        if outcome is SKIPPED and first is not None:
            failures.append(Failure(begin, end, first.error))
    return sorted(finished, key=lambda one: one[0]), sorted(failures, key=lambda one: one.begin)


def goes_on(error: Exception) -> bool:
    """A complaint about an input is about that part; anything else would come back with the next."""
    return isinstance(error, Invalid) and error.param is not None and "[" in error.param


@contextmanager
def bar(total: int, what: str, shown: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar on standard error, where that is a terminal."""
    import sys

    if not shown or not sys.stderr.isatty():
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda count: progress.advance(task, count)
