"""A bounded number of requests under way, parts written as they are whole, every row answered or with its error."""

import asyncio
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from jobs.batching.asking import Asker, RowRefused
from jobs.batching.parts import Parts
from jobs.batching.reading import Source
from jobs.batching.spec import BatchSpec
from jobs.batching.tasks import Answer, Task
from jobs.progress_bar import Bar
from metasepia.digests import short
from metasepia.errors import InvalidSettings

PARTS_AHEAD = 2
"""Parts whose rows are in memory: while the slowest request of one is awaited, the next one's are under way."""
MAX_ERROR_CHARS = 500
_ONE_OF_MANY = re.compile(r"(?:inputs?|texts|items)\[(\d+)\]")


@dataclass
class Progress:
    """How many rows are answered."""

    spec: BatchSpec
    num_done: int
    num_errors: int = 0
    began_s: float = field(default_factory=time.monotonic)
    num_before: int = 0

    def __post_init__(self) -> None:
        self.num_before = self.num_done

    @property
    def title(self) -> str:
        return f"batch {short(self.spec.digest)}"

    @property
    def steps(self) -> tuple[int, int, float]:
        rate = (self.num_done - self.num_before) / max(1e-9, time.monotonic() - self.began_s)
        return self.num_done, self.spec.num_rows, rate

    def __str__(self) -> str:
        """As `rows 8192/1000000, 401.3 a second, 41.2 min left, 3 with errors`."""
        done, total, rate = self.steps
        said = [f"rows {done}/{total}"]
        said += [f"{rate:.1f} a second", f"{(total - done) / rate / 60:.1f} min left"] if rate else []
        said += [f"{self.num_errors} with errors"] if self.num_errors else []
        return ", ".join(said)


class Batch:
    """One batch over one server."""

    def __init__(self, spec: BatchSpec, source: Source, task: Task, asker: Asker, concurrency: int) -> None:
        """Raises InvalidSettings for columns that are not there, or that the answers would hide."""
        self._spec, self._source, self._task, self._asker = spec, source, task, asker
        self._turn = asyncio.Semaphore(concurrency)
        names = source.schema.names
        for column in (spec.column, spec.model_column, *(spec.keep or ())):
            if column is not None and column not in names:
                raise InvalidSettings("column", column, f"a column of the input: {', '.join(names)}")
        self._kept = names if spec.keep is None else [name for name in names if name in spec.keep]
        self._added = [field.with_name(spec.prefix + field.name) for field in (*task.columns, ERROR)]
        for one in self._added:
            if one.name in self._kept:
                raise InvalidSettings(
                    "prefix",
                    spec.prefix,
                    f"one that tells {one.name!r} from the input's column of that name (--prefix)",
                )

    @property
    def error_column(self) -> str:
        return self._added[-1].name

    @property
    def schema(self) -> pa.Schema:
        """Of the output."""
        return pa.schema([*(self._source.schema.field(name) for name in self._kept), *self._added])

    async def run(self, parts: Parts, progress: Progress, bar: Bar) -> None:
        """Answers and writes every part that is not there. Raises Stopped, StorageFailed, CorruptArtefact."""
        done = parts.done()
        todo = [part for part in range(self._spec.num_parts) if part not in done]
        columns = list(dict.fromkeys([*self._kept, self._spec.column, *filter(None, [self._spec.model_column])]))
        reading = self._source.parts([self._spec.rows_of(part) for part in todo], columns)
        ahead, running = asyncio.Semaphore(PARTS_AHEAD), set[asyncio.Task[None]]()

        async def one(part: int, table: pa.Table) -> None:
            try:
                whole = await self._answered(part, table, progress, bar)
                await asyncio.to_thread(parts.put, part, whole)
            finally:
                ahead.release()

        try:
            for part in todo:
                await ahead.acquire()
                _raise_first(running)
                table = await asyncio.to_thread(_next, reading)
                running.add(asyncio.create_task(one(part, table)))
                running = {task for task in running if not task.done() or task.exception()}
            await asyncio.gather(*running)
        finally:
            for task in running:
                task.cancel()
            with suppress(asyncio.CancelledError):
                await asyncio.gather(*running, return_exceptions=True)

    async def _answered(self, part: int, table: pa.Table, progress: Progress, bar: Bar) -> pa.Table:
        spec, first = self._spec, self._spec.rows_of(part).start
        cells = table[spec.column].to_pylist()
        models = [None] * len(cells) if spec.model_column is None else table[spec.model_column].to_pylist()
        answers: list[Answer] = [{} for _ in cells]
        items: dict[int, Any] = {}
        by_model: dict[str | None, list[int]] = {}
        for row, (cell, model) in enumerate(zip(cells, models, strict=True)):
            try:
                items[row] = self._task.item(cell)
                by_model.setdefault(spec.model if model is None else str(model), []).append(row)
            except ValueError as error:
                answers[row] = {"error": f"invalid_cell: {error}"}

        async def ask(model: str | None, rows: list[int]) -> None:
            async with self._turn:
                for row, answer in zip(rows, await self._ask(model, rows, items, first), strict=True):
                    answers[row] = answer
                    progress.num_errors += "error" in answer
            progress.num_done += len(rows)
            bar.show()

        size = min(spec.rows_a_request, self._task.at_most)
        requests = [
            ask(model, rows[begin : begin + size])
            for model, rows in by_model.items()
            for begin in range(0, len(rows), size)
        ]
        tasks = [asyncio.create_task(one) for one in requests]
        try:
            await asyncio.gather(*tasks)
        except BaseException:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            raise
        unasked = len(cells) - len(items)
        progress.num_done, progress.num_errors = progress.num_done + unasked, progress.num_errors + unasked
        return self._table(table, answers)

    async def _ask(self, model: str | None, rows: Sequence[int], items: dict[int, Any], first: int) -> list[Answer]:
        """The answers of rows of one model; what the server refuses is narrowed down to the rows that it is about."""
        try:
            body = self._task.body(model, [items[row] for row in rows], first + rows[0])
            return await self._asker.ask(self._task, body, len(rows), self._spec.key_of([first + row for row in rows]))
        except RowRefused as refused:
            error: Answer = {"error": str(refused)[:MAX_ERROR_CHARS]}
            if len(rows) == 1 or refused.status in (404, 410) or refused.param == "model":
                return [error] * len(rows)
            match = _ONE_OF_MANY.match(refused.param or "")
            if match is not None and int(match[1]) < len(rows):
                bad = int(match[1])
                before, after = rows[:bad], rows[bad + 1 :]
                rest = await self._ask(model, [*before, *after], items, first)
                return [*rest[:bad], error, *rest[bad:]]
            middle = len(rows) // 2
            return [
                *await self._ask(model, rows[:middle], items, first),
                *await self._ask(model, rows[middle:], items, first),
            ]

    def _table(self, table: pa.Table, answers: Sequence[Answer]) -> pa.Table:
        columns = [table[name] for name in self._kept]
        for one, added in zip((*self._task.columns, ERROR), self._added, strict=True):
            columns.append(pa.array([answer.get(one.name) for answer in answers], added.type))
        return pa.table(columns, schema=self.schema)


ERROR = pa.field("error", pa.string())
"""Null where the row has its answer, else why it has none: `code: message`."""


def _next(tables: Iterator[pa.Table]) -> pa.Table:
    return next(tables)


def _raise_first(running: set[asyncio.Task[None]]) -> None:
    for task in running:
        if task.done() and task.exception() is not None:
            task.result()
