"""What is known of a running sweep, and how a person is shown it: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from metasepia.digests import short
from metasepia.sweeps.plan import SweepPlan

LINE_EVERY_S = 10.0


class Told:
    """What the trials have told so far, by pack. Steps are those of packs: a pack of 16 models makes one at a time."""

    def __init__(self, plan: SweepPlan, todo: Sequence[int]) -> None:
        self.plan, self.todo = plan, tuple(todo)
        self.step: dict[int, int] = {}
        self.last: dict[int, int] = {}
        """The step at which a pack will be done."""
        self.running: set[int] = set()
        self.done: set[int] = set(range(len(plan.packs))) - set(todo)
        self.stopped: set[int] = set()
        """By a scheduler."""
        self.problems: dict[int, str] = {}
        self.stored: dict[int, int] = {}
        """The last stop that a pack has reached, where its rows and state are kept."""
        self.deaths: dict[int, int] = {}
        """In a row: a pack that reaches another stop begins at none. Steps beyond the last stop die with a process."""
        self.num_deaths = 0
        self.fatal: tuple[str, str] | None = None
        """Path and problem of what could not be stored."""
        self.pack_s: dict[int, float] = {}
        """Seconds inside the trial, without waiting for the scheduler."""
        self._began_s = time.monotonic()
        self._made = 0

    def take(self, told: Mapping[str, Any]) -> None:
        """One report of a trial."""
        pack, step = int(told["pack"]), int(told["step"])
        self.pack_s[pack] = self.pack_s.get(pack, 0.0) + told["seconds"]
        if told["problem"]:
            self.problems[pack] = told["problem"]
            self.fatal = self.fatal or (tuple(told["fatal"]) if told["fatal"] else None)
        if step < 0:  # it has only begun
            return
        self.last[pack] = int(told["last"])
        if told["at_work"]:
            self._made += max(0, step - self.step.get(pack, step))
            if told["stored"] > self.stored.get(pack, -1) or told["finished"]:
                self.deaths.pop(pack, None)
                self.problems.pop(pack, None)
            self.stored[pack] = max(told["stored"], self.stored.get(pack, -1))
        self.step[pack] = step
        if told["finished"]:
            self.done.add(pack)

    def died(self, pack: int) -> int:
        """How often in a row now."""
        self.num_deaths += 1
        self.deaths[pack] = self.deaths.get(pack, 0) + 1
        self.running.discard(pack)
        return self.deaths[pack]

    def __str__(self) -> str:
        """As `packs 3/12, 2 running, steps 2400/9600, 41.0 a second, 2.9 min left`."""
        parts = [f"packs {len(self.done)}/{len(self.plan.packs)}", f"{len(self.running)} running"]
        made, total, rate = self.steps
        if total:
            parts.append(f"steps {made}/{total}")
        if rate > 0:
            parts += [f"{rate:.1f} a second", f"{(total - made) / rate / 60:.1f} min left"]
        for number, what in ((len(self.problems), "failed"), (len(self.stopped), "stopped"), (self.num_deaths, "died")):
            parts += [f"{number} {what}"] if number else []
        return ", ".join(parts)

    @property
    def steps(self) -> tuple[int, int, float]:
        """Made, in all, and a second since it began, of the packs of this call; one not begun counts as their mean."""
        if not self.last:
            return 0, 0, 0.0
        mean = sum(self.last.values()) / len(self.last)
        total = sum(self.last.get(pack, mean) for pack in self.todo)
        rate = self._made / max(1e-9, time.monotonic() - self._began_s)
        return sum(self.step.get(pack, 0) for pack in self.todo), round(total), rate


class Bar:
    """Shows Told while a `with` lasts; silent where not `shown`."""

    def __init__(self, told: Told, *, shown: bool, file: TextIO | None = None) -> None:
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
            print(f"sweep {short(self._told.plan.digest)}: {self._told}", file=self._file, flush=True)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.show(now=True)
        if self._bar is not None:
            self._bar.stop()
