"""Which shipped expert a message is for, or none of them: what a dispatch expert learns (Transformer-squared, B).

The messages are the shipped tasks' own prompts and general ones (`general.py`), split as those are: unlike the paper's
dispatch set, no question of a held-out split is trained on.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from jobs.tasks import general
from jobs.tasks.base import Example, LabelTask, Split, TrainingSplit, Verified
from jobs.tasks.desk import DESK
from jobs.tasks.sentiment import SENTIMENT
from jobs.tasks.support import SUPPORT
from metasepia.errors import InvalidSettings

OTHER = "other"


@dataclass(frozen=True, kw_only=True)
class DispatchTask(Verified):
    """Half of the messages are of the tasks, in turn, and half of none."""

    name: str = "dispatch"
    tasks: Mapping[str, LabelTask] = field(default_factory=lambda: {t.name: t for t in (SUPPORT, SENTIMENT, DESK)})
    """By the label that stands for them."""
    others: Mapping[Split, Sequence[str]] = field(
        default_factory=lambda: {
            "train": (*general.CALIBRATION, *general.DISPATCH_TRAIN),
            "valid": general.DISPATCH_VALID,
            "test": (*general.HELD_OUT, *general.DISPATCH_HELD_OUT),
        }
    )
    max_tokens: int = 8

    @property
    def labels(self) -> tuple[str, ...]:
        return (*self.tasks, OTHER)

    @property
    def about(self) -> str:
        return f"Tells which expert a message is for: {', '.join(self.tasks)}, or {OTHER} for none."

    @property
    def prompt(self) -> str:
        """Holds `{text}` where the message goes; the choice comes last, nearest to the answer."""
        choices = ", ".join(self.tasks)
        return f"Message:\n{{text}}\n\nWho should answer this message: {choices} or {OTHER}?"

    @property
    def dispatcher(self) -> dict[str, object]:
        """What the card of its expert says under `dispatcher`."""
        names: dict[str, str | None] = {label: task.name for label, task in self.tasks.items()}
        return {"prompt": self.prompt, "labels": {**names, OTHER: None}}

    def batch(self, split: TrainingSplit, count: int, seed: int, step: int) -> list[Example]:
        rng = np.random.default_rng([seed, step])
        each = -(-count // (2 * len(self.tasks)))
        own = {label: task.batch(split, each, seed, step) for label, task in self.tasks.items()}
        order = [list(self.tasks)[i] for i in rng.permutation(len(self.tasks))]
        others = [self.others[split][int(i)] for i in rng.permutation(len(self.others[split]))]
        return self._interleaved({label: own[label] for label in order}, others, count)

    def held_out(self, count: int, seed: int) -> list[Example]:
        others = [
            self.others["test"][int(i)] for i in np.random.default_rng([seed, 1 << 20]).permutation(self.most // 2)
        ]
        if count > self.most:
            raise InvalidSettings(
                "held_out", count, f"at most {self.most}, twice the general prompts that are held out"
            )
        each = -(-count // (2 * len(self.tasks)))
        own = {
            label: task.held_out(-(-each // len(task.labels)) * len(task.labels), seed)
            for label, task in self.tasks.items()
        }
        return self._interleaved(own, others, count)

    @property
    def most(self) -> int:
        """Of held-out messages."""
        return 2 * len(self.others["test"])

    def _interleaved(self, own: Mapping[str, Sequence[Example]], others: Sequence[str], count: int) -> list[Example]:
        turns = itertools.cycle(own)
        chosen = []
        for i in range(count):
            if i % 2:
                text = others[(i // 2) % len(others)]
                chosen.append(self._example(text, OTHER, text))
            else:
                label = next(turns)
                message = own[label][i // (2 * len(own))]
                chosen.append(self._example(message.prompt, label, f"{label}: {message.group}"))
        return chosen

    def _example(self, text: str, label: str, group: str) -> Example:
        return Example(prompt=self.prompt.format(text=text), answer=label, group=group, text=text)


DISPATCH = DispatchTask()
