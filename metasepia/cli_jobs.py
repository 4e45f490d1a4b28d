"""`metasepia jobs`: what is under way at the server: Ray jobs, searches, task embeddings."""

import argparse
import sys
import time
from typing import TYPE_CHECKING, Any

from metasepia.shell import add_noun, add_verb, show, show_fields, table

if TYPE_CHECKING:
    import metasepia.client


def list_jobs(client: "metasepia.client.Client", options: argparse.Namespace) -> None:
    found = client.json("GET", "/v1/jobs", params={"limit": 200, "kind": options.kind})
    rows = [[one["id"], one["kind"], one["name"], one["status"], _progress(one), _when(one)] for one in found["data"]]
    show(options, found["data"], lambda: table(("id", "kind", "name", "status", "progress", "since"), rows))
    ray = found.get("ray") or {}
    if not ray.get("available", True):
        print(f"Ray jobs are not among them: {ray.get('reason')}", file=sys.stderr)


def show_job(client: "metasepia.client.Client", options: argparse.Namespace) -> None:
    show_fields(options, client.job(options.id).raw)


def _progress(job: dict[str, Any]) -> str:
    progress = job.get("progress")
    return "-" if progress is None else f"{progress['done']:,} of {progress['total']:,}"


def _when(job: dict[str, Any]) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(job["created_unix_s"]))


def add_verbs(things: Any, shared: argparse.ArgumentParser) -> None:
    """The verbs of `metasepia jobs`."""
    verbs = add_noun(things, "jobs", "what is under way: Ray jobs, searches, task embeddings")
    one = add_verb(verbs, "list", list_jobs, "all of them, the newest first", shared)
    one.add_argument("--kind", choices=("ray", "search", "task"))
    add_verb(verbs, "show", show_job, "one, with its progress", shared).add_argument("id")
