"""Accuracy of few-shot classification over the sets of a directory, several seeds, with no choosing.

Ours is the shipped reasoning module, which never saw these data. Against it stand scikit-learn's LogisticRegression
(C=1), SVC and NearestCentroid on the same vectors (the best of the three by its mean, chosen afterwards), and a
backbone's own in-context prompting. Parts, each of which replaces its own rows in the JSON file:

    minilm       the sets of two classes, the encoder's vectors, k labelled examples; calibration
    unlabelled   the same, with unlabelled texts of the train split given to our context
    smollm2      the same sets, the backbone's vectors against prompting that backbone with the same examples
    multi-class  the sets of more classes, so many examples of each
    digits       sets of pictures as pixel vectors, all pairs of classes
    gaps         TART's two gaps: of the representation (fine-tuning beyond a probe) and of reasoning (the probe beyond
                 prompting)

    python -m benchmarks.classify --data DIR --json benchmarks/results/classify.json

`--dev` looks at train splits alone, halved: for choosing between modules.
"""

import argparse
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from benchmarks import datasets, report, sides
from benchmarks.datasets import TextSet
from benchmarks.embedded import EmbeddedTexts, Models
from benchmarks.sides import CALIBRATED, CLASSIFIERS, Cell
from benchmarks.tally import Tally, accuracy_row, calibration_row
from metasepia.reasoning import shipped
from metasepia.reasoning.shipped import LoadedModule

OURS, UNLABELLED = "ours", "ours, unlabelled"


@dataclass(frozen=True, kw_only=True)
class Run:
    """What the parts share."""

    arguments: argparse.Namespace
    sets: Sequence[TextSet]
    module: LoadedModule
    others: Sequence[LoadedModule]
    """Modules shown beside ours."""
    models: Models = field(default_factory=Models)
    progress: Progress

    @property
    def ks(self) -> list[int]:
        return [int(k) for k in self.arguments.k.split(",")]

    @property
    def binary(self) -> list[TextSet]:
        return [one for one in self.sets if len(one.labels) == 2]

    def embedded(self, embedder: str, texts: Sequence[str], what: str) -> EmbeddedTexts:
        """The embedder, after all these texts are in its cache."""
        embedded = self.models.embedded(embedder)
        task = self.progress.add_task(f"{what}: vectors", total=len(texts))
        embedded.compute(texts, lambda done: self.progress.advance(task, done))
        self.progress.remove_task(task)
        return embedded


def binary(run: Run) -> list[report.Row]:
    """Parts `minilm` and `unlabelled`, on the same draws."""
    arguments, parts = run.arguments, run.arguments.parts
    judges = {OURS: sides.of_module(run.module), **sides.of_classifiers(platt="minilm" in parts)}
    if "minilm" in parts:
        judges |= {other.name: sides.of_module(other) for other in run.others}
    if "unlabelled" in parts:
        judges[UNLABELLED] = sides.of_module(run.module, with_unlabelled=True)
    tally, cut, short, fewest = Tally(), 0, {}, arguments.unlabelled
    task = run.progress.add_task("two classes", total=len(run.binary) * arguments.seeds * len(run.ks))
    for one in run.binary:
        texts = [text for text, _ in one.train + one.test]
        embedded = run.embedded("encoder", texts, one.name)
        cut += embedded.num_cut(texts)
        test = one.sample_test(arguments.test)
        test_vectors = embedded([text for text, _ in test])
        for k in run.ks:
            if len(one.train) < k:
                short.setdefault(k, []).append(one.name)
                run.progress.advance(task, arguments.seeds)
                continue
            for seed in range(arguments.seeds):
                examples = one.draw(k, seed)
                beside = one.draw_unlabelled(arguments.unlabelled, seed, examples) if UNLABELLED in judges else []
                fewest = min(fewest, len(beside))
                cell = Cell(
                    vectors=embedded([text for text, _ in examples]),
                    labels=[label for _, label in examples],
                    test=test_vectors,
                    truth=[label for _, label in test],
                    seed=seed,
                    unlabelled=embedded(beside) if beside else None,
                )
                tally.add(k, one.name, sides.judge(cell, judges))
                run.progress.advance(task)
    rows, encoder = [], run.models.name("encoder")
    for k in tally.sizes:
        left_out = f"; too small: {', '.join(short[k])}" if k in short else ""
        if "minilm" in parts:
            beside = "".join(f"; {other.name} {tally.mean(k, other.name):.3f}" for other in run.others)
            what = f"accuracy, two classes, {encoder}, k = {k}"
            rows.append(
                accuracy_row(tally, k, OURS, CLASSIFIERS, id=f"accuracy-minilm-{k}", what=what, more=beside + left_out)
            )
        if "unlabelled" in parts:
            number = f"{fewest} to {arguments.unlabelled}" if fewest < arguments.unlabelled else f"{fewest}"
            beside = f"; {number} unlabelled texts; without them {tally.mean(k, OURS):.3f}"
            what = f"accuracy, two classes, {encoder}, unlabelled texts given, k = {k}"
            rows.append(
                accuracy_row(
                    tally, k, UNLABELLED, CLASSIFIERS, id=f"accuracy-unlabelled-{k}", what=what, more=beside + left_out
                )
            )
    if "minilm" in parts:
        for k in tally.sizes:
            what = f"calibration error, two classes, {encoder}, k = {k}"
            rows.append(calibration_row(tally, k, OURS, CALIBRATED, id=f"calibration-minilm-{k}", what=what))
    say_cut(run, cut)
    return part_of(rows, {"accuracy-unlabelled": "unlabelled"}, "minilm")


