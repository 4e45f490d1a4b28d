"""`metasepia contexts`: classifiers made of labelled examples, kept under a name."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metasepia import cli_sheets
from metasepia.shell import add_noun, add_verb, given, show, show_fields, show_list

if TYPE_CHECKING:
    import metasepia.client.results


def list_contexts(client: "metasepia.client.Client", options: argparse.Namespace) -> None:
    found = [one.raw for one in client.contexts()]
    show_list(options, found, ("id", "input", "num_examples", "encoder", "module", "usable"))


def show_context(client: "metasepia.client.Client", options: argparse.Namespace) -> None:
    show_fields(options, client.context(options.id).info.raw)


def create_context(client: "metasepia.client.Client", options: argparse.Namespace) -> None:
    examples = cli_sheets.examples(options.examples, options.text, options.label)
    unlabelled = None if options.unlabelled is None else cli_sheets.read(options.unlabelled).texts(options.text)
    made = client.create_context(
        examples, unlabelled=unlabelled, **given(options, "encoder", "module", "protocol", "seed")
    )
    _show(options, made)


def extend_context(client: "metasepia.client.Client", options: argparse.Namespace) -> None:
    _show(
        options, client.extend_context(options.id, cli_sheets.examples(options.examples, options.text, options.label))
    )


def _show(options: argparse.Namespace, made: "metasepia.client.Context[Any]") -> None:
    check = made.info.self_check
    said = "" if check is None else f", {check.accuracy:.1%} right on its own examples ({check.method})"
    about = f"{made.info.num_examples} examples of {', '.join(made.info.classes)}{said}"
    show(options, made.info.raw, lambda: print(f"{made.id}\n{about}"))


def list_examples(client: "metasepia.client.Client", options: argparse.Namespace) -> None:
    show_list(options, client.context_examples(options.id), ("example", "label", "text"))


def delete_contexts(client: "metasepia.client.Client", options: argparse.Namespace) -> None:
    for id_ in options.ids:
        gone = client.delete_context(id_)
        show(options, gone.raw, lambda gone=gone: print(f"{gone.id}: deleted"))


def add_verbs(things: Any, shared: argparse.ArgumentParser) -> None:
    """The verbs of `metasepia contexts`."""
    verbs = add_noun(things, "contexts", "classifiers made of labelled examples")
    add_verb(verbs, "list", list_contexts, "all of them", shared)
    add_verb(verbs, "show", show_context, "one of them", shared).add_argument("id")
    create = add_verb(verbs, "create", create_context, "make one; the same examples are the same context", shared)
    extend = add_verb(verbs, "extend", extend_context, "another one: more examples beside those of an old one", shared)
    extend.add_argument("id")
    for one in (create, extend):
        one.add_argument(
            "examples", type=Path, help="CSV, JSONL or Parquet with columns of texts and labels; - is stdin"
        )
        one.add_argument("--text", default="text", metavar="COLUMN", help="of the texts (%(default)s)")
        one.add_argument("--label", default="label", metavar="COLUMN", help="of the labels (%(default)s)")
    create.add_argument("--unlabelled", type=Path, metavar="FILE", help="texts without labels")
    add_context_options(create)
    add_verb(verbs, "examples", list_examples, "its examples, numbered", shared).add_argument("id")
    one = add_verb(verbs, "delete", delete_contexts, "take some away", shared)
    one.add_argument("ids", nargs="+", metavar="id")


def add_context_options(to: "argparse._ActionsContainer") -> None:
    to.add_argument("--encoder", metavar="ID", help="an encoder's or a backbone's; the first where not given")
    to.add_argument("--module", metavar="NAME", help="a reasoning module's; the first where not given")
    to.add_argument("--protocol", choices=("stream", "vanilla", "loo"), help="how texts become vectors")
    to.add_argument("--seed", type=int, metavar="N")
