"""Task embeddings: do they know the same task again, say what transfers and which prompt is good, and what they cost.

    python -m benchmarks.task_embeddings --data DIR --json benchmarks/results/task_embeddings.json
    python -m benchmarks.task_embeddings --data DIR --parts same-task --methods agreement

`--data`: a folder of Parquet files with text, label_name (or label) and perhaps split; sets are known by their files'
names (`task_embeddings_tasks`). What was computed is kept under `--runs`, so that a benchmark that was killed goes on.
Nothing is chosen on the tasks that are reported: `--dev` shows the others, on which settings were chosen.
"""

import dataclasses
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from benchmarks import report
from benchmarks.task_embeddings_prompts import prompts
from benchmarks.task_embeddings_same_task import same_task
from benchmarks.task_embeddings_speed import speed
from benchmarks.task_embeddings_transfer import transfer
from benchmarks.task_embeddings_vectors import METHODS, Bench
from benchmarks.warm_start import warm_start

Part = Callable[[Bench, Namespace], Sequence[report.Row]]
PARTS: Mapping[str, Part] = {
    "same-task": same_task,
    "transfer": transfer,
    "prompts": prompts,
    "speed": speed,
    "warm-start": warm_start,
}


def _parse(arguments: Sequence[str] | None) -> Namespace:
    parser = report.parser(__doc__)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="directory of Parquet files")
    add("--runs", type=Path, default=Path("runs/task_embeddings"), help="where what was computed is kept")
    add("--home", type=Path, default=Path(".metasepia"), help="where prepared weights and text vectors are kept")
    report.add_parts(parser, PARTS)
    add("--methods", default=",".join(METHODS), help="separated by commas")
    add("--probes", type=int, default=256, help="shipped probe texts, the first so many")
    add("--only", help="same-task: families, separated by commas; all without")
    add("--no-prompts", dest="prompts", action="store_false", help="same-task: without SmolLM2")
    add("--dev", action="store_true", help="the tasks that settings were chosen on, in place of those reported")
    add("--speed-prompts", type=int, default=4, help="speed: wordings of each data set")
    add("--speed-texts", type=int, default=64, help="speed: texts that a prompt answers")
    add("--speed-rounds", type=int, default=3, help="speed: turns that both sides take")
    options = parser.parse_args(arguments)
    options.methods = tuple(one for one in options.methods.split(",") if one)
    if unknown := sorted(set(options.methods).difference(METHODS)):
        parser.error(f"no method {', '.join(unknown)}; methods: {', '.join(METHODS)}")
    options.only = options.only.split(",") if options.only else None
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parse(arguments)
    torch.set_num_threads(1)
    started_on = report.machine()
    bench = Bench(options.home, options.runs, options.probes, options.methods)
    for part in options.parts:
        rows = report.rows_of({part: partial(PARTS[part], bench)}, Namespace(**{**vars(options), "parts": [part]}))
        rows = [dataclasses.replace(row, part=part) for row in rows]
        report.publish("task_embeddings", rows, json_file=options.json, started_on=started_on)


if __name__ == "__main__":
    main()
