"""What a task is to training, transfer and evaluation: questions to the backbone, and a verifier of its answers.

`Task` is the protocol; `README.md` beside this file shows how to add one. Two forms are here for tasks to build on:
`ListedTask`, whose examples are listed by split, and `LabelTask`, which makes sentences from stems and nouns.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from metasepia.errors import InvalidSettings

TrainingSplit = Literal["train", "valid"]
Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = ("train", "valid", "test")


@dataclass(frozen=True)
class Example:
    """One question to the backbone and the whole answer wanted."""

    prompt: str
    """The user's message of a chat."""
    answer: str
    """The reference answer: what next-token training aims at, and what `verify` accepts."""
    group: str
    """Examples of one group rise and fall together, so intervals resample groups; the question itself if it stands
    alone."""
    text: str = ""
    """What the prompt is about, without its wrapping."""
    template: str = ""
    """The wrapping; empty where there is but one."""
    reference: Any = field(default=None, hash=False)
    """What the verifier needs beside `answer`: tests of a program, a procedural task's own entry."""


class Task(Protocol):
    """Data, prompt and verifier. Everything drawn is a pure function of the arguments."""

    @property
    def name(self) -> str:
        """A name that a registry takes: lower case, digits, dot, underscore, hyphen."""
        ...

    @property
    def about(self) -> str:
        """What an expert of this task does, for its card: one sentence."""
        ...

    @property
    def labels(self) -> tuple[str, ...]:
        """The answers to choose from, where every answer is one of a few words; else empty."""
        ...

    @property
    def max_tokens(self) -> int:
        """The longest answer that is generated."""
        ...

    def batch(self, split: TrainingSplit, count: int, seed: int, step: int) -> list[Example]:
        """The examples of one step. `train` and `valid` share no question, and neither is held out."""
        ...

    def held_out(self, count: int, seed: int) -> list[Example]:
        """`count` different test questions. Raises InvalidSettings when there are fewer."""
        ...

    def verify(self, answer: str, example: Example) -> bool:
        """Whether a generated answer is right."""
        ...

    def reward(self, answer: str, example: Example) -> float:
        """In [-1, 1]; 1 exactly for an answer that `verify` takes."""
        ...


class Verified:
    """The reward of a task whose answers are right or wrong: 1 or -1."""

    def verify(self, answer: str, example: Example) -> bool:
        """Whether the answer is the reference answer and nothing else; case, spaces and a full stop do not count."""
        return _plain(answer) == _plain(example.answer)

    def reward(self, answer: str, example: Example) -> float:
        return 1.0 if self.verify(answer, example) else -1.0


@dataclass(frozen=True, kw_only=True)
class ListedTask(Verified):
    """A task whose examples are known. Subclasses say how they are read, and `verify` where equal words are not it."""

    name: str
    about: str
    examples: Mapping[Split, Sequence[Example]] = field(repr=False)
    labels: tuple[str, ...] = ()
    max_tokens: int = 16

    def __post_init__(self) -> None:
        for split in SPLITS:
            if not self.examples.get(split):
                raise InvalidSettings("data", self.name, f"a source with examples of the {split} split")
        prompts = {split: {one.prompt for one in self.examples[split]} for split in SPLITS}
        for one, other in itertools.combinations(SPLITS, 2):
            if shared := prompts[one] & prompts[other]:
                raise InvalidSettings(
                    "data", self.name, f"a source whose splits are disjoint; {one} and {other} share {min(shared)!r}"
                )

    def batch(self, split: TrainingSplit, count: int, seed: int, step: int) -> list[Example]:
        """Passes over the split in an order that changes each time; no example comes twice in one pass."""
        listed = self.examples[split]
        orders: dict[int, np.ndarray] = {}
        chosen = []
        for position in range(step * count, (step + 1) * count):
            turn, place = divmod(position, len(listed))
            if turn not in orders:
                orders[turn] = np.random.default_rng([seed, turn, SPLITS.index(split)]).permutation(len(listed))
            chosen.append(listed[int(orders[turn][place])])
        return chosen

    def held_out(self, count: int, seed: int) -> list[Example]:
        listed = self.examples["test"]
        if count > len(listed):
            raise InvalidSettings("held_out", count, f"at most {len(listed)}, the test questions of task {self.name}")
        order = np.random.default_rng([seed, 1 << 20]).permutation(len(listed))
        return [listed[int(i)] for i in order[:count]]


@dataclass(frozen=True, kw_only=True)
class LabelTask(Verified):
    """Sentences from stems and nouns, wrapped in prompt templates, answered with one label word.

    The splits share nothing but the labels: their stems, nouns and prompt templates are disjoint. Each stem holds `{}`
    where a noun goes; each template holds `{text}`.
    """

    name: str
    about: str
    stems: Mapping[Split, Mapping[str, Sequence[str]]]
    """By split and label."""
    nouns: Mapping[Split, Sequence[str]]
    templates: Mapping[Split, Sequence[str]]
    max_tokens: int = 8

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(self.stems["train"])

    def sentences(self, split: Split, label: str) -> list[tuple[str, str]]:
        """Every (stem, noun) of a label, in a fixed order."""
        return list(itertools.product(self.stems[split][label], self.nouns[split]))

    def batch(self, split: TrainingSplit, count: int, seed: int, step: int) -> list[Example]:
        """`count` examples, labels in turn."""
        rng = np.random.default_rng([seed, step])
        order = [self.labels[i] for i in rng.permutation(len(self.labels))]
        chosen = []
        for label in itertools.islice(itertools.cycle(order), count):
            sentences = self.sentences(split, label)
            chosen.append(self._example(split, sentences[int(rng.integers(len(sentences)))], label, rng))
        return chosen

    def held_out(self, count: int, seed: int) -> list[Example]:
        """`count` different test texts, labels in turn, each in one of the test templates."""
        rng = np.random.default_rng([seed, 1 << 20])
        shuffled = {}
        for label in self.labels:
            sentences = self.sentences("test", label)
            shuffled[label] = [sentences[i] for i in rng.permutation(len(sentences))]
        most = len(self.labels) * min(map(len, shuffled.values()))
        if count > most:
            raise InvalidSettings("held_out", count, f"at most {most}, the held-out texts of task {self.name}")
        turns = [(label, i) for i in range(-(-count // len(self.labels))) for label in self.labels][:count]
        return [self._example("test", shuffled[label][i], label, rng) for label, i in turns]

    def _example(self, split: Split, sentence: tuple[str, str], label: str, rng: np.random.Generator) -> Example:
        stem, noun = sentence
        template = self.templates[split][int(rng.integers(len(self.templates[split])))]
        text = stem.format(noun)
        return Example(prompt=template.format(text=text), answer=label, group=stem, text=text, template=template)


def _plain(answer: str) -> str:
    return re.sub(r"[\s.]+$", "", answer.strip()).lower()
