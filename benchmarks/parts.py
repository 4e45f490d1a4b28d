"""The parts of benchmarks.classify: each draws examples, has every side judged on them, and returns its rows."""

import argparse
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from rich.progress import Progress

from benchmarks import datasets, gaps, report, sides
from benchmarks.datasets import Example, PictureSet, TextSet, balanced_order
from benchmarks.embedded import EmbeddedTexts, Models
from benchmarks.prompting import InContextPrompting
from benchmarks.sides import CALIBRATED, CLASSIFIERS, Cell
from benchmarks.tally import Tally, accuracy_row, calibration_row
from metasepia.reasoning.shipped import LoadedModule

OURS, UNLABELLED, PROMPTING = "ours", "ours, unlabelled", "prompting"
PROBE = "LogisticRegression"


@dataclass(frozen=True)
class Draw:
    """What one cell learns from."""

    size: int
    """k, or examples a class."""
    seed: int
    examples: Sequence[Example]
    unlabelled: Sequence[str] = ()


@dataclass(kw_only=True)
class Run:
    """What the parts share."""

    arguments: argparse.Namespace
    sets: Sequence[TextSet]
    module: LoadedModule
    others: Sequence[LoadedModule]
    """Modules shown beside ours."""
    progress: Progress
    models: Models = field(default_factory=Models)
    num_cut: int = 0
    """Texts that were longer than the window, so far in this part."""
    _prompted: "Prompted | None" = None

    @property
    def seeds(self) -> range:
        return range(self.arguments.seeds)

    @property
    def binary(self) -> list[TextSet]:
        return [one for one in self.sets if len(one.labels) == 2]

    def embedded(self, embedder: str, texts: Sequence[str], what: str) -> EmbeddedTexts:
        """The embedder, after all these texts are in its cache."""
        embedded = self.models.embedded(embedder)
        task = self.progress.add_task(f"{what}: vectors", total=len(texts))
        embedded.compute(texts, lambda done: self.progress.advance(task, done))
        self.progress.remove_task(task)
        self.num_cut += embedded.num_cut(texts)
        return embedded

    def cells(
        self, embedder: str, name: str, draws: Sequence[Draw], test_of: Callable[[int], list[Example]]
    ) -> Iterator[tuple[Draw, Cell]]:
        """Every draw as vectors, judged on the test examples of its seed. Only the texts in use are embedded."""
        tests = {seed: test_of(seed) for seed in {draw.seed for draw in draws}}
        texts = {text for draw in draws for text, _ in draw.examples} | {t for draw in draws for t in draw.unlabelled}
        texts |= {text for test in tests.values() for text, _ in test}
        embedded = self.embedded(embedder, sorted(texts), name)
        for draw in draws:
            test = tests[draw.seed]
            yield (
                draw,
                Cell(
                    vectors=embedded([text for text, _ in draw.examples]),
                    labels=[label for _, label in draw.examples],
                    test=embedded([text for text, _ in test]),
                    truth=[label for _, label in test],
                    seed=draw.seed,
                    unlabelled=embedded(draw.unlabelled) if draw.unlabelled else None,
                ),
            )

    def said_cut(self) -> str:
        """How many texts were cut, as a part of a note."""
        return f"; {self.num_cut} texts cut to the window" if self.num_cut else ""

    def prompted(self) -> "Prompted":
        if self._prompted is None:
            self._prompted = prompt(self)
        return self._prompted


