"""A folder of texts by task, read in any of these forms:

    DIR/<task>.txt                      a text a line
    DIR/<task>.jsonl, .csv, .tsv, .parquet   rows with a column `text`; perhaps a label and a template
    DIR/<task>/<template>.<any of these>     a sub-folder is a task, each of its files one template of paraphrases

A single file with a column of labels is a folder of tasks by itself: each label is a task.
"""

import csv
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from metasepia.digests import digest_of
from metasepia.errors import CorruptArtefact, InvalidSettings

FORMS = (".txt", ".jsonl", ".csv", ".tsv", ".parquet")
LABELS = ("label_name", "label", "task")
TEMPLATES = ("template", "group")
FEWEST = 4
"""A task needs texts to fit centroids by and texts to hold out."""

TaskBy = Literal["auto", "file", "label"]
HeldOutBy = Literal["auto", "template", "text"]


@dataclass(frozen=True, kw_only=True)
class TextSettings:
    """How a folder is read."""

    task_by: TaskBy = "auto"
    """What a task is: the file (or sub-folder), or the value in the label column. auto: the label where there is one
    file alone and it has labels, else the file."""
    text_column: str = "text"
    label_column: str = ""
    """Empty: the first of label_name, label, task that a file has."""
    template_column: str = ""
    """Empty: the first of template, group that a file has."""
    within: str = ""
    """A column that says what input a prompt holds (`line`: the line's number in a .txt file). States are then compared
    within each input, for where all tasks share inputs k-means may find these rather than the tasks. Empty: not."""
    where: tuple[tuple[str, str], ...] = ()
    """Only rows whose column has this value, as in (("split", "train"),)."""
    txt: Literal["lines", "whole"] = "lines"
    """Whether each line of a .txt file is a text, or the whole file is one."""
    limit: int = 200
    """Texts a task, chosen by `seed`, of every template alike; 0 takes all."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.limit and self.limit < FEWEST:
            raise InvalidSettings("limit", self.limit, f"0, which takes all, or at least {FEWEST} texts a task")


@dataclass(frozen=True)
class TaskTexts:
    """Texts, the task and template of each. Sorted by task, template and text, so no order of files matters."""

    texts: tuple[str, ...]
    tasks: tuple[str, ...]
    templates: tuple[str, ...]
    """Empty where a text has none. The same name in two tasks is two templates."""
    notes: tuple[str, ...] = ()
    """What was left out, for people to read."""
    inputs: tuple[str, ...] = ()
    """What input each text holds; none at all where texts are not compared within inputs."""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(sorted(set(self.tasks)))

    @property
    def digest(self) -> str:
        return digest_of([self.texts, self.tasks, self.templates])

    def groups(self) -> list[str]:
        """A name of each text's template within its task; texts without one are each their own."""
        return [
            json.dumps([task, template] if template else [task, "", i])
            for i, (task, template) in enumerate(zip(self.tasks, self.templates, strict=True))
        ]


@dataclass(frozen=True)
class _Row:
    text: str
    label: str | None
    template: str
    source: str
    """The file's name without its ending, or the sub-folder's."""
    input: str = ""


