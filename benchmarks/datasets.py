"""Labelled text sets from a directory of Parquet files (columns text, label_name, split), and nested draws of them."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq


@dataclass(frozen=True)
class TextSet:
    """A labelled text set with examples to learn from and others to be judged on."""

    name: str
    labels: tuple[str, ...]
    train: tuple[tuple[str, str], ...]
    test: tuple[tuple[str, str], ...]

    def draw(self, k: int, seed: int) -> tuple[tuple[str, str], ...]:
        """k training examples, classes balanced and interleaved; a smaller k draws the start of a larger one."""
        rng = np.random.default_rng(seed)
        of_label = {label: [e for e in self.train if e[1] == label] for label in self.labels}
        order = {label: rng.permutation(len(examples)) for label, examples in of_label.items()}
        return tuple(
            of_label[label][order[label][i]] for i in range(-(-k // len(self.labels))) for label in self.labels
        )[:k]

    def sample_test(self, count: int, seed: int) -> tuple[tuple[str, str], ...]:
        """At most `count` test examples, the same for every k."""
        order = np.random.default_rng(seed).permutation(len(self.test))[:count]
        return tuple(self.test[i] for i in order)


def read(path: Path) -> TextSet | None:
    """The set of one file, or None where it has no labelled texts. A set without splits is halved by a fixed seed."""
    table = pq.read_table(path)
    if not {"text", "label_name", "split"} <= set(table.column_names):
        return None
    rows = list(zip(*(table.column(c).to_pylist() for c in ("text", "label_name", "split")), strict=True))
    rows = [(t, str(y), s) for t, y, s in rows if t and t.strip()]
    splits = {s for _, _, s in rows}
    if "train" in splits:
        held_out = "test" if "test" in splits else sorted(splits - {"train"})[0]
        train, test = ([(t, y) for t, y, s in rows if s == want] for want in ("train", held_out))
    else:
        order = np.random.default_rng(0).permutation(len(rows))
        half = len(rows) // 2
        train, test = ([rows[i][:2] for i in part] for part in (order[:half], order[half:]))
    return TextSet(path.stem, tuple(sorted({y for _, y in train})), tuple(train), tuple(test))


def read_all(directory: Path, *, num_labels: int | None = None) -> list[TextSet]:
    """Every text set of a directory, by name; only those of `num_labels` labels where given."""
    sets = [one for path in sorted(directory.glob("*.parquet")) if (one := read(path)) is not None]
    if num_labels is not None:
        sets = [one for one in sets if len(one.labels) == num_labels]
    if not sets:
        raise SystemExit(f"{directory} holds no .parquet file with columns text, label_name, split that fits")
    return sets