def binary(run: Run) -> list[report.Row]:
    """Parts `minilm` and `unlabelled`, on the same draws."""
    arguments, parts = run.arguments, run.arguments.parts
    judges = {OURS: sides.of_module(run.module), **sides.of_classifiers(platt="minilm" in parts)}
    if "minilm" in parts:
        judges |= {other.name: sides.of_module(other) for other in run.others}
    if "unlabelled" in parts:
        judges[UNLABELLED] = sides.of_module(run.module, with_unlabelled=True)
    tally, short, fewest, run.num_cut = Tally(), {}, {}, 0
    task = run.progress.add_task("two classes", total=len(run.binary) * len(run.seeds) * len(arguments.k))
    for one in run.binary:
        draws = []
        for k in arguments.k:
            if len(one.train) < k:
                short.setdefault(k, []).append(one.name)
                run.progress.advance(task, len(run.seeds))
                continue
            for seed in run.seeds:
                examples = one.draw(k, seed)
                more = one.draw_unlabelled(arguments.unlabelled, seed, examples) if UNLABELLED in judges else []
                fewest[k] = min(fewest.get(k, arguments.unlabelled), len(more))
                draws.append(Draw(k, seed, examples, more))
        test = one.sample_test(arguments.test)
        for draw, cell in run.cells("encoder", one.name, draws, lambda _, test=test: test):
            tally.add(draw.size, one.name, sides.judge(cell, judges))
            run.progress.advance(task)
    for k in sorted(short.keys() - set(tally.sizes)):
        run.progress.console.print(f"k = {k}: no set is large enough")
    rows, encoder = [], run.models.name("encoder")
    for k in tally.sizes:
        ending = f"; too small: {', '.join(short[k])}" if k in short else ""
        ending += run.said_cut()
        if "minilm" in parts:
            beside = "".join(f"; {other.name} {tally.mean(k, other.name):.3f}" for other in run.others)
            what = f"accuracy, two classes, {encoder}, k = {k}"
            made = accuracy_row(tally, k, OURS, CLASSIFIERS, id=f"accuracy-minilm-{k}", what=what, more=beside + ending)
            rows.append(replace(made, part="minilm"))
        if "unlabelled" in parts:
            number = f"{fewest[k]} to {arguments.unlabelled}" if fewest[k] < arguments.unlabelled else fewest[k]
            beside = f"; {number} unlabelled texts, without them {tally.mean(k, OURS):.3f}"
            what, id = f"accuracy, two classes, {encoder}, unlabelled texts too, k = {k}", f"accuracy-unlabelled-{k}"
            made = accuracy_row(tally, k, UNLABELLED, CLASSIFIERS, id=id, what=what, more=beside + ending)
            rows.append(replace(made, part="unlabelled"))
    for k in tally.sizes if "minilm" in parts else ():
        what = f"calibration error, two classes, {encoder}, k = {k}"
        made = calibration_row(tally, k, OURS, CALIBRATED, id=f"calibration-minilm-{k}", what=what)
        rows.append(replace(made, part="minilm"))
    return rows


def many_classes(run: Run) -> list[report.Row]:
    """Part `multi-class`: every set of more than two classes."""
    arguments = run.arguments
    judges = {OURS: sides.of_module(run.module), **sides.of_classifiers()}
    tally, sets = Tally(), [one for one in run.sets if len(one.labels) > 2]
    run.num_cut = 0
    task = run.progress.add_task("many classes", total=len(sets) * len(run.seeds) * len(arguments.each))
    for one in sets:
        draws = [Draw(n, seed, one.draw_each(n, seed)) for n in arguments.each for seed in run.seeds]
        test = one.sample_test(arguments.test)
        for draw, cell in run.cells("encoder", one.name, draws, lambda _, test=test: test):
            tally.add(draw.size, one.name, sides.judge(cell, judges))
            run.progress.advance(task)
    rows, encoder = [], run.models.name("encoder")
    for n in tally.sizes:
        what, id = f"many classes, {encoder}, {n} examples each", f"multi-class-{n}"
        pairs = []
        for one in sets:
            best = tally.best(n, CLASSIFIERS, sets=[one.name])
            ours, against = (tally.mean(n, side, sets=[one.name]) for side in (OURS, best))
            pairs.append(f"{one.name} {ours:.3f} / {against:.3f}")
            macros = [tally.mean(n, side, "macro", [one.name]) for side in (OURS, best)]
            of_one = f"accuracy, {one.name} ({len(one.labels)} classes), {encoder}, {n} examples each"
            made = accuracy_row(
                *(tally, n, OURS, CLASSIFIERS),
                **{"id": f"{id}-{one.name}", "what": of_one, "sets": [one.name], "detail": True},
                more="; mean over classes {:.3f} to {:.3f}".format(*macros),
            )
            rows.append(made)
        more = f"; each set, ours / its best of three: {', '.join(pairs)}{run.said_cut()}"
        rows.append(accuracy_row(tally, n, OURS, CLASSIFIERS, id=id, what=f"accuracy, {what}", more=more))
        calibrated = [side for side in CALIBRATED if side == "LogisticRegression"]  # Platt's needs classes squared fits
        rows.append(
            calibration_row(tally, n, OURS, calibrated, id=f"{id}-calibration", what=f"calibration error, {what}")
        )
    return [replace(row, part="multi-class") for row in rows]


