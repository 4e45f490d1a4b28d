"""How far something is, for people: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from types import TracebackType
from typing import Protocol, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

LINE_EVERY_S = 10.0


class Tells(Protocol):
    """What a bar shows; its `str` is the whole of it in words."""

    @property
    def title(self) -> str: ...
    @property
    def steps(self) -> tuple[int, int, float]:
        """Done, in all (0: not known), and a second."""
        ...


class Bar:
    """Shows how far something is while a `with` lasts; silent where not `shown`."""

    def __init__(self, told: Tells, *, shown: bool, file: TextIO | None = None) -> None:
        self._told, self._shown, self._file = told, shown, file or sys.stdout
        self._line_s = 0.0
        self._bar: Progress | None = None

    def __enter__(self) -> Self:
        console = Console(file=self._file)
        if self._shown and console.is_terminal:
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
            self._bar = Progress(*columns, console=console)
            self._task = self._bar.add_task("", total=None)
            self._bar.start()
        return self

    def show(self, *, now: bool = False) -> None:
        """Redraws; as a line only every LINE_EVERY_S, or `now`."""
        if self._bar is not None:
            made, total, _ = self._told.steps
            self._bar.update(self._task, completed=made, total=total or None, description=str(self._told))
        elif self._shown and (now or time.monotonic() - self._line_s > LINE_EVERY_S):
            self._line_s = time.monotonic()
            print(f"{self._told.title}: {self._told}", file=self._file, flush=True)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.show(now=True)
        if self._bar is not None:
            self._bar.stop()
