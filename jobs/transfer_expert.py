"""Puts an expert of one backbone onto another and measures what it does there.

    python -m jobs.transfer_expert EXPERT --to BACKBONE --out DIR
    python -m jobs.transfer_expert EXPERT --to BACKBONE --out DIR --mode interpolated --task classify --data FILE

EXPERT is a directory with expert.safetensors and card.json, as jobs.train_experts leaves it, or a shipped expert's
name. DIR gets expert.safetensors, an ordinary expert of the target that can be served, mixed and searched over like any
other, card.json and README.md. On held-out questions of the task the target is asked without expert, with the one
transferred and with a control whose vectors are shuffled within themselves.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from jobs.expert_cards import card_json, command_of
from jobs.tasks import Task, make, names
from jobs.workbench import HELD_OUT_SEED, Workbench, evaluate
from metasepia.digests import short
from metasepia.errors import CorruptArtefact, InvalidSettings, MetasepiaError, UnknownName
from metasepia.experts import shipped
from metasepia.experts.factors import expert_layers_of
from metasepia.experts.transfer import MODES, Mode, kind_of, transferred, unequal_layers
from metasepia.experts.vectors import ExpertVectors, FactorIndex
from metasepia.models import checkpoints, loading
from metasepia.training.tuning import paired_gain


@dataclass(frozen=True)
class Source:
    """An expert's files."""

    expert: ExpertVectors
    card: dict[str, Any]

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Ends of the names of its layers, as `factors_of` wants them."""
        return tuple(sorted({kind_of(name)[1].removesuffix(".weight") for name in self.expert.z}))


def read_source(given: str) -> Source:
    """From a directory or a shipped name. Raises UnknownName, CorruptArtefact."""
    folder = Path(given) if Path(given).is_dir() else shipped.EXPERTS / given
    if not (folder / shipped.FILE).is_file():
        raise UnknownName("expert", given, (*shipped.names(), f"a directory with {shipped.FILE}"))
    expert = ExpertVectors.from_bytes((folder / shipped.FILE).read_bytes(), given)
    return Source(expert, shipped.card_of(folder))


def source_index(source: Source, backbone: str | None, home: Path) -> FactorIndex:
    """The layers that the expert's own backbone has factored: from `home`, or from the backbone's shapes.

    `backbone` is the source backbone where the card does not name it. Nothing is factored. Raises CorruptArtefact where
    it is not the backbone of the expert.
    """
    expert = source.expert
    try:
        return FactorIndex.read(expert.factors, home)
    except CorruptArtefact:
        pass
    backbone = backbone or source.card.get("backbone_source")
    if backbone is None:
        raise InvalidSettings("from", None, "the backbone that the expert was made for, since its card names none")
    prepared = checkpoints.prepare(backbone, home)
    if prepared.digest != expert.backbone:
        problem = f"{backbone} has digest {short(prepared.digest)} and the expert was made for {short(expert.backbone)}"
        raise CorruptArtefact("the source backbone", problem)
    skeleton = loading.skeleton(Path(prepared.path), torch.float32)
    shapes = {name: min(weight.shape) for name, weight in expert_layers_of(skeleton, source.suffixes).items()}
    return FactorIndex(digest=expert.factors, backbone=expert.backbone, lengths=shapes)


def measured(
    bench: Workbench, task: Task, layers: Sequence[str], count: int, candidates: dict[str, ExpertVectors | None]
) -> dict[str, Any]:
    """By candidate (None: the base, which comes first): held-out accuracy, and the gain over the base, with intervals.

    The measure is `exact`: the greedy answer is right. Intervals of 95 %, by a bootstrap over groups of questions.
    """
    examples = task.held_out(count, HELD_OUT_SEED)
    groups = [one.group for one in examples]
    right = {name: evaluate(bench, task, examples, expert, layers)["exact"] for name, expert in candidates.items()}
    base = next(iter(right.values()))
    report: dict[str, Any] = {"task": task.name, "questions": len(examples), "seed": HELD_OUT_SEED}
    for name, own in right.items():
        accuracy, low, high = paired_gain([False] * len(own), own, groups)
        gain, gain_low, gain_high = paired_gain(base, own, groups)
        report[name] = {
            "accuracy": round(accuracy, 4),
            "accuracy_95": [round(low, 4), round(high, 4)],
            "gain": round(gain, 4),
            "gain_95": [round(gain_low, 4), round(gain_high, 4)],
        }
    return report


def main(arguments: Sequence[str] | None = None) -> None:
    given = sys.argv[1:] if arguments is None else list(arguments)
    options, parser = _parse(given)
    torch.set_num_threads(options.threads)
    try:
        source = read_source(options.expert)
        task_name = options.task or source.card.get("task")
        if task_name is None:
            raise InvalidSettings("task", None, "given, since the expert's card names none")
        task = make(task_name, options.data)
        index = source_index(source, getattr(options, "from"), options.home)
        bench = Workbench.open(options.to, options.home)
        factors = bench.factors(source.suffixes)
        unequal = unequal_layers(index, factors.index)
        fitting: Mode = "interpolated" if unequal else "ordered"
        candidates = {
            mode: transferred(source.expert, index, factors.index, mode, seed=options.seed)
            for mode in (options.mode or fitting, fitting, "shuffled")
        }
    except MetasepiaError as error:
        parser.error(str(error))
    mode, expert = next(iter(candidates.items()))
    asked: dict[str, ExpertVectors | None] = {"base": None, **candidates}
    effect = measured(bench, task, source.suffixes, options.held_out, asked)
    card = {
        "kind": "expert",
        "name": options.name or f"{source.card.get('name', 'expert')}-transferred",
        "description": source.card.get("description", task.about),
        "task": task.name,
        "labels": list(task.labels),
        "digest": expert.digest,
        "backbone": expert.backbone,
        "backbone_source": bench.prepared.source,
        "factors": expert.factors,
        "renormalise": expert.renormalise,
        "parameters": sum(len(vector) for vector in expert.z.values()),
        "trained_layers": len(expert.z),
        "method": "transfer",
        "command": command_of("transfer_expert", given),
        "transferred": {
            "mode": mode,
            **({"seed": options.seed} if mode == "shuffled" else {}),
            "from_expert": source.expert.digest,
            "from_backbone": source.expert.backbone,
            "from_backbone_source": source.card.get("backbone_source", getattr(options, "from")),
            "shapes": unequal or "equal",
        },
        "held_out": effect,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / shipped.FILE).write_bytes(expert.to_bytes())
    (options.out / shipped.CARD).write_text(card_json(card))
    (options.out / "README.md").write_text(readme(card))
    for name in asked:
        one = effect[name]
        print(f"{name}: {one['accuracy']:.3f} {one['accuracy_95']}, gain {one['gain']:+.3f} {one['gain_95']}")
    print(f"{card['name']}: {options.out / shipped.FILE} has digest {expert.digest}")


def readme(card: dict[str, Any]) -> str:
    """README.md of a transferred expert, from its card."""
    moved, effect = card["transferred"], card["held_out"]
    rows = [
        f"| {name} | {one['accuracy']:.3f} | {one['accuracy_95'][0]:.3f} to {one['accuracy_95'][1]:.3f} "
        f"| {one['gain']:+.3f} | {one['gain_95'][0]:+.3f} to {one['gain_95'][1]:+.3f} |"
        for name, one in effect.items()
        if isinstance(one, dict)
    ]
    return f"""# Expert `{card["name"]}`

