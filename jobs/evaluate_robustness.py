"""Accuracy when examples and queries go wrong: the reasoning module beside scikit-learn, on the same vectors.

    python -m jobs.evaluate_robustness --out runs/robustness
    python -m jobs.evaluate_robustness --data DIR --k 32,128 --out runs/robustness-texts

Without `--data`: scikit-learn's own digits, wine and breast cancer, standardised. With it: every Parquet file of DIR
with columns text, label_name and split, embedded; only texts can be reworded. `jobs/perturbations.py` says what each
kind and level does. Accuracy is the mean recall of the classes. OUT gets cells/ (a file a measurement, written once: a
killed run goes on where it was), robustness.parquet, robustness.json and a picture for each k.
"""

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from sklearn.datasets import load_breast_cancer, load_digits, load_wine
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.neighbors import NearestCentroid
from sklearn.svm import SVC

from cluster import settings as settings_of
from jobs.perturbations import AXIS, LEVELS, MEANING, TEXT_KINDS, Pool, Trial, balanced_accuracy, draw, reworded
from metasepia import encoders
from metasepia.digests import digest_of, digest_of_file, short
from metasepia.errors import InvalidSettings, MetasepiaError
from metasepia.reasoning import shipped
from metasepia.reasoning.calibration import expected_calibration_error
from metasepia.reasoning.context import Context, answer, compile_context
from metasepia.reasoning.shipped import LoadedModule

FITTED: dict[str, Callable[[], Any]] = {
    "LogisticRegression": lambda: LogisticRegression(C=1, max_iter=1000),
    "SVC": SVC,
    "NearestCentroid": NearestCentroid,
}
SIDES = ("module", *FITTED)
TRAIN_POOL = 400
"""Texts of a set that examples are drawn from, embedded once."""

Embed = Callable[[Sequence[str]], np.ndarray]


@dataclass(frozen=True)
class Source:
    """A set by name and content; its pool is made when a measurement of it is missing."""

    name: str
    digest: str
    has_texts: bool
    load: Callable[[], Pool]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One measurement."""

    set: str
    kind: str
    level: float
    k: int
    seed: int

    @property
    def file_name(self) -> str:
        return f"{self.set}--{self.kind.replace(' ', '-')}-{self.level:g}--k{self.k}-seed{self.seed}.json"


def built_in() -> list[Source]:
    """Sets that scikit-learn brings with it: halves by a fixed seed, standardised on the first."""

    def pool_of(load: Callable[..., Any]) -> Pool:
        x, y = load(return_X_y=True)
        halves: list[Any] = train_test_split(x, y, test_size=0.5, random_state=0, stratify=y)
        train, test, train_labels, test_labels = halves
        mean, spread = train.mean(0), np.maximum(train.std(0), 1e-9)
        train, test = (((one - mean) / spread).astype(np.float32) for one in (train, test))
        return Pool(train=train, train_labels=train_labels, test=test, test_labels=test_labels)

    sets = {"digits": load_digits, "wine": load_wine, "breast_cancer": load_breast_cancer}
    return [
        Source(name, digest_of(name), False, lambda load=load: pool_of(load))
        for name, load in sets.items()
    ]  # fmt: skip


def text_sets(directory: Path, embed: Embed, num_test: int, characters: int) -> list[Source]:
    """Every Parquet file with labelled texts, by name. Raises InvalidSettings where there is none."""
    sources = []
    for path in sorted(directory.glob("*.parquet")):
        if {"text", "label_name", "split"} <= set(pq.read_schema(path).names):
            load = lambda path=path: read_texts(path, embed, num_test, characters)  # noqa: E731
            sources.append(Source(path.stem, digest_of_file(path), True, load))
    if not sources:
        raise InvalidSettings("--data", str(directory), "a directory of .parquet files with text, label_name, split")
    return sources


def read_texts(path: Path, embed: Embed, num_test: int, characters: int) -> Pool:
    """At most TRAIN_POOL texts to draw from, balanced, and `num_test` to be judged on; halves where there is no test.

    Raises InvalidSettings for a set of one class, or with fewer than two texts of a class.
    """
    rows = [row for row in pq.read_table(path, columns=["text", "label_name", "split"]).to_pylist() if row["text"]]
    rows = [row for row in rows if row["text"].strip() and row["label_name"] is not None]
    order = np.random.default_rng(0).permutation(len(rows))
    splits = {row["split"] for row in rows}
    held = next((name for name in ("test", "validation", *sorted(splits - {"train"}, key=str)) if name in splits), None)
    if "train" in splits and held is not None:
        train, test = ([rows[i] for i in order if rows[i]["split"] == split] for split in ("train", held))
    else:
        train, test = ([rows[i] for i in half] for half in np.array_split(order, 2))
    classes = sorted({str(row["label_name"]) for row in train})
    of_class = {name: [row for row in train if str(row["label_name"]) == name] for name in classes}
    if len(classes) < 2 or min(map(len, of_class.values())) < 2:
        raise InvalidSettings("--data", path.name, "a set of two classes or more, two texts of each")
    chosen = [row for name in classes for row in of_class[name][: max(4, TRAIN_POOL // len(classes))]]
    test = [row for row in test if str(row["label_name"]) in of_class][:num_test]
    texts = tuple(row["text"][:characters] for row in test)
    return Pool(
        train=embed([row["text"][:characters] for row in chosen]),
        train_labels=np.array([classes.index(str(row["label_name"])) for row in chosen]),
        test=embed(texts),
        test_labels=np.array([classes.index(str(row["label_name"])) for row in test]),
        test_texts=texts,
    )


def cells_of(source: Source, ks: Sequence[int], seeds: int) -> Iterator[Cell]:
    """All measurements of a set; those that share their queries' wording stand together."""
    for kind, levels in LEVELS.items():
        if source.has_texts or kind not in TEXT_KINDS:
            for level in levels:
                for seed in range(seeds):
                    for k in ks:
                        yield Cell(set=source.name, kind=kind, level=level, k=k, seed=seed)


