"""`metasepia mixtures`: weights on experts, and searches for them."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metasepia.shell import (
    MISUSE,
    REFUSED,
    Failed,
    add_noun,
    add_verb,
    given,
    json_file,
    json_lines,
    show,
    show_fields,
    show_list,
    table,
)

if TYPE_CHECKING:
    import metasepia.client.results


def list_mixtures(client: "metasepia.client.Client", options: argparse.Namespace) -> None:
    found = client.mixtures()
    rows = [[one.id, one.backbone or "-", ", ".join(one.experts or ()), one.owner or "-"] for one in found]
    show(options, [one.raw for one in found], lambda: table(("id", "backbone", "experts", "owner"), rows))


def show_mixture(client: "metasepia.client.Client", options: argparse.Namespace) -> None:
    show_fields(options, client.mixture(options.id).raw)


def add_mixture(client: "metasepia.client.Client", options: argparse.Namespace) -> None:
    weights: dict[str, Any] = json_file(options.weights_file) if options.weights_file else {}
    for one in options.weights:
        name, _, number = one.partition("=")
        try:
            if not name or name in weights:
                raise ValueError(one)
            weights[name] = float(number)
        except ValueError:
            raise Failed(f"{one!r} must be EXPERT=WEIGHT, each expert once", MISUSE) from None
    made = client.create_mixture(weights, backbone=options.backbone, name=options.name)
    show(options, made.raw, lambda: print(made.model))


def delete_mixture(client: "metasepia.client.Client", options: argparse.Namespace) -> None:
    gone = client.delete_mixture(options.id)
    show(options, gone.raw, lambda: print(f"{gone.id}: deleted"))


def search_mixture(client: "metasepia.client.Client", options: argparse.Namespace) -> None:
    asked: Any = given(options, "shots", "population", "generations", "seed", "score", "match")
    asked |= {"experts": options.experts.split(",")} if options.experts else {}
    asked |= {"per_layer": True} if options.per_layer else {}
    asked |= {"base": False} if options.no_base else {}
    if options.start is not None:
        asked["start"] = options.start if options.start in ("uniform", "nearest") else {"task": options.start}
    found = client.create_search(json_lines(options.examples), backbone=options.backbone, **asked)
    if not options.no_wait:
        found = client.wait_for_search(found, tell=_teller(options))
    _end(options, found)


def wait_for_search(client: "metasepia.client.Client", options: argparse.Namespace) -> None:
    _end(options, client.wait_for_search(options.id, tell=_teller(options)))


def list_searches(client: "metasepia.client.Client", options: argparse.Namespace) -> None:
    found = [one.raw for one in client.searches()]
    show_list(options, found, ("id", "status", "generations", "evaluations", "backbone", "score"))


def cancel_search(client: "metasepia.client.Client", options: argparse.Namespace) -> None:
    found = client.cancel_search(options.id)
    show(options, found.raw, lambda: print(f"{found.id}: {found.status}"))


def draw_search(client: "metasepia.client.Client", options: argparse.Namespace) -> None:
    picture = client.search_picture(options.id)
    options.out.write_bytes(picture)
    about = {"file": str(options.out), "bytes": len(picture)}
    show(options, about, lambda: print(f"{options.out}: {len(picture):,} bytes"))


def _teller(options: argparse.Namespace) -> Any:
    told = 0

    def tell(search: "metasepia.client.results.Search") -> None:
        nonlocal told
        if search.generations > told and not options.json:
            told = search.generations
            best = (search.best or {}).get("value")
            shown = "" if best is None else f", best {search.score or 'likelihood'} {best:.4f}"
            print(f"generation {told} of at most {search.max_generations}{shown}", file=sys.stderr)

    return tell


def _end(options: argparse.Namespace, found: "metasepia.client.results.Search") -> None:
    if found.status in ("failed", "cancelled"):
        raise Failed(f"search {found.id} {found.status}: {found.error or 'nothing was registered'}", REFUSED)
    result = found.result
    words = f"{found.id}: {found.status}" if result is None else result["model"]
    show(options, found.raw, lambda: print(words))


def add_verbs(things: Any, shared: argparse.ArgumentParser) -> None:
    """The verbs of `metasepia mixtures`."""
    verbs = add_noun(things, "mixtures", "weights on experts, and searches for them")
    add_verb(verbs, "list", list_mixtures, "all of them", shared)
    add_verb(verbs, "show", show_mixture, "one, with its card", shared).add_argument("id", help="digest or name")
    one = add_verb(verbs, "add", add_mixture, "register weights that sum to one", shared)
    one.add_argument("weights", nargs="*", metavar="EXPERT=WEIGHT", help="`base` is the backbone itself")
    one.add_argument("--weights-file", type=Path, metavar="FILE", help="JSON: a number, or one a layer, by expert")
    one.add_argument("--backbone", required=True, metavar="ID")
    one.add_argument("--name")
    add_verb(verbs, "delete", delete_mixture, "take one away", shared).add_argument("id", help="digest or name")
    one = add_verb(verbs, "search", search_mixture, "find one by a few examples of a task", shared)
    one.add_argument("examples", type=Path, help='JSON lines of {"prompt": ..., "answer": ...}; or messages')
    one.add_argument("--backbone", required=True, metavar="ID")
    one.add_argument("--experts", metavar="A,B", help="candidates; all of the backbone's where not given")
    one.add_argument("--no-base", action="store_true", help="without the backbone itself among the candidates")
    one.add_argument("--per-layer", action="store_true", help="weights for each layer by itself")
    one.add_argument("--score", choices=("likelihood", "accuracy"))
    one.add_argument("--match", help="when an answer is right, for --score accuracy")
    for name in ("shots", "population", "generations", "seed"):
        one.add_argument(f"--{name}", type=int, metavar="N")
    one.add_argument("--start", help="uniform (default), nearest, or a registered task near whose experts it begins")
    one.add_argument("--no-wait", action="store_true", help="print the job's id instead of its result")
    add_verb(verbs, "searches", list_searches, "searches, the newest first", shared)
    add_verb(verbs, "wait", wait_for_search, "for a search's end", shared).add_argument("id")
    add_verb(verbs, "cancel", cancel_search, "end a search; it keeps what it has", shared).add_argument("id")
    one = add_verb(verbs, "picture", draw_search, "write a search's scores and weights by generation", shared)
    one.add_argument("id")
    one.add_argument("--out", type=Path, default=Path("search.svg"), metavar="FILE", help="%(default)s")
