"""`metasepia experts`: expert vectors and LoRA adapters of a running server."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metasepia.shell import add_noun, add_verb, show, show_fields, show_list

if TYPE_CHECKING:
    import metasepia.client.results


def list_experts(client: "metasepia.client.Client", options: argparse.Namespace) -> None:
    found = [one.raw for one in client.experts()]
    show_list(options, found, ("id", "model", "form", "rank", "parameters", "owner", "digest"))


def show_expert(client: "metasepia.client.Client", options: argparse.Namespace) -> None:
    show_fields(options, client.expert(options.name).raw)


def add_expert(client: "metasepia.client.Client", options: argparse.Namespace) -> None:
    _show(options, client.add_expert(options.name, options.path, backbone=options.backbone, card=options.card))


def replace_expert(client: "metasepia.client.Client", options: argparse.Namespace) -> None:
    _show(options, client.replace_expert(options.name, options.path, backbone=options.backbone, card=options.card))


def _show(options: argparse.Namespace, made: "metasepia.client.results.Expert") -> None:
    show(options, made.raw, lambda: print(f"{made.model or made.id}: {made.form}, digest {made.digest}"))


def delete_expert(client: "metasepia.client.Client", options: argparse.Namespace) -> None:
    for name in options.names:
        gone = client.delete_expert(name)
        show(options, gone.raw, lambda gone=gone: print(f"{gone.id}: deleted"))


def download_expert(client: "metasepia.client.Client", options: argparse.Namespace) -> None:
    out: Path = options.out or Path(options.name)
    shown = client.download_expert(options.name, out)
    show(options, shown.raw, lambda: print(f"{out}: {shown.bytes:,} bytes, digest {shown.digest}"))


def add_verbs(things: Any, shared: argparse.ArgumentParser) -> None:
    """The verbs of `metasepia experts`."""
    verbs = add_noun(things, "experts", "expert vectors and LoRA adapters")
    add_verb(verbs, "list", list_experts, "all of them", shared)
    add_verb(verbs, "show", show_expert, "one, with its card", shared).add_argument("name", help="or a digest")
    for verb, run, about in (
        ("add", add_expert, "register one under a new name"),
        ("replace", replace_expert, "register one under a name, new or in use"),
    ):
        one = add_verb(verbs, verb, run, about, shared)
        one.add_argument("name")
        one.add_argument("path", type=Path, help="expert.safetensors, a directory with one, or a PEFT LoRA directory")
        one.add_argument("--backbone", metavar="ID", help="a PEFT directory's, where the server has several")
        one.add_argument("--card", type=Path, metavar="FILE", help="JSON; a directory's card.json where not given")
    one = add_verb(verbs, "delete", delete_expert, "take names away", shared)
    one.add_argument("names", nargs="+", metavar="name")
    one = add_verb(verbs, "download", download_expert, "write its file and card to a directory", shared)
    one.add_argument("name", help="or a digest")
    one.add_argument("--out", type=Path, metavar="DIR", help="a directory of the expert's name where not given")
