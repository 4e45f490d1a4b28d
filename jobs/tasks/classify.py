"""Text classification by label word, from any table with columns text, label (or label_name) and split."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jobs.tasks.base import SPLITS, Example, ListedTask, Split
from jobs.tasks.tables import Record, columns_of, read_table
from metasepia.errors import InvalidSettings

PROMPT = "Text: {text}\nChoose one label: {labels}.\nLabel:"
"""Of a few, the one to which small models answer with a label most often."""
MAX_LABELS = 200
MAX_CHARACTERS = 1200
"""Of a text; the rest is cut, so that every prompt fits a small window."""


@dataclass(frozen=True, kw_only=True)
class ClassifyTask(ListedTask):
    """The answer is one of the labels and nothing else."""


def read(path: Path, *, name: str | None = None, prompt: str = PROMPT) -> ClassifyTask:
    """The task of a file; `label_name` is preferred to `label`.

    Splits are the file's own. One without valid gives its odd train rows to it; one without test is judged on valid,
    and one without any is cut in 3:1:1 by a hash of the texts. Rows whose text is empty or came before are left out, so
    that no training text stands in a later split. `prompt` holds `{text}` and may hold `{labels}`.
    """
    name = name or re.sub(r"[^a-z0-9._-]+", "-", path.stem.lower()).strip("-._") or "classify"
    rows = read_table(path)
    text, label = columns_of(rows, path, ("text", "sentence"), ("label_name", "label"))
    labels = tuple(sorted({_word(row[label]) for row in rows if row[label] is not None}))
    if not 2 <= len(labels) <= MAX_LABELS or "" in labels:
        raise InvalidSettings("data", str(path), f"labelled with 2 to {MAX_LABELS} words; it has {len(labels)} labels")
    listed = ", ".join(labels[:-1]) + " or " + labels[-1]
    examples: dict[Split, list[Example]] = {split: [] for split in SPLITS}
    seen: set[str] = set()
    for split, row in _by_split(rows, text, path):
        body = str(row[text] or "").strip()[:MAX_CHARACTERS]
        if not body or row[label] is None or body in seen:
            continue
        seen.add(body)
        asked = prompt.format(text=body, labels=listed)
        examples[split].append(Example(prompt=asked, answer=_word(row[label]), group=body, text=body))
    about = f"Labels texts of {name} as {listed}."
    return ClassifyTask(name=name, about=about, examples=examples, labels=labels, max_tokens=12)


def _by_split(rows: Sequence[Record], text: str, path: Path) -> list[tuple[Split, Record]]:
    """Each row with its split, training rows first."""
    given = {row["split"] for row in rows}
    told: list[tuple[Split, Record]] = []
    if not given & {"valid", "test"}:
        parts: tuple[Split, ...] = ("train", "train", "train", "valid", "test")
        for row in rows:
            told.append((parts[hashlib.sha256(str(row[text]).encode()).digest()[0] % 5], row))
    elif "train" not in given:
        raise InvalidSettings("data", str(path), f"one with a train split; it has {sorted(given)}")
    else:
        count = 0
        for row in rows:
            split = row["split"]
            if "test" not in given and split == "valid":
                split = "test"
            elif split == "train" and not {"valid", "test"} <= given:
                count += 1
                split = "train" if count % 2 else "valid"
            if split in SPLITS:
                told.append((split, row))
    return sorted(told, key=lambda one: SPLITS.index(one[0]))


def _word(label: object) -> str:
    """A label as it is asked for: words instead of identifiers."""
    return re.sub(r"[\s_]+", " ", str(label)).strip()
