"""Procedural tasks of the package reasoning-gym (arXiv:2505.24760): `gym:<dataset>` or `gym:<dataset>,field=value,...`.

The fields are those of the dataset's configuration: `gym:chain_sum,max_terms=2,max_digits=1`. Each question comes from
a seed of its own. The splits draw seeds from ranges that do not meet, and a question belongs to the split that its hash
says, so that the same question drawn twice cannot stand in two splits.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jobs.tasks.base import SPLITS, Example, Split, TrainingSplit
from metasepia.errors import InvalidSettings, NotSupported, UnknownName

PREFIX = "gym:"
SEEDS_OF_A_SPLIT = 1 << 29
MAX_DRAWS = 200
"""Seeds tried for one question before the dataset is said to have too few."""


class GymTask:
    """One dataset of reasoning-gym. The reward is its score from 0 to 1, stretched to [-1, 1]."""

    labels: tuple[str, ...] = ()

    def __init__(self, dataset: str, fields: Mapping[str, Any], max_tokens: int) -> None:
        self._fields = dict(fields)
        self._create, known = _gym()
        if dataset not in known:
            raise UnknownName("reasoning-gym dataset", dataset, known)
        self._dataset, self.max_tokens = dataset, max_tokens
        self.name = f"gym-{dataset}"
        self.about = f"Answers questions of reasoning-gym's {dataset.replace('_', ' ')}."
        try:
            self._scorer = self._create(dataset, seed=0, size=1, **self._fields)
            sample = self._scorer[0]
        except (TypeError, ValueError, AssertionError) as error:
            raise InvalidSettings("task", f"{PREFIX}{dataset}", f"given fields that it takes ({error})") from error
        if sample["answer"] is None:
            raise NotSupported(f"{PREFIX}{dataset}, whose questions come without an answer,", "choose another dataset")

    def batch(self, split: TrainingSplit, count: int, seed: int, step: int) -> list[Example]:
        return self._draw(split, count, np.random.default_rng([seed, step]), distinct=False)

    def held_out(self, count: int, seed: int) -> list[Example]:
        return self._draw("test", count, np.random.default_rng([seed, 1 << 20]), distinct=True)

    def verify(self, answer: str, example: Example) -> bool:
        return self._score(answer, example) >= 1

    def reward(self, answer: str, example: Example) -> float:
        return 2 * min(1.0, max(0.0, self._score(answer, example))) - 1

    def _score(self, answer: str, example: Example) -> float:
        try:
            return float(self._scorer.score_answer(answer.strip(), entry=example.reference))
        except Exception:  # some of its parsers fail on what a model may write; such an answer is not right
            return 0.0

    def _draw(self, split: Split, count: int, rng: np.random.Generator, *, distinct: bool) -> list[Example]:
        chosen: dict[str, Example] = {}
        listed: list[Example] = []
        for _ in range(MAX_DRAWS * count):
            if len(listed) == count:
                return listed
            example = self._question(SPLITS.index(split) * SEEDS_OF_A_SPLIT + int(rng.integers(SEEDS_OF_A_SPLIT)))
            if _split_of(example.prompt) != split or (distinct and example.prompt in chosen):
                continue
            chosen[example.prompt] = example
            listed.append(example)
        if len(listed) == count:
            return listed
        raise InvalidSettings("count", count, f"at most about {len(listed)}, the {split} questions of {self.name}")

    def _question(self, seed: int) -> Example:
        entry = self._create(self._dataset, seed=seed, size=1, **self._fields)[0]
        question = entry["question"].strip()
        return Example(
            prompt=question, answer=str(entry["answer"]), group=question, text=question, reference=entry
        )  # fmt: skip


def make(name: str) -> GymTask:
    """The task of `gym:<dataset>[,field=value...]`; values are JSON, or else words. `max_tokens` is the task's own."""
    dataset, *given = name.removeprefix(PREFIX).split(",")
    fields: dict[str, Any] = {}
    for pair in given:
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            raise InvalidSettings("task", name, f"{PREFIX}<dataset>,field=value,...; {pair!r} is not of this form")
        fields[key.strip()] = _value(value)
    for reserved in ("seed", "size"):
        if reserved in fields:
            raise InvalidSettings("task", name, f"without {reserved}, which the splits choose")
    return GymTask(dataset.strip(), fields, fields.pop("max_tokens", 64))


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _split_of(question: str) -> Split:
    """Three fifths train, one fifth each valid and test."""
    part = int.from_bytes(hashlib.sha256(question.encode()).digest()[:4], "big") % 5
    return "train" if part < 3 else "valid" if part == 3 else "test"


@functools.cache
def _gym() -> tuple[Callable[..., Any], tuple[str, ...]]:
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise NotSupported("a task of reasoning-gym", "install it: pip install 'metasepia[train]'") from error
    return reasoning_gym.create_dataset, tuple(sorted(DATASETS))
