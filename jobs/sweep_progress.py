"""What is known of a running sweep."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from metasepia.digests import short
from metasepia.sweeps.plan import SweepPlan


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

    @property
    def title(self) -> str:
        return f"sweep {short(self.plan.digest)}"

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
