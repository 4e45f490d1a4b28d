"""Labelled data sets out of tables: CSV, TSV, JSON lines or Parquet, a file or a folder as Hugging Face has it.

The split of a row is its column `split`, else the beginning of its file's name where that is the name of a split
(`train-00000-of-00001.parquet`). Only the columns that are wanted are read.
"""

import csv
import glob
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.embedding.spec import DataSetSpec
from jobs.tasks.tables import SPLIT_NAMES
from metasepia.digests import digest_of_file
from metasepia.embedding.answers import Answers
from metasepia.errors import CorruptArtefact, InvalidRequest, InvalidSettings

FORMS = (".parquet", ".csv", ".tsv", ".jsonl", ".json")
LABELS = ("label_name", "label")
"""Columns that hold the label where none is named, the first that is there."""
MAX_FIELD_CHARS = 1 << 24


def find(spec: DataSetSpec) -> list[tuple[str, Path]]:
    """The name and path of each data set that an entry stands for, by name.

    Raises InvalidSettings for a path that is not there, that matches nothing, or holds no file of FORMS.
    """
    paths = [Path(spec.path)] if Path(spec.path).exists() else [Path(one) for one in sorted(glob.glob(spec.path))]
    field = f"{spec.place}.path"
    if not paths:
        raise InvalidSettings(field, spec.path, "a file or folder that is there, or a pattern that matches some")
    found: list[Path] = []
    for path in paths:
        if path.is_file() and path.suffix.lower() in FORMS:
            found.append(path)
        elif path.is_dir():
            files = _files_of(path)
            # Files called after splits are one data set, others one each.
            found += [path] if files and all(_split_of(file) for file in files) else files
    if not found:
        raise InvalidSettings(field, spec.path, f"{', '.join(FORMS)} files, or folders with some; it has none")
    if spec.name is not None:
        if len(found) > 1:
            raise InvalidSettings(
                f"{spec.place}.name", spec.name, f"left out for {len(found)} data sets: files name them"
            )
        return [(spec.name, found[0])]
    return [(path.stem if path.is_file() else path.name, path) for path in found]


def stamp(path: Path) -> str:
    """The digest of a data set's bytes."""
    if path.is_file():
        return digest_of_file(path)
    sha = hashlib.sha256()
    for file in _files_of(path):
        sha.update(f"{file.name}\0{digest_of_file(file)}\0".encode())
    return sha.hexdigest()


def read(spec: DataSetSpec, path: Path) -> Answers:
    """The examples of one data set, `spec.most` of them at most.

    Raises InvalidSettings for a column or split that it has not, CorruptArtefact for a file that cannot be read, with
    its line, and InvalidRequest for examples that tell nothing: none, one label only.
    """
    texts: list[str] = []
    labels: list[str] = []
    splits: dict[str, None] = {}
    unlabelled = 0
    for file in [path] if path.is_file() else _files_of(path):
        told = "" if path.is_file() else _split_of(file)
        for where, row in _rows(file, spec):
            split = str(row.get("split") or told or "")
            split = SPLIT_NAMES.get(split.lower(), split)
            splits[split] = None
            if spec.split is not None and split != SPLIT_NAMES.get(spec.split.lower(), spec.split):
                continue
            if any(str(row[column]) != value for column, value in spec.where):
                continue
            text, label = row[spec.text], row[_LABEL]
            if text is not None and not isinstance(text, str):
                raise CorruptArtefact(where, f"{spec.text} is {type(text).__name__}, not text")
            if text is None or not text.strip() or label is None or str(label) == "":
                unlabelled += 1
                continue
            texts.append(text)
            labels.append(str(label))
    if not texts:
        chosen = " and ".join(
            [*([f"split = {spec.split}"] if spec.split else []), *(f"{a} = {b}" for a, b in spec.where)]
        )
        there = f"; its splits are {', '.join(filter(None, splits)) or 'not told'}" if spec.split else ""
        raise InvalidRequest(str(path), f"it has no labelled example{' with ' * bool(chosen)}{chosen}{there}")
    try:
        answers = Answers.of_labelled(texts, labels, most=min(spec.most, len(texts)), seed=spec.seed)
    except InvalidRequest as error:
        raise InvalidRequest(str(path), error.message) from error
    if not unlabelled:
        return answers
    note = f"{unlabelled} rows without text or label were left out"
    return Answers(
        texts=answers.texts, labels=answers.labels, probabilities=answers.probabilities, notes=(*answers.notes, note)
    )