def many_classes(run: Run) -> list[report.Row]:
    """Part `multi-class`: every set of more than two classes."""
    arguments = run.arguments
    each = [int(n) for n in arguments.each.split(",")]
    judges = {OURS: sides.of_module(run.module), **sides.of_classifiers()}
    tally, cut, sets = Tally(), 0, [one for one in run.sets if len(one.labels) > 2]
    task = run.progress.add_task("many classes", total=len(sets) * arguments.seeds * len(each))
    for one in sets:
        texts = [text for text, _ in one.train + one.test]
        embedded = run.embedded("encoder", texts, one.name)
        cut += embedded.num_cut(texts)
        test = one.sample_test(arguments.test)
        test_vectors = embedded([text for text, _ in test])
        for num_each in each:
            for seed in range(arguments.seeds):
                examples = one.draw_each(num_each, seed)
                cell = Cell(
                    vectors=embedded([text for text, _ in examples]),
                    labels=[label for _, label in examples],
                    test=test_vectors,
                    truth=[label for _, label in test],
                    seed=seed,
                )
                tally.add(num_each, one.name, sides.judge(cell, judges))
                run.progress.advance(task)
    rows, encoder = [], run.models.name("encoder")
    for n in tally.sizes:
        what, id = f"many classes, {encoder}, {n} examples each", f"multi-class-{n}"
        names = tally.sets(n, OURS)
        pairs = []
        for one in sets:
            best = tally.best(n, CLASSIFIERS, sets=[one.name])
            ours, against = (tally.mean(n, side, sets=[one.name]) for side in (OURS, best))
            pairs.append(f"{one.name} {ours:.3f} to {best} {against:.3f}")
            macro = "; macro {:.3f} to {:.3f}".format(
                *(tally.mean(n, side, "macro", [one.name]) for side in (OURS, best))
            )
            of_one = f"accuracy, {one.name} ({len(one.labels)} classes), {encoder}, {n} examples each"
            of_set = {"id": f"{id}-{one.name}", "what": of_one, "sets": [one.name], "detail": True}
            rows.append(accuracy_row(tally, n, OURS, CLASSIFIERS, **of_set, more=macro))
        each_best = "; the best for each set: " + ", ".join(pairs)
        rows.append(
            accuracy_row(tally, n, OURS, CLASSIFIERS, id=id, what=f"accuracy, {what}", sets=names, more=each_best)
        )
        rows.append(
            calibration_row(tally, n, OURS, ["LogisticRegression"], id=f"{id}-ece", what=f"calibration error, {what}")
        )
    say_cut(run, cut)
    return part_of(rows, {}, "multi-class")


PARTS: dict[str, Callable[[Run], list[report.Row]]] = {
    "minilm": binary,
    "unlabelled": binary,
    "multi-class": many_classes,
}
SLOW = ("gaps",)
"""Run when named only."""


def part_of(rows: Iterable[report.Row], parts: dict[str, str], otherwise: str) -> list[report.Row]:
    """The rows, each marked with the part that its id begins with."""
    return [
        replace(row, part=next((part for begin, part in parts.items() if row.id.startswith(begin)), otherwise))
        for row in rows
    ]


def say_cut(run: Run, cut: int) -> None:
    if cut:
        run.progress.console.print(f"{cut} texts were longer than the window and cut to it")


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="directory of Parquet files")
    default = ",".join(part for part in PARTS if part not in SLOW)
    parser.add_argument("--parts", default=default, help=f"of {', '.join(PARTS)}")
    parser.add_argument("--dev", action="store_true", help="train splits alone, halved")
    parser.add_argument("--k", default="16,32,64,128,256", help="numbers of labelled examples, two classes")
    parser.add_argument("--each", default="5,10", help="numbers of labelled examples a class, many classes")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--test", type=int, default=500, help="held-out examples a set, the same for every seed")
    parser.add_argument("--unlabelled", type=int, default=500, help="unlabelled texts given to a context")
    parser.add_argument("--characters", type=int, help="cut texts to this; whole, up to the window, without")
    parser.add_argument("--module", default="default", help="a shipped name or a folder")
    parser.add_argument("--beside", default="tart-paper", help="modules shown beside it; may be empty")
    arguments = parser.parse_args()
    arguments.parts = arguments.parts.split(",")
    if unknown := set(arguments.parts) - PARTS.keys():
        parser.error(f"no part {', '.join(sorted(unknown))}; parts: {', '.join(PARTS)}")
    torch.set_grad_enabled(False)
    started_on, began = report.machine(), time.perf_counter()
    sets = datasets.read_all(arguments.data)
    if arguments.characters:
        sets = [one.cut(arguments.characters) for one in sets]
    if arguments.dev:
        sets = [one.within_train() for one in sets]
    rows: list[report.Row] = []
    with Progress(console=Console(stderr=True)) as progress:
        run = Run(
            arguments=arguments,
            sets=sets,
            module=shipped.load(arguments.module),
            others=[shipped.load(name) for name in arguments.beside.split(",") if name],
            progress=progress,
        )
        for part in dict.fromkeys(PARTS[name] for name in PARTS if name in arguments.parts):
            rows += part(run)
    report.publish("classify", rows, json_file=arguments.json, started_on=started_on)
    print(f"{len(sets)} sets, {arguments.seeds} seeds, {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