def measure(trial: Trial, loaded: LoadedModule, seed: int) -> dict[str, dict[str, float | None]]:
    """Accuracy of every side, and the calibration error of those that give probabilities."""
    names = [f"{label:06d}" for label in trial.labels]
    compiled = compile_context(Context.of(trial.examples, names, seed=seed), loaded)
    (probabilities,) = answer(loaded.module, [(compiled, trial.queries)])
    classes = np.array([int(name) for name in compiled.classes])
    results = {"module": _result(classes, probabilities, trial)}
    for side, make in FITTED.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a feature that is the same in all examples of a class
            fitted = make().fit(trial.examples, trial.labels)
        if isinstance(fitted, LogisticRegression):
            results[side] = _result(fitted.classes_, fitted.predict_proba(trial.queries), trial)
        else:
            said = fitted.predict(trial.queries)
            results[side] = {"accuracy": balanced_accuracy(said, trial), "calibration_error": None}
    return results


def _result(classes: np.ndarray, probabilities: np.ndarray, trial: Trial) -> dict[str, float | None]:
    accuracy = balanced_accuracy(classes[probabilities.argmax(1)], trial)
    return {
        "accuracy": accuracy,
        "calibration_error": expected_calibration_error(probabilities, np.searchsorted(classes, trial.truth)),
    }


