"""Any Python function as a black box: texts in; probabilities, labels or replies out."""

import asyncio
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from metasepia.blackbox import boxes
from metasepia.blackbox.boxes import Progress, Told
from metasepia.digests import digest_of
from metasepia.embedding.answers import Answers
from metasepia.errors import InvalidRequest, InvalidSettings

Predict = Callable[[Sequence[str]], Any]


class FromCallable:
    """`predict(texts)` gives, a text: a row of probabilities in the order of `labels`; or one of the labels; or, where
    there are no labels, a reply. It may be a coroutine function; a plain one runs in a thread.
    """

    def __init__(
        self,
        predict: Predict,
        labels: Sequence[str] | None = None,
        *,
        name: str = "",
        version: str = "",
        batch_size: int = 256,
    ) -> None:
        """`name` and `version` stand for the function in the digest, since code has none that could be relied upon:
        change the version with the function. Raises InvalidSettings.
        """
        if not callable(predict):
            raise InvalidSettings("predict", predict, "a function of a list of texts")
        if isinstance(labels, str) or (labels is not None and (len(labels) < 2 or len(set(labels)) < len(labels))):
            raise InvalidSettings("labels", labels, "two labels or more, each once, or None for replies")
        if not batch_size >= 1:
            raise InvalidSettings("batch_size", batch_size, "at least 1")
        self._predict, self._batch_size = predict, batch_size
        self.labels = None if labels is None else tuple(labels)
        self._name = name or getattr(predict, "__qualname__", type(predict).__name__)
        self._version = version

    def __repr__(self) -> str:
        return f"FromCallable({self.name!r})"

    @property
    def name(self) -> str:
        return self._name

    @property
    def digest(self) -> str:
        labels = None if self.labels is None else list(self.labels)
        return digest_of({"kind": "callable", "name": self._name, "version": self._version, "labels": labels})

    def source(self) -> dict[str, Any]:
        return {"kind": "callable", "name": self._name, "version": self._version, "black_box": self.digest}

    async def answer(self, texts: Sequence[str], *, told: Told | None = None) -> Answers:
        """What the function says. Raises InvalidRequest for answers that break the contract, naming the text, and
        whatever the function raises, with a note saying of which texts.
        """
        boxes.check_texts(texts)
        unique = list(dict.fromkeys(texts))
        found: dict[str, Any] = {}
        for begin in range(0, len(unique), self._batch_size):
            some = unique[begin : begin + self._batch_size]
            found |= zip(some, self._checked(await self._call(some), some), strict=True)
            if told is not None:
                batches = begin // self._batch_size + 1
                told(Progress(name=self.name, done=len(found), total=len(unique), way="function", requests=batches))
        if self.labels is None:
            return Answers.of_replies(texts, [found[text] for text in texts])
        return Answers.of_probabilities(texts, self.labels, np.stack([found[text] for text in texts]))

    async def _call(self, texts: list[str]) -> Any:
        try:
            if inspect.iscoroutinefunction(self._predict):
                return await self._predict(texts)
            return await asyncio.to_thread(self._predict, texts)
        except Exception as error:
            error.add_note(f"raised by the black box {self.name!r} for {len(texts)} texts from {texts[0][:60]!r} on")
            raise

    def _checked(self, answered: Any, texts: Sequence[str]) -> list[Any]:
        """One answer a text: a row of probabilities, or a reply."""
        if isinstance(answered, str | bytes) or not hasattr(answered, "__len__"):
            raise self._broken(f"must give a list or an array, got {type(answered).__name__}")
        if len(answered) != len(texts):
            raise self._broken(f"gave {len(answered)} answers to {len(texts)} texts")
        first = answered[0]
        if isinstance(first, str):
            return self._named(list(answered), texts)
        if self.labels is None:
            raise self._broken(f"has no labels, so each answer must be a text; got {type(first).__name__}")
        try:
            rows = np.asarray(answered, np.float64)
        except (TypeError, ValueError) as error:
            raise self._broken(f"gave answers that are no array of numbers ({error})") from None
        if rows.shape != (len(texts), len(self.labels)):
            wanted = [len(texts), len(self.labels)]
            raise self._broken(f"gave an array of shape {list(rows.shape)}; one probability a label is {wanted}")
        for text, row in zip(texts, rows, strict=True):
            if not np.isfinite(row).all() or (row < 0).any() or abs(row.sum() - 1) > 1e-3:
                shown = np.array2string(row[:6], precision=4)
                raise self._broken(
                    f"gave {shown} for {text[:60]!r}; probabilities are finite, not negative and sum to 1"
                )
        return list(rows)

    def _named(self, replies: list[Any], texts: Sequence[str]) -> list[Any]:
        for text, reply in zip(texts, replies, strict=True):
            if not isinstance(reply, str):
                raise self._broken(f"gave {type(reply).__name__} for {text[:60]!r} among texts")
            if self.labels is not None and reply not in self.labels:
                raise self._broken(
                    f"gave {reply[:80]!r} for {text[:60]!r}, which is none of its labels {list(self.labels)[:20]}"
                )
        if self.labels is None:
            return replies
        places = {label: place for place, label in enumerate(self.labels)}
        return list(np.eye(len(self.labels))[[places[reply] for reply in replies]])

    def _broken(self, words: str) -> InvalidRequest:
        return InvalidRequest("predict", f"the black box {self.name!r} {words}")
