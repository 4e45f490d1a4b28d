"""Tables of a shell: CSV, JSON lines, Parquet and plain lines in and out, every value as it came.

A CSV's values are texts and stay what they are ("007" is no number); JSON's keep their types; of Parquet the table
itself is kept, so that its types come out again.
"""

import csv
import io
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metasepia.shell import MISUSE, REFUSED, Failed, existing, json_values, table, text_of, whole_file

FORMATS = ("csv", "tsv", "jsonl", "parquet", "txt")
_SUFFIXES = {".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl",
             ".parquet": "parquet", ".pq": "parquet", ".txt": "txt"}  # fmt: skip
MAX_SHOWN = 60
"""Characters of a value in a table on the screen."""


@dataclass(frozen=True)
class Sheet:
    """Rows under names."""

    names: tuple[str, ...]
    records: Sequence[Mapping[str, Any]]
    """A row each; one that lacks a name has nothing there."""
    kind: str
    where: str
    arrow: Any = None
    """The table of a Parquet file."""

    def __len__(self) -> int:
        return len(self.records)

    def texts(self, column: str | None) -> list[Any]:
        """The column `column`; the only one where there is no other. Raises Failed naming the row."""
        return self.column(self.only if column is None or (column == "text" and self.kind == "txt") else column)

    @property
    def only(self) -> str:
        """Raises Failed where several columns could be meant."""
        if "text" in self.names or len(self.names) == 1:
            return "text" if "text" in self.names else self.names[0]
        raise Failed(f"{self.where}: say --text COLUMN; there are {', '.join(self.names)}", MISUSE)

    def column(self, name: str) -> list[Any]:
        """Raises Failed for a column that is not there, and for a row with nothing, or no text, in it."""
        if name not in self.names:
            raise Failed(f"{self.where} has no column {name!r}; there are {', '.join(self.names)}", REFUSED)
        values = [one.get(name) for one in self.records]
        for place, value in enumerate(values):
            if not isinstance(value, str):
                said = "nothing" if value is None else repr(value)
                raise Failed(f"{self.where}, {self.row(place)}: {said} in {name!r}, where a text must be", REFUSED)
        return values

    def row(self, place: int) -> str:
        """How people find a row in the file."""
        return f"line {place + 1}" if self.kind in ("jsonl", "txt") else f"row {place + 1}"

    def with_columns(self, columns: Mapping[str, Sequence[Any]]) -> "Sheet":
        """Further columns behind the others. Raises Failed for a name that is there already."""
        if taken := [name for name in columns if name in self.names]:
            raise Failed(
                f"{self.where} has a column {taken[0]!r} already; --prefix gives new ones another name", REFUSED
            )
        records = [
            {**one, **{name: values[place] for name, values in columns.items()}}
            for place, one in enumerate(self.records)
        ]
        arrow = self.arrow
        if arrow is not None:
            import pyarrow as pa

            for name, values in columns.items():
                arrow = arrow.append_column(name, pa.array(list(values)))
        return Sheet((*self.names, *columns), records, self.kind, self.where, arrow)


def read(path: Path, kind: str | None = None) -> Sheet:
    """A file by its suffix, or of a kind in FORMATS; standard input (`-`) is JSON lines or lines of text by its look.

    Raises Failed in words.
    """
    where = "standard input" if str(path) == "-" else str(path)
    kind = kind or _SUFFIXES.get(path.suffix.lower())
    if kind == "parquet":
        return _parquet(path, where)
    if kind is None and str(path) != "-":
        raise Failed(f"{path}: of what kind? --from says it: {', '.join(FORMATS)}", MISUSE)
    text = text_of(path)
    if not text.strip():
        raise Failed(f"{where} is empty", REFUSED)
    kind = kind or ("jsonl" if text.lstrip()[:1] in "{[" else "txt")
    if kind == "txt":
        return Sheet(("text",), [{"text": line} for line in text.splitlines() if line.strip()], kind, where)
    return _jsonl(text, where) if kind == "jsonl" else _csv(text, kind, where)