def run(
    sources: Sequence[Source], ks: Sequence[int], seeds: int, loaded: LoadedModule, embed: Embed, out: Path
) -> list[dict[str, Any]]:
    """Measures what is missing, with progress, and returns every measurement, one row a side."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    folder = out / "cells"
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {source.name: list(cells_of(source, ks, seeds)) for source in sources}
    with Progress(*columns) as progress:
        bar = progress.add_task("Measuring", total=sum(map(len, wanted.values())))
        for source in sources:
            missing = [cell for cell in wanted[source.name] if not (folder / cell.file_name).exists()]
            progress.update(bar, advance=len(wanted[source.name]) - len(missing), description=source.name)
            pool = source.load() if missing else None
            wording, vectors = None, None
            for cell in missing:
                assert pool is not None
                trial = draw(pool, cell.kind, cell.level, cell.k, cell.seed)
                if cell.kind in TEXT_KINDS and cell.level:
                    assert pool.test_texts is not None
                    if wording != (cell.kind, cell.level, cell.seed):
                        wording = (cell.kind, cell.level, cell.seed)
                        vectors = embed(reworded(pool.test_texts, *wording))
                    assert vectors is not None
                    trial = Trial(**vars(trial) | {"queries": vectors})
                write_once(folder / cell.file_name, asdict(cell) | {"sides": measure(trial, loaded, cell.seed)})
                progress.advance(bar)
    rows = []
    for cells in wanted.values():
        for cell in cells:
            tree = json.loads((folder / cell.file_name).read_text())
            rows += [asdict(cell) | {"side": side} | result for side, result in tree["sides"].items()]
    return rows


def write_once(path: Path, tree: dict[str, Any]) -> None:
    """The file is there whole or not at all."""
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(tree) + "\n")
    part.replace(path)


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over sets and seeds for every k, kind, level and side.

    `lost` is the accuracy lost to the kind's first level in the same draws, `lost_error` its standard error over them.
    """
    of_cell = {(r["set"], r["kind"], r["level"], r["k"], r["seed"], r["side"]): r for r in rows}
    groups: dict[tuple[int, str, float, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["k"], row["kind"], row["level"], row["side"]), []).append(row)
    found = []
    for (k, kind, level, side), members in groups.items():
        whole = [of_cell[r["set"], kind, LEVELS[kind][0], k, r["seed"], side]["accuracy"] for r in members]
        accuracy = np.array([r["accuracy"] for r in members])
        lost = np.array(whole) - accuracy
        errors = [r["calibration_error"] for r in members if r["calibration_error"] is not None]
        found.append(
            {
                "k": k,
                "kind": kind,
                "level": level,
                "side": side,
                "accuracy": float(accuracy.mean()),
                "lost": float(lost.mean()),
                "lost_error": float(lost.std(ddof=1) / len(lost) ** 0.5) if len(lost) > 1 else None,
                "calibration_error": float(np.mean(errors)) if errors else None,
                "num_draws": len(members),
            }
        )
    return found


def table_of(found: Sequence[dict[str, Any]], k: int) -> Table:
    table = Table(title=f"accuracy (mean recall, per cent) and what is lost to the perturbation, k = {k}")
    for name, justify in (("kind", "left"), ("level", "right"), *((side, "right") for side in SIDES)):
        table.add_column(name, justify=justify)  # pyright: ignore[reportArgumentType]
    table.add_column("module's ECE", justify="right")
    table.add_column("LR's ECE", justify="right")
    at = {(one["kind"], one["level"], one["side"]): one for one in found if one["k"] == k}
    for kind, levels in LEVELS.items():
        for level in levels:
            if (kind, level, "module") not in at:
                continue
            cells = [at[kind, level, side] for side in SIDES]
            figures = [f"{100 * c['accuracy']:.1f} ({0.0 - 100 * c['lost']:+.1f})" for c in cells]
            errors = [f"{at[kind, level, side]['calibration_error']:.3f}" for side in ("module", "LogisticRegression")]
            first = level == levels[0]
            table.add_row(kind if first else "", f"{level:g}", *figures, *errors, end_section=level == levels[-1])
    return table


