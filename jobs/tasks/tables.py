"""Reads tables that a user gives: a Parquet, CSV or JSON-lines file, or a directory of them as Hugging Face has it.

The split of a row is its column `split`, else the beginning of its file's name (`train-00000-of-00001.parquet`).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from jobs.tasks.base import Split
from metasepia.errors import CorruptArtefact, InvalidSettings

SPLIT_NAMES: Mapping[str, Split] = {
    "train": "train",
    "training": "train",
    "valid": "valid",
    "validation": "valid",
    "val": "valid",
    "dev": "valid",
    "test": "test",
}
"""What splits are called out there; others (`prompt`, `all`) keep their names."""

Record = dict[str, Any]


def read_table(path: Path) -> list[Record]:
    """Every row, in the order of the files' names, with `split` filled in ("all" where nothing tells it).

    Raises InvalidSettings where there is nothing to read, CorruptArtefact for a file that cannot be.
    """
    if not path.exists():
        raise InvalidSettings("data", str(path), "a file or directory that exists")
    files = [path] if path.is_file() else _files_of(path)
    rows: list[Record] = []
    for file in files:
        told = "all" if path.is_file() else file.name.split("-")[0].split(".")[0]
        for row in _read_file(file):
            split = str(row.get("split") or told)
            rows.append({**row, "split": SPLIT_NAMES.get(split.lower(), split)})
    if not rows:
        raise InvalidSettings("data", str(path), "one that holds rows")
    return rows


def columns_of(rows: Sequence[Record], path: Path, *wanted: Sequence[str]) -> list[str]:
    """The name of each wanted column: the first of its spellings that the table has. Raises InvalidSettings."""
    known = list(dict.fromkeys(name for row in rows[:1] for name in row))
    found = [next((name for name in spellings if name in known), None) for spellings in wanted]
    missing = [" or ".join(names) for names, name in zip(wanted, found, strict=True) if name is None]
    if missing:
        raise InvalidSettings("data", str(path), f"a table with columns {', '.join(missing)}; it has {known}")
    return [name for name in found if name is not None]


def _files_of(directory: Path) -> list[Path]:
    readable = [p for p in sorted(directory.iterdir()) if p.suffix.lower() in _READERS]
    if not readable:
        raise InvalidSettings("data", str(directory), f"a directory with {', '.join(sorted(_READERS))} files")
    return readable


def _read_file(file: Path) -> list[Record]:
    reader = _READERS.get(file.suffix.lower())
    if reader is None:
        raise InvalidSettings("data", str(file), f"a {', '.join(sorted(_READERS))} file")
    try:
        return reader(file).to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise CorruptArtefact(str(file), f"it cannot be read ({error})") from error


_READERS = {
    ".parquet": pyarrow.parquet.read_table,
    ".csv": pyarrow.csv.read_csv,
    ".jsonl": pyarrow.json.read_json,
    ".json": pyarrow.json.read_json,
}