def read(directory: Path, settings: TextSettings) -> TaskTexts:
    """Raises InvalidSettings where the folder is missing, holds no such file, an empty one, fewer than two tasks or a
    task of fewer than FEWEST texts; CorruptArtefact for a file that cannot be read.
    """
    if not directory.is_dir():
        raise InvalidSettings("texts", str(directory), "an existing folder with one file a task")
    files, notes = _files(directory)
    if not files:
        raise InvalidSettings("texts", str(directory), f"a folder with files that end in {', '.join(FORMS)}")
    rows: list[_Row] = []
    for path in files:
        found = list(_rows(path, directory, settings))
        if not found:
            chosen = " and ".join(f"{name} = {value}" for name, value in settings.where)
            raise InvalidSettings(
                "texts", str(path), "a file with texts; it has none" + (f" with {chosen}" * bool(chosen))
            )
        rows += found
    by_label = settings.task_by == "label" or (settings.task_by == "auto" and len({row.source for row in rows}) == 1)
    without = sum(row.label is None for row in rows)
    if settings.task_by == "label" and without:
        raise InvalidSettings("task_by", "label", f"file: {without} texts of {len(rows)} have no label")
    by_label = by_label and not without
    triples = [(str(row.label) if by_label else row.source, row.template, row.text) for row in rows]
    kept, more = _unambiguous(triples)
    kept = [one for task in sorted({task for task, _, _ in kept}) for one in _limited(kept, task, settings)]
    counts = Counter(task for task, _, _ in kept)
    if len(counts) < 2:
        raise InvalidSettings(
            "texts", str(directory), f"two tasks or more to tell apart; it has {', '.join(counts) or 'none'} alone"
        )
    small = {task: count for task, count in counts.items() if count < FEWEST}
    if small:
        listed = ", ".join(f"{task} has {count}" for task, count in sorted(small.items()))
        raise InvalidSettings("texts", str(directory), f"at least {FEWEST} distinct texts a task; {listed}")
    tasks, templates, texts = zip(*kept, strict=True)
    inputs: tuple[str, ...] = ()
    if settings.within:
        input_of = {(task, text): row.input for row, (task, _, text) in zip(rows, triples, strict=True)}
        inputs = tuple(input_of[task, text] for task, _, text in kept)
    return TaskTexts(texts, tasks, templates, tuple(notes + more), inputs)


def held_out(texts: TaskTexts, share: float, seed: int, by: HeldOutBy = "auto") -> tuple[np.ndarray, str]:
    """Which texts are held out, and by what: whole templates where every task has two or more, else single texts.

    Of each task about `share`, at least one template (text) and never all. Raises InvalidSettings for a share that is
    not within (0, 1), and for `by` template where a task has fewer than two.
    """
    if not 0 < share < 1:
        raise InvalidSettings("held_out", share, "between 0 and 1, both excluded")
    keys = {
        task: sorted({one for own, one in zip(texts.tasks, texts.templates, strict=True) if own == task})
        for task in texts.names
    }
    lacking = [task for task, own in keys.items() if len(own) < 2 or "" in own]
    if by == "template" and lacking:
        raise InvalidSettings("held_out_by", by, f"text: {', '.join(lacking[:5])} has fewer than two templates")
    if by == "text" or lacking:
        of, what = texts.texts, "text"
        keys = {t: sorted(x for own, x in zip(texts.tasks, of, strict=True) if own == t) for t in texts.names}
    else:
        of, what = texts.templates, "template"
    chosen: set[tuple[str, str]] = set()
    for task, own in keys.items():
        count = min(max(1, round(share * len(own))), len(own) - 1)
        chosen |= {(task, one) for one in sorted(own, key=lambda one: _lot(seed, "held out", task, one))[:count]}
    return np.array([pair in chosen for pair in zip(texts.tasks, of, strict=True)]), what


def _files(directory: Path) -> tuple[list[Path], list[str]]:
    seen = [one for one in sorted(directory.iterdir()) if not one.name.startswith(".")]
    inside = [two for one in seen if one.is_dir() for two in sorted(one.iterdir()) if not two.name.startswith(".")]
    candidates = [one for one in seen if one.is_file()] + inside
    files = [one for one in candidates if one.is_file() and one.suffix.lower() in FORMS]
    others = sorted({one.name for one in candidates} - {one.name for one in files})
    return files, [f"not read: {', '.join(others)} (no {', '.join(FORMS)} file)"] if others else []


