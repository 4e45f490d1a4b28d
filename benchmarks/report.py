"""One form for every benchmark: rows of ours against what a user would pick instead, a printed table, a JSON file.

Ratios are written so that more is better. Both sides are timed in turn in the same run, and medians are quoted.
"""

import argparse
import dataclasses
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, kw_only=True)
class Row:
    """One figure. `ratio` is ours over against where more is better, against over ours where less is."""

    id: str
    what: str
    ours: float
    against: float | None
    ratio: float | None
    unit: str
    note: str = ""
    part: str = ""
    """What of the benchmark it belongs to, where parts can be run apart."""
    detail: bool = False
    """Kept in the JSON, left out of the README."""
    extra: Mapping[str, object] = dataclasses.field(default_factory=dict)
    """For programs that read the JSON: a difference's standard error, the figures of each set."""


def figure(id: str, what: str, ours: float, unit: str, note: str = "", **more: Any) -> Row:
    """A figure that stands alone."""
    return Row(id=id, what=what, ours=ours, against=None, ratio=None, unit=unit, note=note, **more)


def rate(id: str, what: str, ours: float, against: float | None, unit: str, note: str = "", **more: Any) -> Row:
    """A figure of which more is better (requests a second, accuracy)."""
    ratio = ours / against if against else None
    return Row(id=id, what=what, ours=ours, against=against, ratio=ratio, unit=unit, note=note, **more)


def duration(id: str, what: str, ours: float, against: float | None, unit: str, note: str = "", **more: Any) -> Row:
    """A figure of which less is better (seconds, bytes)."""
    ratio = against / ours if against and ours else None
    return Row(id=id, what=what, ours=ours, against=against, ratio=ratio, unit=unit, note=note, **more)


def machine() -> dict[str, object]:
    """What the figures were measured on; no names, no paths."""
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_gib": round(memory_gib, 1),
        "python": platform.python_version(),
        "load_before": round(os.getloadavg()[0], 2),
    }


def parser(doc: str | None) -> argparse.ArgumentParser:
    """An argument parser with the `--json FILE` that every benchmark takes."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--json", type=Path, help="write the rows to this file")
    return made


def add_parts(parser: argparse.ArgumentParser, parts: Iterable[str]) -> None:
    """`--parts a,b`: some of a benchmark's parts, as a list in the benchmark's own order; all without."""
    known = list(parts)

    def chosen(text: str) -> list[str]:
        asked = {part.strip() for part in text.split(",")}
        if unknown := sorted(asked.difference(known)):
            raise argparse.ArgumentTypeError(f"no part {', '.join(unknown)}; parts: {', '.join(known)}")
        return [part for part in known if part in asked]

    parser.add_argument("--parts", type=chosen, default=known, help=f"of {', '.join(known)}")


def rows_of(
    parts: Mapping[str, Callable[[argparse.Namespace], Sequence[Row]]], arguments: argparse.Namespace
) -> list[Row]:
    """The rows of the parts that were asked for, under their names; says how long each took."""
    rows: list[Row] = []
    for part in arguments.parts:
        began = time.perf_counter()
        rows += [dataclasses.replace(row, part=part) for row in parts[part](arguments)]
        print(f"{part}: {time.perf_counter() - began:.0f} s", flush=True)
    return rows


def publish(benchmark: str, rows: Sequence[Row], *, json_file: Path | None, started_on: dict[str, object]) -> None:
    """Prints the table and writes `{"benchmark", "command", "machine", "rows"}`.

    Rows of a part replace that part's in a file that is there and leave the other parts'; `parts` then holds the
    command and the machine of each.
    """
    table = Table(title=benchmark)
    for column in ("id", "what", "ours", "against", "ratio", "unit", "note"):
        table.add_column(column, justify="right" if column in ("ours", "against", "ratio") else "left")
    for row in rows:
        table.add_row(row.id, row.what, _number(row.ours), _number(row.against), _number(row.ratio), row.unit, row.note)
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    if json_file:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        arguments = [a for a in sys.argv[1:] if a != "--json" and a != str(json_file)]
        command = " ".join([f"python -m benchmarks.{benchmark}", *map(shlex.quote, arguments)])
        made = {
            "benchmark": benchmark,
            "command": command,
            "machine": started_on,
            "rows": [dataclasses.asdict(row) for row in rows],
        }
        parts = {row.part: {"command": command, "machine": started_on} for row in rows if row.part}
        if parts:
            earlier = json.loads(json_file.read_text()) if json_file.is_file() else {}
            made = merged(earlier, {**made, "parts": parts})
        json_file.write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n")


def merged(earlier: Mapping[str, Any], made: Mapping[str, Any]) -> dict[str, Any]:
    """Both documents' parts, the later one's where both have one; rows in the order of the parts' first appearance.

    A document without parts is replaced.
    """
    parts = {**earlier.get("parts", {}), **made["parts"]}
    rows = [row for row in earlier.get("rows", []) if row.get("part") in parts.keys() - made["parts"].keys()]
    order = list(parts)
    return {**made, "parts": parts, "rows": sorted([*rows, *made["rows"]], key=lambda row: order.index(row["part"]))}


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least `percent` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -(-len(ordered) * int(percent) // 100) - 1))]


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
