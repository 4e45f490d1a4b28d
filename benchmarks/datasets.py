"""Labelled sets from a directory of Parquet files, and draws from them.

A file of texts has columns `text` and `label_name` (or `label`), and may have `split`: a set without a train split, or
with nothing beside it, is halved by a fixed seed. Everything a benchmark learns from comes out of `train`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

Example = tuple[str, str]
"""A text and its label."""


@dataclass(frozen=True)
class TextSet:
    """A labelled text set with examples to learn from and others to be judged on."""

    name: str
    labels: tuple[str, ...]
    train: tuple[Example, ...]
    test: tuple[Example, ...]

    def draw(self, k: int, seed: int) -> list[Example]:
        """k training examples, classes balanced and interleaved; a smaller k draws the start of a larger one.

        A class that runs out leaves its turns to the others.
        """
        return [self.train[i] for i in balanced_order([y for _, y in self.train], seed)[:k]]

    def draw_each(self, num_each: int, seed: int) -> list[Example]:
        """`num_each` training examples of every class, or as many as there are."""
        return [self.train[i] for i in balanced_draw([y for _, y in self.train], num_each, seed)]

    def draw_unlabelled(self, count: int, seed: int, beside: Iterable[Example]) -> list[str]:
        """At most `count` other texts of the train split, as they come: not balanced, for nobody knows their labels."""
        taken = {text for text, _ in beside}
        others = [text for text, _ in self.train if text not in taken]
        return [others[i] for i in np.random.default_rng([seed, 1]).permutation(len(others))[:count]]

    def sample_test(self, count: int, seed: int = 0) -> list[Example]:
        """At most `count` test examples, the same for every k."""
        return [self.test[i] for i in np.random.default_rng(seed).permutation(len(self.test))[:count]]

    def cut(self, characters: int) -> "TextSet":
        """Every text's first characters."""
        train, test = (tuple((t[:characters], y) for t, y in part) for part in (self.train, self.test))
        return TextSet(self.name, self.labels, train, test)

    def within_train(self) -> "TextSet":
        """The train split alone, halved class by class: for choosing between methods without a look at test."""
        learn = halves([y for _, y in self.train])
        halved = [
            tuple(e for e, first in zip(self.train, learn, strict=True) if first == want) for want in (True, False)
        ]
        return TextSet(self.name, self.labels, *halved)


@dataclass(frozen=True)
class PictureSet:
    """Labelled pictures as vectors of their pixels, from 0 to 1."""

    name: str
    train: np.ndarray
    train_labels: np.ndarray
    test: np.ndarray
    test_labels: np.ndarray

    def of_classes(self, labels: Sequence[str]) -> "PictureSet":
        learn, judge = np.isin(self.train_labels, labels), np.isin(self.test_labels, labels)
        return PictureSet(
            self.name, self.train[learn], self.train_labels[learn], self.test[judge], self.test_labels[judge]
        )

    def within_train(self) -> "PictureSet":
        """As a TextSet's."""
        learn = halves(self.train_labels.tolist())
        parts = (part for want in (learn, ~learn) for part in (self.train[want], self.train_labels[want]))
        return PictureSet(self.name, *parts)


def balanced_order(labels: Sequence[str], seed: int) -> np.ndarray:
    """All examples, shuffled within their class, the classes taking turns."""
    rng = np.random.default_rng(seed)
    turn = np.zeros(len(labels))
    for place, label in enumerate(sorted(set(labels))):
        members = np.flatnonzero(np.asarray(labels) == label)
        turn[rng.permutation(members)] = np.arange(len(members)) + place / len(labels)
    return np.argsort(turn, kind="stable")


def balanced_draw(labels: Sequence[str], num_each: int, seed: int) -> np.ndarray:
    """The first `num_each` of every class in `balanced_order`."""
    left: dict[str, int] = {label: num_each for label in set(labels)}
    drawn: list[int] = []
    for i in map(int, balanced_order(labels, seed)):
        if left[labels[i]]:
            left[labels[i]] -= 1
            drawn.append(i)
    return np.array(drawn)