def _rows(path: Path, directory: Path, settings: TextSettings) -> Iterator[_Row]:
    inside = path.parent != directory
    source = path.parent.name if inside else path.stem
    template = path.stem if inside else ""
    try:
        if path.suffix.lower() == ".txt":
            content = path.read_text(encoding="utf-8-sig")
            lines = content.split("\n") if settings.txt == "lines" else [content]
            # a file that is one text is no template of paraphrases
            template = template if settings.txt == "lines" else ""
            if settings.within not in ("", "line"):
                raise InvalidSettings("within", settings.within, f"line for .txt files such as {path.name}")
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _Row(line.strip(), None, template, source, str(number))
            return
        for number, row in _tabular(path):
            if any(name not in row for name, _ in settings.where):
                missing = next(name for name, _ in settings.where if name not in row)
                raise InvalidSettings("where", missing, f"a column of {path.name}: {', '.join(row)}")
            if any(str(row[name]) != value for name, value in settings.where):
                continue
            if settings.text_column not in row:
                raise InvalidSettings(
                    "text_column", settings.text_column, f"a column of {path.name} (row {number}): {', '.join(row)}"
                )
            text = row[settings.text_column]
            if text is None or not str(text).strip():
                continue
            label = _value(row, settings.label_column, LABELS, "label_column", path)
            own = _value(row, settings.template_column, TEMPLATES, "template_column", path)
            held = _value(row, settings.within, (), "within", path)
            yield _Row(str(text).strip(), label, template if own is None else own, source, held or "")
    except (UnicodeDecodeError, json.JSONDecodeError, csv.Error, OSError) as error:
        raise CorruptArtefact(str(path), f"it is not a readable {path.suffix} file in UTF-8 ({error})") from error


def _tabular(path: Path) -> Iterator[tuple[int, Mapping[str, object]]]:
    """Rows with their number, from 1."""
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            # one file, not a data set: a folder named a=b is no column
            yield from enumerate(pq.ParquetFile(path).read().to_pylist(), 1)
        except pa.ArrowException as error:
            raise CorruptArtefact(str(path), f"it is not a readable Parquet file ({error})") from error
        return
    with path.open(encoding="utf-8-sig", newline="") as file:
        if suffix == ".jsonl":
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise CorruptArtefact(str(path), f"line {number} is no JSON object with named fields")
                yield number, row
            return
        csv.field_size_limit(2**24)
        for number, row in enumerate(csv.DictReader(file, delimiter="\t" if suffix == ".tsv" else ",", strict=True), 1):
            yield number, {str(name): value for name, value in row.items()}


def _value(row: Mapping[str, object], column: str, usual: Sequence[str], setting: str, path: Path) -> str | None:
    if column and column not in row:
        raise InvalidSettings(setting, column, f"a column of {path.name}: {', '.join(row)}")
    found = column or next((name for name in usual if row.get(name) is not None), "")
    return None if not found or row[found] is None else str(row[found])


def _unambiguous(triples: Sequence[tuple[str, str, str]]) -> tuple[list[tuple[str, str, str]], list[str]]:
    """Without repetitions within a task, and without texts that several tasks claim."""
    tasks_of: dict[str, set[str]] = {}
    for task, _, text in triples:
        tasks_of.setdefault(text, set()).add(task)
    first = {(task, text): template for task, template, text in sorted(triples, reverse=True)}
    kept = sorted((task, template, text) for (task, text), template in first.items() if len(tasks_of[text]) == 1)
    torn = sum(len(tasks) > 1 for tasks in tasks_of.values())
    notes = []
    if len(triples) > len(first):
        notes.append(f"{len(triples) - len(first)} texts that repeat another of their task were left out")
    if torn:
        notes.append(f"{torn} texts that stand in more than one task were left out of all")
    return kept, notes


def _limited(triples: Sequence[tuple[str, str, str]], task: str, settings: TextSettings) -> list[tuple[str, str, str]]:
    own = [one for one in triples if one[0] == task]
    if not settings.limit or len(own) <= settings.limit:
        return own
    turns: dict[str, int] = {}
    order: list[tuple[int, str, tuple[str, str, str]]] = []
    for one in sorted(own, key=lambda one: _lot(settings.seed, "limit", *one)):
        turns[one[1]] = turns.get(one[1], -1) + 1
        order.append((turns[one[1]], _lot(settings.seed, "turn", *one), one))
    return sorted(one for _, _, one in sorted(order)[: settings.limit])


def _lot(seed: int, *words: str) -> str:
    """What sorts things at random, the same way in whatever order they come."""
    return hashlib.sha256(json.dumps([seed, *words]).encode()).hexdigest()
