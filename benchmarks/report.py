"""One form for every benchmark: rows of ours against what a user would pick instead, a printed table, a JSON file.

Ratios are written so that more is better. Both sides are timed in turn in the same run, and medians are quoted.
"""

import argparse
import dataclasses
import json
import os
import platform
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

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


def rate(id: str, what: str, ours: float, against: float | None, unit: str, note: str = "") -> Row:
    """A figure of which more is better (requests a second, accuracy)."""
    return Row(
        id=id, what=what, ours=ours, against=against, ratio=ours / against if against else None, unit=unit, note=note
    )


def duration(id: str, what: str, ours: float, against: float | None, unit: str, note: str = "") -> Row:
    """A figure of which less is better (seconds, bytes)."""
    return Row(
        id=id, what=what, ours=ours, against=against, ratio=against / ours if against else None, unit=unit, note=note
    )


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


def publish(benchmark: str, rows: Sequence[Row], *, json_file: Path | None, started_on: dict[str, object]) -> None:
    """Prints the table and writes `{"benchmark", "command", "machine", "rows"}`."""
    table = Table(title=benchmark)
    for column in ("id", "what", "ours", "against", "ratio", "unit", "note"):
        table.add_column(column, justify="right" if column in ("ours", "against", "ratio") else "left")
    for row in rows:
        table.add_row(row.id, row.what, _number(row.ours), _number(row.against), _number(row.ratio), row.unit, row.note)
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    if json_file:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        arguments = [a for a in sys.argv[1:] if a != "--json" and a != str(json_file)]
        document = {
            "benchmark": benchmark,
            "command": " ".join([f"python -m benchmarks.{benchmark}", *arguments]),
            "machine": started_on,
            "rows": [dataclasses.asdict(row) for row in rows],
        }
        json_file.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least `percent` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -(-len(ordered) * int(percent) // 100) - 1))]


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