def examples(path: Path, text: str | None, label: str) -> list[dict[str, Any]]:
    """Texts with their labels. Raises Failed."""
    sheet = read(path)
    texts, labels = sheet.texts(text), sheet.column(label)
    return [{"text": one, "label": said} for one, said in zip(texts, labels, strict=True)]


def _csv(text: str, kind: str, where: str) -> Sheet:
    csv.field_size_limit(2**31 - 1)
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if kind == "tsv" else ",", strict=True)
        names, *rows = [row for row in reader if row]
    except csv.Error as error:
        raise Failed(f"{where} is no {kind.upper()}: {error}", REFUSED) from None
    if twice := [name for name in names if names.count(name) > 1]:
        raise Failed(f"{where}: {names.count(twice[0])} columns are named {twice[0]!r}; rename one of them", REFUSED)
    for place, row in enumerate(rows):
        if len(row) != len(names):
            raise Failed(f"{where}, row {place + 1}: {len(row)} values under {len(names)} names", REFUSED)
    return Sheet(tuple(names), [dict(zip(names, row, strict=True)) for row in rows], kind, where)


def _jsonl(text: str, where: str) -> Sheet:
    found = json_values(text, where)
    records = [{"text": one} if isinstance(one, str) else one for one in found]
    for place, one in enumerate(records):
        if not isinstance(one, dict):
            raise Failed(f"{where}, line {place + 1}: an object or a text must be there, not {one!r:.60}", REFUSED)
    names = dict.fromkeys(name for one in records for name in one)
    return Sheet(tuple(names), records, "jsonl", where)


def _parquet(path: Path, where: str) -> Sheet:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        source = io.BytesIO(sys.stdin.buffer.read()) if str(path) == "-" else existing(path)
        found = pq.ParquetFile(source).read()
    except (pa.ArrowInvalid, OSError) as error:
        raise Failed(f"{where} is no Parquet file: {error}", REFUSED) from None
    names = found.column_names
    if twice := [name for name in names if names.count(name) > 1]:
        raise Failed(f"{where}: {names.count(twice[0])} columns are named {twice[0]!r}; rename one of them", REFUSED)
    if not len(found):
        raise Failed(f"{where} has no rows", REFUSED)
    return Sheet(tuple(names), found.to_pylist(), "parquet", where, found)


# -- out ---------------------------------------------------------------------------------------------------------------


def kind_of(out: Path | None, kind: str | None) -> str:
    """What to write: as asked, by the file's suffix, or a table for a person and CSV for a pipe. Raises Failed."""
    if kind is not None:
        found = kind
    elif out is None:
        found = "table" if sys.stdout.isatty() else "csv"
    else:
        found = _SUFFIXES.get(out.suffix.lower(), "")
    if found in ("", "txt") or (found == "table" and out is not None):
        raise Failed(f"{out}: as what? --to says it: csv, tsv, jsonl, parquet", MISUSE)
    return found


def write(sheet: Sheet, out: Path | None, kind: str) -> None:
    """To a file, whole or not at all, or to standard output. Raises Failed."""
    if kind == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        arrow = sheet.arrow if sheet.arrow is not None else pa.Table.from_pylist([dict(one) for one in sheet.records])
        if out is None:
            pq.write_table(arrow, sys.stdout.buffer)
            return
        with whole_file(out) as beside:
            pq.write_table(arrow, beside)
    elif out is None:
        _print(sheet, kind)
    else:
        with whole_file(out) as beside:
            beside.write_text(_spelt(sheet, kind), newline="")


def _print(sheet: Sheet, kind: str) -> None:
    if kind != "table":
        sys.stdout.write(_spelt(sheet, kind))
        return
    table(sheet.names, [[_short(one.get(name)) for name in sheet.names] for one in sheet.records])


def _spelt(sheet: Sheet, kind: str) -> str:
    if kind == "jsonl":
        return "".join(json.dumps(one, ensure_ascii=False, default=str) + "\n" for one in sheet.records)
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter="\t" if kind == "tsv" else ",", lineterminator="\n")
    writer.writerow(sheet.names)
    writer.writerows([["" if one.get(name) is None else one[name] for name in sheet.names] for one in sheet.records])
    return text.getvalue()


def _short(value: Any) -> str:
    text = "" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)
    text = " ".join(text.split())
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 1] + "…"