def halves(labels: Sequence[str]) -> np.ndarray:
    """True for one half of every class (the larger of an odd one), by a fixed seed."""
    first = np.zeros(len(labels), dtype=bool)
    rng = np.random.default_rng(0)
    for label in sorted(set(labels)):
        members = rng.permutation(np.flatnonzero(np.asarray(labels) == label))
        first[members[: -(-len(members) // 2)]] = True
    return first


def read(path: Path) -> TextSet | None:
    """The set of one file, or None where it has no labelled texts. A test text that is in train too is left out."""
    columns = pq.read_schema(path).names
    label = next((name for name in ("label_name", "label") if name in columns), None)
    if label is None or "text" not in columns or not _holds_strings(path, "text"):
        return None
    table = pq.read_table(path, columns=["text", label, *(["split"] if "split" in columns else [])])
    splits = table.column("split").to_pylist() if "split" in columns else ["all"] * len(table)
    read_rows = zip(table.column("text").to_pylist(), table.column(label).to_pylist(), splits, strict=True)
    rows = [(text, str(y), split) for text, y, split in read_rows if y is not None and text and text.strip()]
    held_out = held_out_split({split for _, _, split in rows})
    if held_out is not None:
        train, test = ([(text, y) for text, y, s in rows if s == want] for want in ("train", held_out))
    else:
        learn = halves([y for _, y, _ in rows])
        train, test = (
            [row[:2] for row, first in zip(rows, learn, strict=True) if first == want] for want in (True, False)
        )
    known = {text for text, _ in train}
    test = [example for example in test if example[0] not in known]
    return TextSet(path.stem, tuple(sorted({y for _, y in train})), tuple(train), tuple(test)) if test else None


def _holds_strings(path: Path, column: str) -> bool:
    kind = pq.read_schema(path).field(column).type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def held_out_split(splits: set[str]) -> str | None:
    """The split to be judged on; None where there is no train split, or nothing beside it."""
    others = sorted(splits - {"train"})
    return None if "train" not in splits or not others else "test" if "test" in others else others[0]


def read_all(directory: Path) -> list[TextSet]:
    """Every text set of a directory, by name. Labels that hardly repeat (numbers, sentences) are no classes."""
    sets = [one for path in sorted(directory.glob("*.parquet")) if (one := read(path)) is not None]
    sets = [one for one in sets if 1 < len(one.labels) <= len(one.train) / 2]
    if not sets:
        raise SystemExit(f"{directory} holds no .parquet file with columns text and label_name (or label)")
    return sets


def read_pictures(path: Path) -> PictureSet | None:
    """The set of one file with columns image (uint8, row-major), label_name or label; None where it has none.

    Pixels are divided by the largest value of the set (16 in digits8x8, 255 in mnist).
    """
    columns = pq.read_schema(path).names
    label = next((name for name in ("label_name", "label") if name in columns), None)
    if "image" not in columns or label is None:
        return None
    table = pq.read_table(path)
    pixels = [np.frombuffer(image, np.uint8) for image in table.column("image").to_pylist()]
    if len({len(one) for one in pixels}) != 1:
        return None  # pictures of several sizes have no pixel vectors
    vectors = np.stack(pixels).astype(np.float32)
    vectors /= max(1, vectors.max())
    labels = np.array([str(y) for y in table.column(label).to_pylist()])
    splits = table.column("split").to_pylist() if "split" in columns else ["all"] * len(labels)
    return split_vectors(path.stem, vectors, labels, splits)


def split_vectors(name: str, vectors: np.ndarray, labels: np.ndarray, splits: Sequence[str]) -> PictureSet:
    """By the split column, or halves where it names nothing to judge on."""
    split = np.array(splits)
    held_out = held_out_split(set(splits))
    learn = halves(labels.tolist()) if held_out is None else split == "train"
    judge = ~learn if held_out is None else split == held_out
    return PictureSet(name, vectors[learn], labels[learn], vectors[judge], labels[judge])


def read_all_pictures(directory: Path) -> list[PictureSet]:
    return [one for path in sorted(directory.glob("*.parquet")) if (one := read_pictures(path)) is not None]
