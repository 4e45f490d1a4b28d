"""What a run leaves beside its embeddings: the map of tasks and report.json."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jobs.embedding.running import Run
from metasepia.embedding.space import TaskEmbedding
from metasepia.embedding.task_map import MAX_POINTS, points_of, render

MAP, REPORT = "map.html", "report.json"
FORMAT = 1


def write_results(run: Run) -> list[str]:
    """The embeddings of each method, the map and the report; returns where, embeddings first."""
    paths: list[str] = []
    spaces: list[dict[str, Any]] = []
    several = len(run.spec.methods) > 1
    for name, found in run.embedded.items():
        if not found:
            continue
        file = f"embeddings-{name}.parquet" if several else "embeddings.parquet"
        paths.append(run.files.write_embeddings(file, found))
        spaces.append({"method": name, "space": found[0].space.digest, "file": file, "count": len(found)})
    shown = [one for found in run.embedded.values() for one in found]
    if shown:
        run.files.write(MAP, _map(run, shown).encode())
        paths.append(run.files.path_of(MAP))
    report = report_of(run, spaces)
    run.files.write(REPORT, json.dumps(report, indent=2, ensure_ascii=False).encode() + b"\n")
    return [*paths, run.files.path_of(REPORT)]


def report_of(run: Run, spaces: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What became of every task, and what it took. `this_run` alone differs from run to run."""
    return {
        "format": FORMAT,
        "title": run.spec.title,
        "specification": run.spec.digest,
        "probes": {"digest": run.spec.probes.digest, "texts": len(run.spec.probes)},
        "spaces": list(spaces),
        "tasks": [_told(run, task.name, task.kind) for task in run.tasks],
        "this_run": {
            "tasks_answered_before": run.num_kept,
            "texts_asked": run.texts_asked,
            "tokens": run.tokens,
            "cost": run.meter.cost,
            "wall_s": round(run.wall_s, 3),
        },
    }


def problems(run: Run) -> dict[str, str]:
    """Why there is no embedding, by task, in the tasks' order; where methods differ, by method."""
    found: dict[str, str] = {}
    for task in run.tasks:
        words = {
            run.refused[method, task.name]: method for method in run.embedded if (method, task.name) in run.refused
        }
        if task.name in run.failed:
            found[task.name] = run.failed[task.name]
        elif words:
            one = len(run.embedded) == 1
            found[task.name] = "; ".join(why if one else f"{method}: {why}" for why, method in words.items())
    return found


def _told(run: Run, name: str, kind: str) -> dict[str, Any]:
    answered = run.answered.get(name)
    why = problems(run).get(name)
    told: dict[str, Any] = {"name": name, "kind": kind, "status": "embedded" if why is None else "failed"}
    if why is not None:
        told["why"] = why
    if answered is not None:
        answers = answered.answers
        told |= {"texts": answers.num_texts, "labels": list(answers.labels), "answers": answers.digest}
        told |= {"notes": list(answers.notes)} if answers.notes else {}
    return told


def _map(run: Run, shown: Sequence[TaskEmbedding]) -> str:
    notes: list[str] = []
    if len(shown) > MAX_POINTS:
        step = len(shown) / MAX_POINTS
        notes.append(f"{MAX_POINTS:,} of {len(shown):,} embeddings are shown, evenly spaced.")
        shown = [shown[int(place * step)] for place in range(MAX_POINTS)]
    return render(points_of(shown), run.spec.title, notes=notes)