{card["description"]}

{card["parameters"]:,} multipliers of singular values on {card["trained_layers"]} linear layers of
`{card["backbone_source"]}`, none of them trained there: the expert {short(moved["from_expert"])} of
`{moved["from_backbone_source"]}` was put onto it ({moved["mode"]}; shapes: {moved["shapes"]}).

## Held out

Greedy answers to {effect["questions"]} held-out questions of task {effect["task"]}; `shuffled` is the control, with
each vector permuted within itself. Intervals of 95 %, by a bootstrap over groups of questions; gains are paired.

| weights | accuracy | 95 % interval | gain over base | 95 % interval |
| --- | --- | --- | --- | --- |
{chr(10).join(rows)}

## How it was made

`{card["command"]}`
"""


def _parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    parser = argparse.ArgumentParser(
        prog="python -m jobs.transfer_expert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("expert", metavar="EXPERT", help="a directory with expert.safetensors, or a shipped expert's name")
    add("--to", required=True, metavar="BACKBONE", help="package:NAME, a Hugging Face directory or a .gguf file")
    add("--from", metavar="BACKBONE", help="the expert's own backbone, where its card does not name it")
    add("--mode", choices=MODES, help="default: ordered between equal shapes, else interpolated")
    add("--out", required=True, type=Path)
    add("--task", help=f"measured on; default: the card's. {', '.join(names())}, or package.module:attribute")
    add("--data", type=Path, help="file or directory that the task reads")
    add("--held-out", type=int, default=96, help="held-out questions")
    add("--name", help="the new expert's name; default: the old one's with -transferred")
    add("--seed", type=int, default=0, help="of the shuffling")
    add("--home", type=Path, default=Path(".metasepia"), help="where prepared weights and factors are kept")
    add("--threads", type=int, default=1)
    return parser.parse_args(arguments), parser


if __name__ == "__main__":
    main()
