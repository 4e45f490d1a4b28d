"""Writes the README's table of figures from benchmarks/results/*.json: `python -m benchmarks.table [--check]`."""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"


def render() -> str:
    """One Markdown table a benchmark, the command that prints it above."""
    parts = []
    for path in sorted((ROOT / "benchmarks/results").glob("*.json")):
        document = json.loads(path.read_text())
        machine = document["machine"]
        where = ", ".join(str(machine[k]) for k in ("accelerator", "cpu", "cores") if k in machine)
        lines = [f"`{document['command']}` (on: {where} cores)", "", "| what | ours | against | ratio | unit | note |"]
        lines += ["| --- | ---: | ---: | ---: | --- | --- |"]
        for row in document["rows"]:
            numbers = ("" if row[k] is None else f"{row[k]:.3g}" for k in ("ours", "against", "ratio"))
            lines.append(f"| {row['what']} | {' | '.join(numbers)} | {row['unit']} | {row['note']} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


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
