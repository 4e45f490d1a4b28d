"""What is known of a run that embeds tasks, and how a person is shown it: bars on a terminal, plain lines elsewhere."""

import sys
import time
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from metasepia.blackbox.meter import Meter

LINE_EVERY_S = 10.0


class Told:
    """Counts of one run. Texts are questions to a black box: a prompt on 512 probe texts has 512."""

    def __init__(self, tasks: int, texts: int, embeddings: int, meter: Meter) -> None:
        """`texts`: to be asked in this run. `meter`: what endpoints take."""
        self.tasks, self.texts, self.embeddings, self.meter = tasks, texts, embeddings, meter
        self.answered = 0
        """Tasks whose answers are there, those of earlier runs among them."""
        self.kept = 0
        """Of these, those of earlier runs."""
        self.texts_done = 0
        """Of the units that are finished."""
        self.local_tokens = 0
        self.live: dict[str, tuple[int, int]] = {}
        """Texts and tokens so far of the units at work."""
        self.embedded = 0
        self.failed = 0
        self.estimate: float | None = None
        """Most that endpoints take in this run; None: nothing is known of prices."""
        self.waiting: dict[str, str] = {}
        """What endpoints wait for."""
        self._began_s = self._last_s = time.monotonic()

    def finish(self, name: str, texts: int, tokens: int) -> None:
        """A unit of so many texts is answered, or will not be; `tokens` are those that no meter counts."""
        self.live.pop(name, None)
        self.texts_done += texts
        self._last_s = time.monotonic()
        self.local_tokens += tokens
        self.waiting.pop(name, None)

    @property
    def texts_now(self) -> int:
        return self.texts_done + sum(texts for texts, _ in self.live.values())

    @property
    def tokens(self) -> int:
        """Read and written, here and at endpoints, in this run."""
        return self.local_tokens + sum(tokens for _, tokens in self.live.values()) + self.meter.tokens

    @property
    def texts_per_s(self) -> float:
        """Until the last answer: embedding them takes its own time."""
        until_s = self._last_s if self.texts_done >= self.texts else time.monotonic()
        return self.texts_now / max(1e-9, until_s - self._began_s)

    def __str__(self) -> str:
        """As `answers 3/12 tasks, 1,200/6,144 texts, 85.0 a second, 61,000 tokens, cost 0.02 of at most 0.31, ...`."""
        parts = [f"answers {self.answered}/{self.tasks} tasks"]
        if self.texts:
            parts.append(f"{self.texts_now:,}/{self.texts:,} texts")
            if self.texts_now:
                left_s = (self.texts - self.texts_now) / self.texts_per_s
                parts += [f"{self.texts_per_s:.1f} a second", f"{self.tokens:,} tokens"]
                parts += [f"{left_s / 60:.1f} min left"] if left_s > 1 else []
        if self.estimate is not None:
            parts.append(f"cost {self.meter.cost:.4f} of at most {self.estimate:.4f}")
        parts.append(f"embeddings {self.embedded}/{self.embeddings}")
        parts += [f"{self.failed} failed"] if self.failed else []
        parts += [f"waiting: {next(iter(self.waiting.values()))}"] if self.waiting else []
        return ", ".join(parts)


class Bar:
    """Shows Told while a `with` lasts; silent where not `shown`."""

    def __init__(self, told: Told, *, shown: bool, file: TextIO | None = None) -> None:
        self._told, self._shown, self._file = told, shown, file or sys.stdout
        self._line_s = time.monotonic()
        self._bar: Progress | None = None

    def __enter__(self) -> Self:
        console = Console(file=self._file)
        if self._shown and console.is_terminal:
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
            self._bar = Progress(*columns, console=console)
            self._answers = self._bar.add_task("answers", total=self._told.texts or None)
            self._embeddings = self._bar.add_task("embeddings", total=self._told.embeddings)
            self._bar.start()
        return self

    def show(self, *, now: bool = False) -> None:
        """Redraws; as a line only every LINE_EVERY_S, or `now`."""
        told = self._told
        if self._bar is not None:
            words = str(told).partition(", embeddings ")
            self._bar.update(self._answers, completed=told.texts_now, description=words[0])
            self._bar.update(self._embeddings, completed=told.embedded, description=f"embeddings {words[2]}")
        elif self._shown and (now or time.monotonic() - self._line_s > LINE_EVERY_S):
            self._line_s = time.monotonic()
            print(told, file=self._file, flush=True)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.show(now=True)
        if self._bar is not None:
            self._bar.stop()
