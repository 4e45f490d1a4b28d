"""What a labelling task is: sentences from stems and nouns, wrapped in prompt templates, answered with one label word.

Train and test share nothing but the labels: their stems, their nouns and their prompt templates are disjoint.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from metasepia.errors import InvalidSettings

Split = Literal["train", "test"]


@dataclass(frozen=True)
class Example:
    """One question to the backbone: the user's message, and the whole answer wanted."""

    prompt: str
    answer: str
    text: str
    stem: str
    """The text without its noun: texts of one stem rise and fall together, so intervals resample stems."""
    template: str


@dataclass(frozen=True, kw_only=True)
class LabelTask:
    """Each stem holds `{}` where a noun goes; each template holds `{text}`."""

    name: str
    about: str
    """What the expert does, for its card: one sentence."""
    stems: Mapping[Split, Mapping[str, Sequence[str]]]
    """By split and label."""
    nouns: Mapping[Split, Sequence[str]]
    templates: Mapping[Split, Sequence[str]]

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(self.stems["train"])

    def sentences(self, split: Split, label: str) -> list[tuple[str, str]]:
        """Every (stem, noun) of a label, in a fixed order."""
        return list(itertools.product(self.stems[split][label], self.nouns[split]))

    def batch(self, split: Split, count: int, data_seed: int, step: int) -> list[Example]:
        """`count` examples, labels in turn: a pure function of its arguments."""
        rng = np.random.default_rng([data_seed, step])
        order = [self.labels[i] for i in rng.permutation(len(self.labels))]
        chosen = []
        for label in itertools.islice(itertools.cycle(order), count):
            sentences = self.sentences(split, label)
            chosen.append(self._example(split, sentences[int(rng.integers(len(sentences)))], label, rng))
        return chosen

    def held_out(self, count: int, data_seed: int) -> list[Example]:
        """`count` different test texts, labels in turn, each in one of the test templates."""
        rng = np.random.default_rng([data_seed, 1 << 20])
        shuffled = {}
        for label in self.labels:
            sentences = self.sentences("test", label)
            shuffled[label] = [sentences[i] for i in rng.permutation(len(sentences))]
        most = len(self.labels) * min(map(len, shuffled.values()))
        if count > most:
            raise InvalidSettings("held_out", count, f"at most {most}, the held-out texts of task {self.name}")
        turns = [(label, i) for i in range(-(-count // len(self.labels))) for label in self.labels][:count]
        return [self._example("test", shuffled[label][i], label, rng) for label, i in turns]

    def verify(self, answer: str, example: Example) -> bool:
        """Whether a generated answer is the label word and nothing else; case, spaces and a full stop do not count."""
        return re.sub(r"[\s.]+$", "", answer.strip()).lower() == example.answer.lower()

    def _example(self, split: Split, sentence: tuple[str, str], label: str, rng: np.random.Generator) -> Example:
        stem, noun = sentence
        template = self.templates[split][int(rng.integers(len(self.templates[split])))]
        text = stem.format(noun)
        return Example(prompt=template.format(text=text), answer=label, text=text, stem=stem, template=template)
