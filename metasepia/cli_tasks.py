"""`metasepia tasks`: task embeddings of a running server."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metasepia import cli_sheets
from metasepia.shell import (
    MISUSE,
    REFUSED,
    Failed,
    add_noun,
    add_verb,
    given,
    show,
    show_fields,
    show_list,
    table,
    text_of,
)

if TYPE_CHECKING:
    import metasepia.client.results


def list_tasks(client: "metasepia.client.Client", options: argparse.Namespace) -> None:
    found = [one.raw for one in client.tasks(kind=options.kind)]
    show_list(options, found, ("id", "kind", "status", "method", "num_texts", "expert", "model", "digest"))


def show_task(client: "metasepia.client.Client", options: argparse.Namespace) -> None:
    show_fields(options, client.task(options.id).raw)


def add_task(client: "metasepia.client.Client", options: argparse.Namespace) -> None:
    asked: Any = given(options, "name", "method", "seed", "expert")
    asked |= {"long_texts": "leave_out"} if options.leave_out_long else {}
    examples = cli_sheets.examples(options.examples, options.text, options.label)
    _end(client, options, client.create_task(examples=examples, **asked))


def ask_task(client: "metasepia.client.Client", options: argparse.Namespace) -> None:
    prompt: dict[str, Any] | None = None
    if options.template is not None:
        prompt = {"template": _template(options.template)} | given(options, "system", "max_tokens")
        prompt |= {"labels": labels_of(options.labels)} if options.labels else {}
        prompt |= {"chat": False} if options.plain else {}
    asked: Any = given(options, "name", "method", "seed")
    _end(client, options, client.create_task(model=options.model, prompt=prompt, **asked))


def nearest_tasks(client: "metasepia.client.Client", options: argparse.Namespace) -> None:
    found = client.nearest_tasks(options.id, k=options.k, kind=options.kind)
    rows = [[f"{one.cosine:.4f}", one.id, one.kind, one.expert or "-"] for one in found]
    show(options, [one.raw for one in found], lambda: table(("cosine", "id", "kind", "expert"), rows))


def compare_tasks(client: "metasepia.client.Client", options: argparse.Namespace) -> None:
    found = client.compare_tasks(options.ids)
    rows = [[id_, *(f"{value:.4f}" for value in row)] for id_, row in zip(options.ids, found.cosines, strict=True)]
    show(options, found.raw, lambda: table(("", *options.ids), rows))


def delete_tasks(client: "metasepia.client.Client", options: argparse.Namespace) -> None:
    for id_ in options.ids:
        gone = client.delete_task(id_)
        show(options, gone.raw, lambda gone=gone: print(f"{gone.id}: deleted"))


def map_tasks(client: "metasepia.client.Client", options: argparse.Namespace) -> None:
    page = client.task_map(method=options.method)
    options.out.write_bytes(page)
    show(options, {"file": str(options.out), "bytes": len(page)}, lambda: print(f"{options.out}: {len(page):,} bytes"))


def labels_of(labels: list[str]) -> dict[str, str]:
    """LABEL=WORDS, or labels that are their own words. Raises Failed."""
    found: dict[str, str] = {}
    for one in labels:
        label, _, words = one.partition("=")
        if not label or label in found:
            raise Failed(f"{one!r} must be LABEL or LABEL=WORDS, each label once", MISUSE)
        found[label] = words or label
    return found


def _end(client: "metasepia.client.Client", options: argparse.Namespace, task: "metasepia.client.results.Task") -> None:
    """Waits for a job, and prints the task's id."""
    told = -1

    def tell(task: "metasepia.client.results.Task") -> None:
        nonlocal told
        progress = task.progress or {}
        if progress.get("answered", told) != told and not options.json:
            told = progress["answered"]
            print(f"{told} of {progress['of']} texts answered", file=sys.stderr)

    if not options.no_wait:
        task = client.wait_for_task(task, tell=tell)
    if task.status == "failed":
        raise Failed(f"task {task.id} failed: {task.error}", REFUSED)
    show(options, task.raw, lambda: print(task.id + ("" if task.is_over else f": {task.status}")))


def _template(text: str) -> str:
    """The text itself, or after an @ the file that holds it."""
    return text_of(Path(text[1:])) if text.startswith("@") else text


def add_verbs(things: Any, shared: argparse.ArgumentParser) -> None:
    """The verbs of `metasepia tasks`."""
    verbs = add_noun(things, "tasks", "task embeddings")
    kinds = ("data_set", "model", "prompt")
    add_verb(verbs, "list", list_tasks, "all of them", shared).add_argument("--kind", choices=kinds)
    add_verb(verbs, "show", show_task, "one, or how far it is", shared).add_argument("id")
    add = add_verb(verbs, "add", add_task, "embed a data set", shared)
    add.add_argument("examples", type=Path, help="JSONL, CSV or Parquet with columns of texts and labels")
    add.add_argument("--text", default="text", metavar="COLUMN", help="of the texts (%(default)s)")
    add.add_argument("--label", default="label", metavar="COLUMN", help="of the labels (%(default)s)")
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