def pictures(run: Run) -> list[report.Row]:
    """Part `digits`: every set of pictures as pixels, all pairs of its classes."""
    arguments = run.arguments
    judges = {OURS: sides.of_module(run.module), **sides.of_classifiers()}
    judges |= {other.name: sides.of_module(other) for other in run.others}
    rows, k = [], arguments.picture_k
    for whole in datasets.read_all_pictures(arguments.data):
        one = whole.within_train() if arguments.dev else whole
        pairs = list(itertools.combinations(sorted(set(one.train_labels.tolist())), 2))
        task = run.progress.add_task(f"{one.name}, pairs", total=len(pairs))
        tally = Tally()
        for pair in pairs:
            of_pair = one.of_classes(pair)
            for seed in run.seeds if len(of_pair.train) >= k else ():
                tally.add(k, "-".join(pair), sides.judge(_picture_cell(of_pair, k, seed, arguments.test), judges))
            run.progress.advance(task)
        if not tally.sizes:
            continue
        number = len(tally.sets(k, OURS))
        beside = "".join(f"; {other.name} {tally.mean(k, other.name):.3f}" for other in run.others)
        what = f"accuracy, {one.name} as pixels, {number} pairs of classes, k = {k}"
        made = accuracy_row(tally, k, OURS, CLASSIFIERS, id=f"digits-{one.name}", what=what, more=beside, of="pairs")
        rows.append(replace(made, part="digits"))
    return rows


def _picture_cell(one: PictureSet, k: int, seed: int, num_test: int) -> Cell:
    drawn = balanced_order(one.train_labels.tolist(), seed)[:k]
    judged = np.random.default_rng(0).permutation(len(one.test))[:num_test]
    return Cell(
        vectors=one.train[drawn],
        labels=one.train_labels[drawn].tolist(),
        test=one.test[judged],
        truth=one.test_labels[judged].tolist(),
        seed=seed,
    )


@dataclass(frozen=True)
class Prompted:
    """Prompting, ours and the classifiers on the backbone's vectors, on the same draws and texts."""

    tally: Tally
    left_out: str
    """Which sets, and why; empty where none."""


def prompt(run: Run) -> Prompted:
    """The backbone asked in its prompt; each seed has its own draw and its own test texts."""
    arguments = run.arguments
    model, tokenizer = run.models.backbone()
    prompting = InContextPrompting(model, tokenizer, window=run.models.backbone_window)
    judges = {OURS: sides.of_module(run.module), **sides.of_classifiers()}
    tally, left_out, run.num_cut = Tally(), [], 0
    task = run.progress.add_task("prompting", total=len(run.binary) * len(run.seeds))
    for one in run.binary:
        tests = {seed: one.sample_test(arguments.prompted, seed) for seed in run.seeds}
        asked = {seed: [text for text, _ in test] for seed, test in tests.items()}
        longest = {seed: one.draw(max(arguments.prompt_k), seed) for seed in run.seeds}
        try:
            prompting.check_labels(one.labels)
        except ValueError as error:
            left_out.append(f"{one.name}, as {error}")
            run.progress.advance(task, len(run.seeds))
            continue
        fit = {k for k in arguments.prompt_k if k <= len(one.train)}
        fit = {k for k in fit if all(prompting.fits(longest[seed][:k], asked[seed]) for seed in run.seeds)}
        left_out += [f"{one.name} at k = {k}, too long or too small" for k in sorted(set(arguments.prompt_k) - fit)]
        draws = [Draw(k, seed, longest[seed][:k]) for seed in run.seeds for k in sorted(fit)]
        said: dict[int, dict[int, list[str]]] = {}
        for draw, cell in run.cells("backbone", one.name, draws, tests.__getitem__):
            if draw.seed not in said:
                said[draw.seed] = prompting.predict(longest[draw.seed], sorted(fit), asked[draw.seed])
                run.progress.advance(task)
            judged = sides.judge(cell, judges)
            judged[PROMPTING] = sides.judged(sides.Said(said[draw.seed][draw.size]), cell.truth)
            tally.add(draw.size, one.name, judged)
    return Prompted(tally, f"; left out: {'; '.join(left_out)}" if left_out else "")