def picture(found: Sequence[dict[str, Any]], k: int, path: Path, title: str) -> None:
    """A panel a kind: accuracy of every side over the levels, with two standard errors of the loss."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    of_k = [one for one in found if one["k"] == k]
    kinds = [kind for kind in LEVELS if any(one["kind"] == kind for one in of_k)]
    num_columns = 4 if len(kinds) % 4 == 0 else min(5, len(kinds))
    num_rows = -(-len(kinds) // num_columns)
    figure, axes = pyplot.subplots(
        num_rows, num_columns, figsize=(3 * num_columns, 2.7 * num_rows + 0.5), sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for panel in axes.flat[len(kinds) :]:
        panel.set_axis_off()
    for panel, kind in zip(axes.flat, kinds, strict=False):
        for side in SIDES:
            points = sorted(
                (one for one in of_k if (one["kind"], one["side"]) == (kind, side)), key=lambda o: o["level"]
            )
            levels, accuracy = (np.array([one[name] for one in points]) for name in ("level", "accuracy"))
            error = 2 * np.array([one["lost_error"] or 0.0 for one in points])
            (line,) = panel.plot(
                range(len(levels)), 100 * accuracy, marker="o", markersize=3, label=side,
                linewidth=2 if side == "module" else 1, zorder=3 if side == "module" else 2,
            )  # fmt: skip
            panel.fill_between(
                range(len(levels)), 100 * (accuracy - error), 100 * (accuracy + error), alpha=0.12,
                color=line.get_color(), linewidth=0,
            )  # fmt: skip
        panel.set_xticks(range(len(LEVELS[kind])), [f"{level:g}" for level in LEVELS[kind]])
        panel.set_title(kind, fontsize=10)
        panel.set_xlabel(AXIS[kind], fontsize=9)
        panel.grid(alpha=0.3)
    for row in axes:
        row[0].set_ylabel("accuracy (%)")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=len(SIDES), frameon=False)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def check_same_run(out: Path, settings: dict[str, Any]) -> None:
    """Writes what is measured into OUT, or raises InvalidSettings when OUT holds measurements of something else."""
    path = out / "run.json"
    if path.exists():
        if (found := json.loads(path.read_text())) != settings:
            differs = ", ".join(sorted(name for name in settings if found.get(name) != settings[name]))
            raise InvalidSettings("--out", str(out), f"another directory: this one's measurements differ in {differs}")
        return
    out.mkdir(parents=True, exist_ok=True)
    write_once(path, settings)


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        prog="python -m jobs.evaluate_robustness",
        description=__doc__,
        epilog="\n".join(f"{kind}: {meaning}" for kind, meaning in MEANING.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--data", type=Path, help="directory of Parquet files; without it scikit-learn's sets")
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--module", default="default", help="default, a shipped name, or a folder")
    p.add_argument("--encoder", help="of the texts; by default the first of the profile laptop")
    p.add_argument("--k", default="64", help="examples, separated by commas; two a class at least")
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--test", type=int, default=100, help="held-out texts of a set")
    p.add_argument("--characters", type=int, default=250, help="texts are cut to this before anything is added")
    arguments = p.parse_args(argv)
    ks = [int(k) for k in arguments.k.split(",")]
    try:
        loaded = shipped.load(arguments.module)
        embed: Embed = lambda texts: np.empty((len(texts), 0))  # noqa: E731 (vectors need none)
        encoder_digest = None
        if arguments.data is not None:
            encoder = encoders.load(arguments.encoder or settings_of.read("laptop").encoders[0].source)
            embed, encoder_digest = encoder.embed, encoder.digest
        sources = (
            built_in()
            if arguments.data is None
            else text_sets(arguments.data, embed, arguments.test, arguments.characters)
        )
        settings = {
            "module": loaded.digest,
            "encoder": encoder_digest,
            "sets": {source.name: source.digest for source in sources},
            "ks": ks,
            "seeds": arguments.seeds,
            "test": arguments.test,
            "characters": arguments.characters,
            "levels": {kind: list(levels) for kind, levels in LEVELS.items()},
        }
        check_same_run(arguments.out, settings)
        rows = run(sources, ks, arguments.seeds, loaded, embed, arguments.out)
    except MetasepiaError as error:
        print(error, file=sys.stderr)
        return 2
    found = summary(rows)
    pq.write_table(pa.Table.from_pylist(rows), arguments.out / "robustness.parquet")
    write_once(
        arguments.out / "robustness.json",
        {"settings": settings, "module": loaded.name, "meaning": MEANING, "summary": found},
    )
    for k in ks:
        Console(width=140).print(table_of(found, k))
        title = f"{loaded.name} {short(loaded.digest)}, k = {k}, {len(sources)} sets, {arguments.seeds} seeds"
        picture(found, k, arguments.out / f"robustness-k{k}.png", title)
    print(f"{len(rows)} measurements in {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
