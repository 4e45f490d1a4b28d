"""Writes the README's table of figures from benchmarks/results/*.json: `python -m benchmarks.table [--check]`."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"


def render(folder: Path = ROOT / "benchmarks/results") -> str:
    """One Markdown table a command, the command that prints it above; rows marked as detail stay in the JSON."""
    parts = []
    for path in sorted(folder.glob("*.json")):
        document = json.loads(path.read_text())
        runs: dict[tuple[str, str], list[dict[str, Any]]] = {}  # by command and machine
        for row in document["rows"]:
            run = document["parts"][row["part"]] if row.get("part") else document
            if not row.get("detail"):
                runs.setdefault((run["command"], _where(run["machine"])), []).append(row)
        for (command, where), rows in runs.items():
            lines = [f"`{command}` (on: {where})", "", "| what | ours | against | ratio | unit | note |"]
            lines += ["| --- | ---: | ---: | ---: | --- | --- |"]
            for row in rows:
                numbers = ("" if row[k] is None else f"{row[k]:.3g}" for k in ("ours", "against", "ratio"))
                lines.append(f"| {row['what']} | {' | '.join(numbers)} | {row['unit']} | {row['note']} |")
            parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _where(machine: dict[str, Any]) -> str:
    return ", ".join(str(machine[k]) for k in ("accelerator", "cpu", "cores") if k in machine) + " cores"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether the README is up to date")
    check = parser.parse_args().check
    readme = ROOT / "README.md"
    text = readme.read_text()
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    made = f"{before}{BEGIN}\n{render()}\n{END}{after}"
    if check and made != text:
        sys.exit("the README's figures differ from benchmarks/results; run python -m benchmarks.table")
    if not check:
        readme.write_text(made)


if __name__ == "__main__":
    main()
