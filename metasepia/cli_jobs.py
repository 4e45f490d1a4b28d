"""`metasepia jobs`: what the server's Ray jobs do."""

import argparse
from typing import TYPE_CHECKING, Any

from metasepia.shell import add_noun, add_verb, show_fields, show_list

if TYPE_CHECKING:
    import metasepia.client.results


def list_jobs(client: "metasepia.client.Client", options: argparse.Namespace) -> None:
    show_list(options, [one.raw for one in client.jobs()], ("id", "name", "status", "created", "message"))


def show_job(client: "metasepia.client.Client", options: argparse.Namespace) -> None:
    show_fields(options, client.job(options.id).raw)


def add_verbs(things: Any, shared: argparse.ArgumentParser) -> None:
    """The verbs of `metasepia jobs`."""
    verbs = add_noun(things, "jobs", "Ray jobs of the server's cluster")
    add_verb(verbs, "list", list_jobs, "all of them", shared)
    add_verb(verbs, "show", show_job, "one, with its progress", shared).add_argument("id")
