"""A task embedding as something asked for: what it is of, and how far its black box has answered. Torch-free.

Everything is canonical JSON: the same request has the same digest, and one that was killed and went on has the same
embedding as one that ran through. No clock is in it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from metasepia.digests import canonical_json, digest_of
from metasepia.embedding.answers import Answers
from metasepia.embedding.space import METHODS, MethodName, TaskKind
from metasepia.errors import CorruptArtefact, InvalidRequest

ID = "task-"


@dataclass(frozen=True, kw_only=True, eq=False)
class TaskJob:
    """One embedding asked for: everything that its vector depends on."""

    kind: TaskKind
    method: MethodName
    space: str
    """Digest."""
    seed: int = 0
    answers: Answers | None = None
    """In hand; None where `box` is to be asked."""
    box: Mapping[str, Any] = field(default_factory=dict)
    """What is to be asked for the probe texts, in values that JSON has."""

    def __post_init__(self) -> None:
        assert (self.answers is None) == bool(self.box), "answers in hand, or a black box to ask for them"

    @property
    def digest(self) -> str:
        about = {"answers": self.answers.digest} if self.answers is not None else {"box": dict(self.box)}
        return digest_of({"kind": "task", "of": self.kind, "space": self.space, "seed": self.seed, **about})

    @property
    def id(self) -> str:
        """The same request is the same task."""
        return ID + self.digest[:24]


@dataclass(frozen=True, kw_only=True, eq=False)
class TaskProgress:
    """A job and the answers that it has so far, to the first of the probe texts."""

    job: TaskJob
    answered: Answers | None = None
    executed: Mapping[str, Any] | None = None
    """What a shard really ran for the last of these answers."""
    source: Mapping[str, Any] = field(default_factory=dict)
    """What the black box says of itself."""

    @property
    def num_answered(self) -> int:
        return 0 if self.answered is None else self.answered.num_texts

    def more(self, answers: Answers, executed: Mapping[str, Any] | None, source: Mapping[str, Any]) -> "TaskProgress":
        """Raises CorruptArtefact for answers with other labels than those before."""
        both = answers if self.answered is None else joined(self.answered, answers)
        return replace(self, answered=both, executed=executed or self.executed, source=dict(source))

    def to_bytes(self) -> bytes:
        job = self.job
        return canonical_json(
            {
                "kind": "task job",
                "of": job.kind,
                "method": job.method,
                "space": job.space,
                "seed": job.seed,
                "answers": None if job.answers is None else _answers_json(job.answers),
                "box": dict(job.box),
                "answered": None if self.answered is None else _answers_json(self.answered),
                "executed": None if self.executed is None else dict(self.executed),
                "source": dict(self.source),
            }
        )

    @classmethod
    def from_bytes(cls, blob: bytes) -> "TaskProgress":
        """Raises CorruptArtefact."""
        try:
            tree: dict[str, Any] = json.loads(blob)
            if tree["kind"] != "task job" or tree["method"] not in METHODS:
                raise ValueError("it is of another kind")
            job = TaskJob(
                kind=tree["of"],
                method=tree["method"],
                space=tree["space"],
                seed=tree["seed"],
                answers=None if tree["answers"] is None else _answers(tree["answers"]),
                box=tree["box"],
            )
            answered = None if tree["answered"] is None else _answers(tree["answered"])
            return cls(job=job, answered=answered, executed=tree["executed"], source=tree["source"])
        except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
            raise CorruptArtefact("the task's request", f"it cannot be read ({error})") from error


def joined(first: Answers, then: Answers) -> Answers:
    """The answers to two lists of texts as those to one. Raises CorruptArtefact where their labels differ."""
    if first.labels != then.labels or (first.standard_error is None) != (then.standard_error is None):
        raise CorruptArtefact("a black box's answers", "they have other labels than those before them")
    errors = [one.standard_error for one in (first, then) if one.standard_error is not None]
    return Answers(
        texts=first.texts + then.texts,
        labels=first.labels,
        probabilities=np.concatenate([first.probabilities, then.probabilities]),
        standard_error=np.concatenate(errors) if errors else None,
        replies=first.replies + then.replies,
        notes=tuple(dict.fromkeys(first.notes + then.notes)),
    )


def parts_of(num_texts: int, begin: int, size: int) -> list[range]:
    """The texts from `begin` on in parts of `size`; the last is never of a single text, which no Answers are of."""
    parts = [range(i, min(i + size, num_texts)) for i in range(begin, num_texts, size)]
    if len(parts) > 1 and len(parts[-1]) == 1:
        parts[-2:] = [range(parts[-2].start, num_texts)]
    return parts


def _answers_json(answers: Answers) -> dict[str, Any]:
    return {
        "texts": list(answers.texts),
        "labels": list(answers.labels),
        "probabilities": answers.probabilities.astype(float).tolist(),
        "standard_error": None if answers.standard_error is None else answers.standard_error.astype(float).tolist(),
        "replies": list(answers.replies),
        "notes": list(answers.notes),
    }


def _answers(tree: Mapping[str, Any]) -> Answers:
    """float32 in JSON comes back to the last bit: a double holds it, and its shortest spelling is read as the same."""
    shape = len(tree["texts"]), len(tree["labels"])
    error = tree["standard_error"]
    try:
        return Answers(
            texts=tuple(tree["texts"]),
            labels=tuple(tree["labels"]),
            probabilities=_table(tree["probabilities"], shape),
            standard_error=None if error is None else _table(error, shape),
            replies=tuple(tree["replies"]),
            notes=tuple(tree["notes"]),
        )
    except InvalidRequest as wrong:
        raise ValueError(str(wrong)) from wrong


def _table(rows: Sequence[Sequence[float]], shape: tuple[int, int]) -> np.ndarray:
    return np.array(rows, np.float32).reshape(shape)
