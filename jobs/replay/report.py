"""What was compared, and how it is shown."""

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from metasepia.digests import short
from metasepia.errors import MetasepiaError


@dataclass
class Report:
    """What was compared, one line each."""

    rows: list[tuple[str, str, str, bool]] = field(default_factory=list)
    answered: Any = None
    recomputed: Any = None

    @property
    def same(self) -> bool:
        return all(ok for *_, ok in self.rows)

    def check(self, what: str, told: object, found: object, ok: bool | None = None) -> None:
        told, found = (short(one) if isinstance(one, str) and len(one) == 64 else one for one in (told, found))
        self.rows.append((what, str(told), str(found), told == found if ok is None else ok))

    def close(self, what: str, told: np.ndarray, found: np.ndarray, tolerance: float) -> None:
        """The largest difference of two arrays."""
        if told.shape != found.shape:
            self.check(what, list(told.shape), list(found.shape))
        else:
            most = float(np.abs(told - found).max(initial=0.0))
            self.check(what, f"within {tolerance:g}", f"{most:.2g}", most <= tolerance)

    def missing(self, what: str, error: MetasepiaError) -> None:
        self.check(what, "", str(error), False)


def print_report(report: Report, console: Console) -> None:
    table = Table("what", "receipt or answer", "found here", "")
    for what, told, found, ok in report.rows:
        table.add_row(what, told, found, "same" if ok else "DIFFERS", style=None if ok else "bold red")
    console.print(table)
    for name, value in (("answered", report.answered), ("recomputed", report.recomputed)):
        if value is not None:
            console.print(f"{name}:", style="bold")
            console.print(json.dumps(value, ensure_ascii=False, indent=1), markup=False, highlight=False)
    differ = [what for what, *_, ok in report.rows if not ok]
    console.print("everything is as the receipt says" if report.same else f"differs: {', '.join(differ)}")