_LABEL = "\0label"
"""Under which a row's label is found, whatever its column is called."""


def _files_of(folder: Path) -> list[Path]:
    return sorted(one for one in folder.iterdir() if one.is_file() and one.suffix.lower() in FORMS)


def _split_of(file: Path) -> str:
    """train for train-00000-of-00001.parquet and train.csv; empty for a name that tells none."""
    return SPLIT_NAMES.get(file.name.split("-")[0].split(".")[0].lower(), "")


def _rows(file: Path, spec: DataSetSpec) -> Iterator[tuple[str, dict[str, object]]]:
    """Each row with its place, for errors."""
    suffix = file.suffix.lower()
    try:
        if suffix == ".parquet":
            yield from _parquet_rows(file, spec)
        elif suffix in (".csv", ".tsv"):
            yield from _separated_rows(file, spec, "\t" if suffix == ".tsv" else ",")
        else:
            yield from _json_rows(file, spec)
    except (UnicodeDecodeError, OSError, pa.ArrowException, csv.Error) as error:
        raise CorruptArtefact(str(file), f"it is not a readable {suffix} file ({error})") from error


def _parquet_rows(file: Path, spec: DataSetSpec) -> Iterator[tuple[str, dict[str, object]]]:
    with pq.ParquetFile(file) as opened:
        names = _columns(spec, opened.schema_arrow.names, str(file))
        number = 0
        for batch in opened.iter_batches(1 << 14, columns=sorted(set(names.values()))):
            for row in batch.to_pylist():
                number += 1
                yield f"{file}, row {number}", _named(row, names)


def _separated_rows(file: Path, spec: DataSetSpec, delimiter: str) -> Iterator[tuple[str, dict[str, object]]]:
    csv.field_size_limit(MAX_FIELD_CHARS)
    with file.open(encoding="utf-8-sig", newline="") as opened:
        rows = csv.reader(opened, delimiter=delimiter, strict=True)
        header = next(rows, None)
        if header is None:
            raise InvalidRequest(str(file), "it is empty")
        names = _columns(spec, header, str(file))
        for row in rows:
            where = f"{file}:{rows.line_num}"
            if not row:
                continue
            if len(row) != len(header):
                raise CorruptArtefact(where, f"a row of {len(row)} fields, where the header has {len(header)}")
            yield where, _named(dict(zip(header, row, strict=True)), names)


def _json_rows(file: Path, spec: DataSetSpec) -> Iterator[tuple[str, dict[str, object]]]:
    with file.open(encoding="utf-8-sig") as opened:
        for number, line in enumerate(opened, 1):
            if not line.strip():
                continue
            where = f"{file}:{number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise CorruptArtefact(where, f"it is not JSON ({error})") from error
            if not isinstance(row, dict):
                raise CorruptArtefact(where, "it is no JSON object with named fields")
            yield where, _named(row, _columns(spec, list(row), where))


def _columns(spec: DataSetSpec, known: Sequence[str], where: str) -> dict[str, str]:
    """What is wanted, by the column that has it. Raises InvalidSettings for a column that is not there."""
    wanted = {spec.text: spec.text, **{column: column for column, _ in spec.where}}
    label = spec.label or next((name for name in LABELS if name in known), LABELS[-1])
    for name in (*wanted, label):
        if name not in known:
            field = "text" if name == spec.text else "label" if name == label else "where"
            raise InvalidSettings(f"{spec.place}.{field}", name, f"a column of {where}: {', '.join(map(str, known))}")
    return {**wanted, _LABEL: label, **({"split": "split"} if "split" in known else {})}


def _named(row: Mapping[str, object], names: Mapping[str, str]) -> dict[str, object]:
    return {name: row[column] for name, column in names.items()}