def against_prompting(run: Run) -> list[report.Row]:
    """Part `smollm2`."""
    prompted, backbone, rows = run.prompted(), run.models.name("backbone"), []
    for k in prompted.tally.sizes:
        best = prompted.tally.best(k, CLASSIFIERS)
        more = f"; {run.arguments.prompted} texts a set and seed; {best} {prompted.tally.mean(k, best):.3f}"
        more += prompted.left_out + run.said_cut()
        what = f"accuracy, two classes, {backbone}'s vectors against prompting it, k = {k}"
        made = accuracy_row(prompted.tally, k, OURS, [PROMPTING], id=f"accuracy-smollm2-{k}", what=what, more=more)
        rows.append(replace(made, part="smollm2"))
    return rows


def both_gaps(run: Run) -> list[report.Row]:
    """Part `gaps`: a row a set and gap, and their means."""
    rows = []
    for title, found in (("representation", representation_gaps(run)), ("reasoning", reasoning_gaps(run))):
        if not found:
            continue
        rows += [
            report.figure(f"gap-{title}-{name}", f"{title} gap, {name}", points, "points", note, detail=True)
            for name, (points, note) in found.items()
        ]
        mean = float(np.mean([points for points, _ in found.values()]))
        what = {
            "representation": f"representation gap, {run.models.name('encoder')}: fine-tuned minus probe",
            "reasoning": f"reasoning gap, {run.models.name('backbone')}: probe minus prompting",
        }[title]
        each = ", ".join(f"{name} {points:+.1f}" for name, (points, _) in found.items())
        rows.append(report.figure(f"gap-{title}", what, mean, "points", f"mean over {len(found)} sets: {each}"))
    return [replace(row, part="gaps") for row in rows]


def representation_gaps(run: Run) -> dict[str, tuple[float, str]]:
    """By set, in points: the encoder fine-tuned, minus a probe on its frozen vectors, same examples and test texts."""
    arguments, found, epochs = run.arguments, {}, run.arguments.epochs
    k = arguments.gap_k
    task = run.progress.add_task("fine-tuning", total=len(run.binary) * epochs * k)
    for one in run.binary:
        if len(one.train) < k:
            run.progress.advance(task, epochs * k)
            continue
        test, draw = one.sample_test(arguments.gap_test), Draw(k, 0, one.draw(k, 0))
        [(_, cell)] = run.cells("encoder", one.name, [draw], lambda _, test=test: test)
        probe = sides.judge(cell, {PROBE: sides.of_classifiers()[PROBE]})[PROBE].accuracy
        tuned = gaps.fine_tuned_accuracy(
            *(run.models.encoder_source, draw.examples, cell.vectors, test),
            **{"epochs": epochs, "seed": 0, "window": run.models.embedded("encoder").embedder.window},
            advance=lambda seen: run.progress.advance(task, seen),
        )
        note = f"fine-tuned {tuned:.3f}, probe {probe:.3f}; k = {k}, {epochs} epochs, one seed, {len(test)} texts"
        found[one.name] = (100 * (tuned - probe), note)
    return found


def reasoning_gaps(run: Run) -> dict[str, tuple[float, str]]:
    """By set, in points: a probe on the backbone's vectors minus prompting it, at the largest k that was asked."""
    tally, found = run.prompted().tally, {}
    for one in run.binary:
        sizes = [k for k in tally.sizes if one.name in tally.sets(k, PROMPTING)]
        if not sizes:
            continue
        probe, prompting, ours = (tally.mean(sizes[-1], side, sets=[one.name]) for side in (PROBE, PROMPTING, OURS))
        note = f"probe {probe:.3f}, prompting {prompting:.3f}, ours {ours:.3f}; k = {sizes[-1]}, "
        note += f"{len(run.seeds)} seeds, {run.arguments.prompted} texts each"
        found[one.name] = (100 * (probe - prompting), note)
    return found
