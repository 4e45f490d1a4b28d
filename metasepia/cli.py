"""`metasepia`: experts, mixtures and task embeddings of a running server, from a shell.

    metasepia experts list
    metasepia experts add maths path/to/directory --card about.json
    metasepia mixtures add maths=0.25 law=0.75 --backbone smollm2-135m --name both
    metasepia mixtures search examples.jsonl --backbone smollm2-135m
    metasepia tasks add reviews.jsonl --name reviews
    metasepia tasks nearest reviews

What the server refuses is printed in its own words, and the exit status says of what kind it was: 1 refused, 2 misuse,
3 unknown or deleted, 4 try again later (busy, being rebuilt, out of time), 5 nobody answers there.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from metasepia import cli_tasks
from metasepia.shell import (
    POLL_S,
    REFUSED,
    URL,
    Door,
    Failed,
    add_verb,
    cell,
    examples_of,
    existing,
    json_file,
    quoted,
    show,
    show_fields,
    table,
)

_FILE, _CARD = "expert.safetensors", "card.json"
_PEFT_FILE, _PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"


# -- experts -----------------------------------------------------------------------------------------------------------


def list_experts(door: Door, options: argparse.Namespace) -> None:
    found = door.everything("/v1/experts")
    columns = ("id", "model", "form", "rank", "parameters", "owner", "digest")
    show(options, found, lambda: table(columns, [[cell(one[c], c) for c in columns] for one in found]))


def show_expert(door: Door, options: argparse.Namespace) -> None:
    show_fields(options, door.json("GET", f"/v1/experts/{quoted(options.name)}"))


def add_expert(door: Door, options: argparse.Namespace) -> None:
    _send(door, options, "POST", "/v1/experts")


def replace_expert(door: Door, options: argparse.Namespace) -> None:
    _send(door, options, "PUT", f"/v1/experts/{quoted(options.name)}")


def _send(door: Door, options: argparse.Namespace, method: str, path: str) -> None:
    fields = {} if method == "PUT" else {"name": options.name}
    if options.backbone:
        fields["backbone"] = options.backbone
    files = {part: file.open("rb") for part, file in parts_of(options.path, options.card).items()}
    try:
        made = door.json(method, path, data=fields, files=files)
    finally:
        for file in files.values():
            file.close()
    show(options, made, lambda: print(f"{made['model'] or made['id']}: {made['form']}, digest {made['digest']}"))


def parts_of(path: Path, card: Path | None) -> dict[str, Path]:
    """The files to send: of an expert's directory, of PEFT's, or one file. Raises Failed where there is none."""
    parts: dict[str, Path] = {}
    if path.is_dir() and (path / _FILE).is_file():
        parts["file"] = path / _FILE
        if (path / _CARD).is_file():
            parts["card"] = path / _CARD
    elif path.is_dir():
        for part, name in (("file", _PEFT_FILE), ("config", _PEFT_CONFIG)):
            if not (path / name).is_file():
                pickled = (
                    " (adapter_model.bin is pickled and not read)" if (path / "adapter_model.bin").exists() else ""
                )
                needs = f"{_FILE}, or {_PEFT_FILE} and {_PEFT_CONFIG}{pickled}"
                raise Failed(f"{path} holds no {name}; a directory needs {needs}", REFUSED)
            parts[part] = path / name
    elif path.is_file():
        parts["file"] = path
    else:
        raise Failed(f"{path} does not exist", REFUSED)
    return parts if card is None else parts | {"card": existing(card)}


def delete_expert(door: Door, options: argparse.Namespace) -> None:
    for name in options.names:
        gone = door.json("DELETE", f"/v1/experts/{quoted(name)}")
        show(options, gone, lambda gone=gone: print(f"{gone['id']}: deleted"))


def download_expert(door: Door, options: argparse.Namespace) -> None:
    shown = door.json("GET", f"/v1/experts/{quoted(options.name)}")
    blob = door.ask("GET", f"/v1/experts/{shown['digest']}/content").content
    out: Path = options.out or Path(options.name)
    out.mkdir(parents=True, exist_ok=True)
    (out / _FILE).write_bytes(blob)
    (out / _CARD).write_text(json.dumps(shown["card"], indent=1, ensure_ascii=False) + "\n")
    show(options, shown, lambda: print(f"{out / _FILE}: {len(blob):,} bytes, digest {shown['digest']}"))


# -- mixtures ----------------------------------------------------------------------------------------------------------


def list_mixtures(door: Door, options: argparse.Namespace) -> None:
    found = door.everything("/v1/mixtures")
    rows = [[one["id"], one["backbone"] or "-", ", ".join(one["experts"] or ()), one["owner"]] for one in found]
    show(options, found, lambda: table(("id", "backbone", "experts", "owner"), rows))


def show_mixture(door: Door, options: argparse.Namespace) -> None:
    show_fields(options, door.json("GET", f"/v1/mixtures/{quoted(options.id)}"))


def add_mixture(door: Door, options: argparse.Namespace) -> None:
    weights = json_file(options.weights_file) if options.weights_file else {}
    for given in options.weights:
        name, equals, number = given.partition("=")
        try:
            weight = float(number)
        except ValueError:
            equals = ""
        if not equals or name in weights:
            raise Failed(f"{given!r} must be EXPERT=WEIGHT, each expert once", 2)
        weights[name] = weight  # pyright: ignore[reportPossiblyUnboundVariable]
    body = {"backbone": options.backbone, "weights": weights} | ({"name": options.name} if options.name else {})
    made = door.json("POST", "/v1/mixtures", json=body)
    show(options, made, lambda: print(made["model"]))


def delete_mixture(door: Door, options: argparse.Namespace) -> None:
    gone = door.json("DELETE", f"/v1/mixtures/{quoted(options.id)}")
    show(options, gone, lambda: print(f"{gone['id']}: deleted"))


def search_mixture(door: Door, options: argparse.Namespace) -> None:
    body: dict[str, Any] = {"backbone": options.backbone, "examples": examples_of(options.examples)}
    for name in ("shots", "population", "generations", "seed", "score", "match"):
        if getattr(options, name) is not None:
            body[name] = getattr(options, name)
    if options.experts:
        body["experts"] = options.experts.split(",")
    body |= {"per_layer": True} if options.per_layer else {}
    body |= {"base": False} if options.no_base else {}
    if options.start is not None:
        body["start"] = options.start if options.start in ("uniform", "nearest") else {"task": options.start}
    job = door.json("POST", "/v1/mixtures/search", json=body)
    told = 0
    while job["status"] in ("queued", "running") and not options.no_wait:
        if job["generations"] > told and not options.json:
            told = job["generations"]
            best = (job["best"] or {}).get("value")
            shown = "" if best is None else f", best {options.score or 'likelihood'} {best:.4f}"
            print(f"generation {told} of at most {job['max_generations']}{shown}", file=sys.stderr)
        time.sleep(POLL_S)
        job = door.json("GET", f"/v1/mixtures/search/{job['id']}")
    if job["status"] in ("failed", "cancelled"):
        raise Failed(f"search {job['id']} {job['status']}: {job['error'] or 'nothing was registered'}", REFUSED)
    done = job["result"] is not None
    show(options, job, lambda: print(job["result"]["model"] if done else f"{job['id']}: {job['status']}"))


# -- the shell ---------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        options.run(Door(options.url, options.timeout), options)
    except Failed as failed:
        print(f"metasepia: {failed.message}", file=sys.stderr)
        return failed.status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # a pager that was left
        sys.stdout = None
        return 0
    return 0


def parser() -> argparse.ArgumentParser:
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--json", action="store_true", help="print the server's answer as it is")
    top = argparse.ArgumentParser(
        prog="metasepia", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    top.add_argument("--url", default=os.environ.get("METASEPIA_URL", URL), help="also METASEPIA_URL (%(default)s)")
    top.add_argument("--timeout", type=_seconds, default=120.0, metavar="S", help="seconds a request (%(default)g)")
    things = top.add_subparsers(title="things", required=True, metavar="experts | mixtures | tasks")

    experts = things.add_parser("experts", help="expert vectors and LoRA adapters").add_subparsers(required=True)
    add_verb(experts, "list", list_experts, "all of them", shared)
    add_verb(experts, "show", show_expert, "one, with its card", shared).add_argument("name", help="or a digest")
    for verb, run, about in (
        ("add", add_expert, "register one under a new name"),
        ("replace", replace_expert, "register one under a name, new or in use"),
    ):
        one = add_verb(experts, verb, run, about, shared)
        one.add_argument("name")
        one.add_argument("path", type=Path, help=f"{_FILE}, a directory with one, or a PEFT LoRA directory")
        one.add_argument("--backbone", metavar="ID", help="a PEFT directory's, where the server has several")
        one.add_argument("--card", type=Path, metavar="FILE", help="JSON; a directory's card.json where not given")
    add_verb(experts, "delete", delete_expert, "take names away", shared).add_argument(
        "names", nargs="+", metavar="name"
    )
    one = add_verb(experts, "download", download_expert, "write its file and card to a directory", shared)
    one.add_argument("name", help="or a digest")
    one.add_argument("--out", type=Path, metavar="DIR", help="a directory of the expert's name where not given")

    mixtures = things.add_parser("mixtures", help="weights on experts").add_subparsers(required=True)
    add_verb(mixtures, "list", list_mixtures, "all of them", shared)
    add_verb(mixtures, "show", show_mixture, "one, with its card", shared).add_argument("id", help="digest or name")
    one = add_verb(mixtures, "add", add_mixture, "register weights that sum to one", shared)
    one.add_argument("weights", nargs="*", metavar="EXPERT=WEIGHT", help="`base` is the backbone itself")
    one.add_argument("--weights-file", type=Path, metavar="FILE", help="JSON: a number, or one a layer, by expert")
    one.add_argument("--backbone", required=True, metavar="ID")
    one.add_argument("--name")
    add_verb(mixtures, "delete", delete_mixture, "take one away", shared).add_argument("id", help="digest or name")
    one = add_verb(mixtures, "search", search_mixture, "find one by a few examples of a task", shared)
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
    cli_tasks.add_parser(things, shared)
    return top


def _seconds(text: str) -> float:
    if not 0 < float(text) <= 86_400:
        raise ValueError(text)  # argparse says the rest
    return float(text)


if __name__ == "__main__":
    sys.exit(main())
