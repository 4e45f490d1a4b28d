"""`metasepia tasks`: task embeddings of a running server."""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from metasepia.shell import (
    POLL_S,
    REFUSED,
    Door,
    Failed,
    add_verb,
    cell,
    examples_of,
    existing,
    quoted,
    show,
    show_fields,
    table,
)

PATH = "/v1/tasks"
_UNFINISHED = ("queued", "running")


def list_tasks(door: Door, options: argparse.Namespace) -> None:
    found = [one for one in door.everything(PATH) if options.kind in (None, one["kind"])]
    columns = ("id", "kind", "status", "method", "num_texts", "expert", "model", "digest")
    show(options, found, lambda: table(columns, [[cell(one[c], c) for c in columns] for one in found]))


def show_task(door: Door, options: argparse.Namespace) -> None:
    show_fields(options, door.json("GET", _path(options.id)))


def add_task(door: Door, options: argparse.Namespace) -> None:
    body: dict[str, Any] = {"examples": examples_of(options.examples)} | _asked(options)
    if options.expert:
        body["expert"] = options.expert
    if options.leave_out_long:
        body["long_texts"] = "leave_out"
    _end(door, options, door.json("POST", PATH, json=body))


def ask_task(door: Door, options: argparse.Namespace) -> None:
    body: dict[str, Any] = {"model": options.model} | _asked(options)
    if options.template is not None:
        prompt: dict[str, Any] = {"template": _template(options.template)}
        if options.labels:
            prompt["labels"] = labels_of(options.labels)
        for name in ("system", "max_tokens"):
            if getattr(options, name) is not None:
                prompt[name] = getattr(options, name)
        body["prompt"] = prompt | ({"chat": False} if options.plain else {})
    _end(door, options, door.json("POST", PATH, json=body))


def nearest_tasks(door: Door, options: argparse.Namespace) -> None:
    params = {"k": options.k} | ({"kind": options.kind} if options.kind else {})
    found = door.json("GET", f"{_path(options.id)}/nearest", params=params)
    rows = [[f"{one['cosine']:.4f}", one["id"], one["kind"], one["expert"] or "-"] for one in found["data"]]
    show(options, found, lambda: table(("cosine", "id", "kind", "expert"), rows))


def compare_tasks(door: Door, options: argparse.Namespace) -> None:
    found = door.json("POST", f"{PATH}/compare", json={"tasks": options.ids})
    rows = [[id_, *(f"{value:.4f}" for value in row)] for id_, row in zip(options.ids, found["cosines"], strict=True)]
    show(options, found, lambda: table(("", *options.ids), rows))


def delete_tasks(door: Door, options: argparse.Namespace) -> None:
    for id_ in options.ids:
        gone = door.json("DELETE", _path(id_))
        show(options, gone, lambda gone=gone: print(f"{gone['id']}: deleted"))


def map_tasks(door: Door, options: argparse.Namespace) -> None:
    params = {"method": options.method} if options.method else {}
    page = door.ask("GET", f"{PATH}/map", params=params).content
    options.out.write_bytes(page)
    show(options, {"file": str(options.out), "bytes": len(page)}, lambda: print(f"{options.out}: {len(page):,} bytes"))


def labels_of(given: list[str]) -> dict[str, str]:
    """LABEL=WORDS, or labels that are their own words. Raises Failed."""
    found: dict[str, str] = {}
    for one in given:
        label, _, words = one.partition("=")
        if not label or label in found:
            raise Failed(f"{one!r} must be LABEL or LABEL=WORDS, each label once", 2)
        found[label] = words or label
    return found


def _end(door: Door, options: argparse.Namespace, task: dict[str, Any]) -> None:
    """Waits for a job, and prints the task's id."""
    told = -1
    while task["status"] in _UNFINISHED and not options.no_wait:
        progress = task["progress"] or {}
        if progress.get("answered", told) != told and not options.json:
            told = progress["answered"]
            print(f"{told} of {progress['of']} texts answered", file=sys.stderr)
        time.sleep(POLL_S)
        task = door.json("GET", _path(task["id"]))
    if task["status"] == "failed":
        raise Failed(f"task {task['id']} failed: {task['error']}", REFUSED)
    waits = f": {task['status']}" if task["status"] in _UNFINISHED else ""
    show(options, task, lambda: print(task["id"] + waits))


def _asked(options: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name in ("name", "method", "seed") if (value := getattr(options, name)) is not None}


def _template(given: str) -> str:
    """The text itself, or after an @ the file that holds it."""
    return existing(Path(given[1:])).read_text() if given.startswith("@") else given


def _path(id_: str) -> str:
    return f"{PATH}/{quoted(id_)}"


def add_parser(things: Any, shared: argparse.ArgumentParser) -> None:
    """The verbs of `metasepia tasks`."""
    verbs = things.add_parser("tasks", help="task embeddings").add_subparsers(required=True)
    kinds = ("data_set", "model", "prompt")
    add_verb(verbs, "list", list_tasks, "all of them", shared).add_argument("--kind", choices=kinds)
    add_verb(verbs, "show", show_task, "one, or how far it is", shared).add_argument("id")
    add = add_verb(verbs, "add", add_task, "embed a data set", shared)
    add.add_argument("examples", type=Path, help='JSON lines of {"text": ..., "label": ...}')
    add.add_argument("--expert", metavar="NAME", help="requests like these texts are for it")
    add.add_argument("--leave-out-long", action="store_true", help="texts longer than the surrogate's window")
    ask = add_verb(verbs, "ask", ask_task, "embed a prompt on a model, or a context, by what it answers", shared)
    ask.add_argument("model", help="<backbone>, <backbone>:<expert>, <backbone>:mix@... or ctx-...")
    ask.add_argument("--template", metavar="TEXT", help="with {text} in it once; @FILE reads a file")
    ask.add_argument("--labels", nargs="+", metavar="LABEL[=WORDS]", help="open replies where not given")
    ask.add_argument("--system", metavar="TEXT")
    ask.add_argument("--max-tokens", type=int, metavar="N", help="of an open reply")
    ask.add_argument("--plain", action="store_true", help="the template as it is, not as a chat")
    for one in (add, ask):
        one.add_argument("--name", help="task-<digest> where not given")
        one.add_argument("--method", choices=("agreement", "prefix", "fisher"))
        one.add_argument("--seed", type=int, metavar="N")
        one.add_argument("--no-wait", action="store_true", help="print a job's id instead of waiting for its end")
    one = add_verb(verbs, "nearest", nearest_tasks, "the tasks most like one", shared)
    one.add_argument("id")
    one.add_argument("-k", type=int, default=10, metavar="N", help="how many (%(default)s)")
    one.add_argument("--kind", choices=kinds)
    one = add_verb(verbs, "compare", compare_tasks, "cosines of tasks with one another", shared)
    one.add_argument("ids", nargs="+", metavar="id")
    one = add_verb(verbs, "delete", delete_tasks, "take names away, and end their jobs", shared)
    one.add_argument("ids", nargs="+", metavar="id")
    one = add_verb(verbs, "map", map_tasks, "write a page that shows them all", shared)
    one.add_argument("--out", type=Path, default=Path("tasks.html"), metavar="FILE", help="%(default)s")
    one.add_argument("--method", choices=("agreement", "prefix", "fisher"))
