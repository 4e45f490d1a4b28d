"""Scores every layer by how well it tells tasks apart, beside controls, on texts that were held out.

K-means, the tasks' means and the scaling are fitted to the fitting texts; held-out texts are put to the nearest centre
or mean. Three controls say what is no news: `embedding`, the mean of the input embeddings (a layer below 0: words
without order or context); `words`, tf-idf of the words; and shuffled labels. A layer tells tasks apart where it scores
above the best of the three by more than the resamples' spread: the difference is taken resample by resample.

Where texts come by templates, `ari_across` is over pairs of texts by different templates: clusters of templates do not
count there as clusters of tasks.

Intervals are percentiles of a bootstrap over held-out templates (texts, where there are too few templates), for the
clusters found: they do not hold the chance of k-means' starts, nor do they allow for many layers being looked at. The
best layer is chosen on the fitting texts, so its held-out score is no maximum over layers.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool, Float, Int

from metasepia import clustering
from metasepia.errors import InvalidSettings
from metasepia.layerwise.states import States
from metasepia.layerwise.texts import TaskTexts

Scaling = Literal["standard", "unit", "raw"]
SCALINGS: tuple[Scaling, ...] = ("standard", "unit", "raw")
FEWEST_GROUPS = 12
"""Fewer held-out templates are too few to resample; then texts are drawn, and the interval says less."""
MOST_WORDS = 4096

SCHEMA = pa.schema(
    [
        pa.field("pooling", pa.string(), nullable=False),
        pa.field("features", pa.string(), nullable=False),
        pa.field("layer", pa.int32(), nullable=False),
        pa.field("metric", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("value", pa.float64(), nullable=False),
        pa.field("low", pa.float64()),
        pa.field("high", pa.float64()),
    ]
)
"""`features`: layer, embedding or words, the last two with layer -1 and pooling "". `low`, `high`: 95 % interval."""


@dataclass(frozen=True, kw_only=True)
class MeasureSettings:
    """How states are scored."""

    k: int = 0
    """Clusters; 0: as many as there are tasks."""
    scaling: Scaling = "standard"
    """standard: each dimension to mean 0 and deviation 1 over the fitting texts, so that the few huge dimensions of
    trained models do not decide alone; unit: each state to length 1; raw: as it is."""
    resamples: int = 1000
    permutations: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        if self.k < 0:
            raise InvalidSettings("k", self.k, "0 (auto), or at least 1")
        if self.scaling not in SCALINGS:
            raise InvalidSettings("scaling", self.scaling, f"one of {', '.join(SCALINGS)}")
        if self.resamples < 20:
            raise InvalidSettings("resamples", self.resamples, "at least 20")


@dataclass(frozen=True)
class Value:
    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Scored:
    """One kind of states, scored."""

    pooling: str
    features: Literal["layer", "embedding", "words"]
    layer: int
    values: dict[tuple[str, str], Value]
    """By metric and split, `fit` or `held_out`."""
    draws: dict[str, Float[np.ndarray, " resamples"]]
    """Held-out `ari` and `accuracy` of each resample, the same resamples for all."""
    found: Int[np.ndarray, " texts"]
    """Cluster of each held-out text."""

    def __getitem__(self, key: tuple[str, str]) -> Value:
        return self.values[key]


class Measures:
    """What all layers are scored with: one split, one set of resamples."""

    def __init__(self, texts: TaskTexts, held: Bool[np.ndarray, " texts"], settings: MeasureSettings) -> None:
        self.texts, self.held, self.settings = texts, held, settings
        tasks = np.asarray(texts.tasks)
        self.fit_tasks, self.held_tasks = tasks[~held], tasks[held]
        self.k = settings.k or len(texts.names)
        self._inputs = self._shared_inputs()
        groups = np.asarray(texts.groups())[held]
        self._templates = groups if any(texts.templates) else None
        self.unit = "template" if len(set(groups.tolist())) >= FEWEST_GROUPS and any(texts.templates) else "text"
        if self.unit == "text":
            groups = np.arange(int(held.sum()))
        self.resamples = clustering.Resamples.of(groups, settings.resamples, settings.seed)

    def layers(self, states: States, poolings: Sequence[Any], layers: Sequence[int]) -> Iterator[Scored]:
        for pooling in poolings:
            for layer in layers:
                yield self.score(states.layer(pooling, layer), pooling=pooling, features="layer", layer=layer)

    def controls(self, states: States) -> list[Scored]:
        """The mean embedding and the bag of words."""
        return [
            self.score(states.embedding(), pooling="", features="embedding", layer=-1),
            # k-means on tf-idf wants rows of length 1: each word to deviation 1 would let the rarest decide
            self.score(self._words(), pooling="", features="words", layer=-1, scaling="unit"),
        ]

    def score(
        self, states: np.ndarray, *, pooling: str, features: Any, layer: int, scaling: Scaling | None = None
    ) -> Scored:
        """`scaling`: None is that of the settings."""
        seed, held_tasks = self.settings.seed, self.held_tasks
        fit, held = self.scaled(states, scaling)
        clusters = clustering.clusters(fit, self.k, seed)
        found = clusters.nearest(held)
        centroids = clustering.Centroids.of(fit, self.fit_tasks)
        right = centroids.right(held, held_tasks)
        draws = {
            "ari": self.resamples.adjusted_rand(found, held_tasks),
            "accuracy": self.resamples.mean(right),
        }
        across = {}
        if self._templates is not None:
            value = clustering.adjusted_rand_across(found, held_tasks, self._templates)
            drawn = (
                self.resamples.adjusted_rand(found, held_tasks, across_only=True) if self.unit == "template" else None
            )
            across["ari_across", "held_out"] = Value(value) if drawn is None else self._value(value, drawn)
        silhouettes = clustering.silhouettes(held, held_tasks) if len(held) <= clustering.MOST_SILHOUETTE else None
        values = {
            ("ari", "held_out"): self._value(clustering.adjusted_rand(found, held_tasks), draws["ari"]),
            ("nmi", "held_out"): Value(clustering.nmi(found, held_tasks)),
            ("accuracy", "held_out"): self._value(float(right.mean()), draws["accuracy"]),
            ("margin", "held_out"): Value(float(centroids.nearest(held)[1].mean())),
            ("silhouette", "held_out"): Value(clustering.silhouette(held, held_tasks, seed))
            if silhouettes is None
            else self._value(float(silhouettes.mean()), self.resamples.mean(silhouettes)),
        }
        assigned, permutations = clusters.assignment, self.settings.permutations
        of_fit = {
            "ari": clustering.adjusted_rand(assigned, self.fit_tasks),
            "nmi": clustering.nmi(assigned, self.fit_tasks),
            "silhouette": clustering.silhouette(fit, self.fit_tasks, seed),
            "clusters": float(len(clusters.centres)),
            **clustering.shuffled(assigned, self.fit_tasks, seed, permutations=permutations),
        }
        values |= across | {(name, "fit"): Value(value) for name, value in of_fit.items()}
        by_chance = clustering.shuffled(found, held_tasks, seed, permutations=permutations)
        values |= {(name, "held_out"): Value(value) for name, value in by_chance.items()}
        values["accuracy_shuffled", "held_out"] = Value(self._accuracy_by_chance(fit, held))
        return Scored(pooling, features, layer, values, draws, found)

    def above(self, scored: Scored, controls: Sequence[Scored], metric: str) -> Value:
        """By how much a layer's held-out `metric` exceeds the best of the controls and of shuffled tasks.

        In each resample it is set beside what is best there; shuffled tasks are taken as their mean.
        """
        by_chance = scored[f"{metric}_shuffled", "held_out"].value
        best = max(by_chance, *(one[metric, "held_out"].value for one in controls))
        draws = np.maximum(by_chance, np.max([one.draws[metric] for one in controls], axis=0))
        return self._value(scored[metric, "held_out"].value - best, scored.draws[metric] - draws)

    def table(self, layers: Iterable[Scored], controls: Sequence[Scored]) -> pa.Table:
        """One row a kind of states, metric and split; for layers also `ari_above` and `accuracy_above` of `above`."""
        rows: list[dict[str, Any]] = []
        for one in [*controls, *layers]:
            values = dict(one.values)
            if one.features == "layer":
                values |= {
                    (f"{name}_above", "held_out"): self.above(one, controls, name) for name in ("ari", "accuracy")
                }
            rows += [
                {
                    "pooling": one.pooling, "features": one.features, "layer": one.layer, "metric": metric,
                    "split": split, "value": v.value, "low": v.low, "high": v.high,
                }
                for (metric, split), v in sorted(values.items())
            ]  # fmt: skip
        return pa.Table.from_pylist(rows, SCHEMA)

    def scaled(self, states: np.ndarray, scaling: Scaling | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Fitting and held-out states, without the mean of the fitting ones that hold the same input (where texts say
        which), scaled.
        """
        points = np.asarray(states, np.float64)
        scaling = scaling or self.settings.scaling
        if scaling == "unit":
            lengths = np.linalg.norm(points, axis=1, keepdims=True)
            points = np.divide(points, lengths, out=np.zeros_like(points), where=lengths > 0)
        if self._inputs is not None:
            sums = np.zeros((int(self._inputs.max()) + 1, points.shape[1]))
            np.add.at(sums, self._inputs[~self.held], points[~self.held])
            points = points - (sums / np.bincount(self._inputs[~self.held])[:, None])[self._inputs]
        fit, held = points[~self.held], points[self.held]
        if scaling == "standard":
            mean, deviation = fit.mean(0), fit.std(0)
            # A dimension that is constant but for rounding would become noise as large as any signal.
            alive = deviation > clustering.ROUNDING * np.abs(mean)
            scale = np.divide(1.0, deviation, out=np.zeros_like(deviation), where=alive)
            fit, held = (fit - mean) * scale, (held - mean) * scale
        return fit, held

    def _shared_inputs(self) -> Int[np.ndarray, " texts"] | None:
        """The input of each text, as a number. Raises InvalidSettings unless fitting texts of two tasks hold it."""
        if not self.texts.inputs:
            return None
        tasks_of: dict[str, set[str]] = {one: set() for one in self.texts.inputs}
        for one, task, held in zip(self.texts.inputs, self.texts.tasks, self.held, strict=True):
            if not held:
                tasks_of[one].add(task)
        alone = sorted(one for one, tasks in tasks_of.items() if len(tasks) < 2)
        if alone:
            allowed = f"an input that texts of two tasks or more hold; {len(alone)} of {len(tasks_of)} are not shared"
            raise InvalidSettings("within", alone[0], allowed)
        return np.unique(np.asarray(self.texts.inputs), return_inverse=True)[1]

    def _words(self) -> np.ndarray:
        """tf-idf of words and pairs of words, weighted by the fitting texts, rows of length 1."""
        from sklearn.feature_extraction.text import TfidfVectorizer

        made = TfidfVectorizer(
            max_features=MOST_WORDS, ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\b\w+\b|[^\w\s]"
        )
        texts = np.asarray(self.texts.texts, object)
        made.fit(texts[~self.held].tolist())
        return made.transform(texts.tolist()).toarray()

    def _accuracy_by_chance(self, fit: np.ndarray, held: np.ndarray) -> float:
        """Mean accuracy of the means of shuffled tasks."""
        rights = [
            clustering.Centroids.of(fit, np.random.default_rng((self.settings.seed, i)).permutation(self.fit_tasks))
            for i in range(self.settings.permutations)
        ]
        return float(np.mean([one.accuracy(held, self.held_tasks) for one in rights]))

    def _value(self, value: float, draws: Float[np.ndarray, " resamples"]) -> Value:
        low, high = np.quantile(draws, (0.025, 0.975))
        return Value(value, float(low), float(high))


def write(table: pa.Table, path: Path) -> None:
    """Whole or not at all, and the same bytes for the same table."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        pq.write_table(table, scratch, compression="zstd")
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


@dataclass(frozen=True)
class Finding:
    """What one pooling's layers say."""

    pooling: str
    best: Scored
    """The layer with the highest ARI on the fitting texts; the earliest of equals."""
    apart: tuple[int, ...]
    """Layers whose held-out ARI exceeds all controls, the whole interval above 0."""
    routed: tuple[int, ...]
    """The same of nearest-mean accuracy."""


def find(measures: Measures, layers: Sequence[Scored], controls: Sequence[Scored], pooling: str) -> Finding:
    own = [one for one in layers if one.pooling == pooling]
    best = max(own, key=lambda one: (one["ari", "fit"].value, -one.layer))

    def above(metric: str) -> tuple[int, ...]:
        return tuple(one.layer for one in own if (measures.above(one, controls, metric).low or 0) > 0)

    return Finding(pooling, best, above("ari"), above("accuracy"))


def contingency(measures: Measures, scored: Scored) -> tuple[tuple[str, ...], Int[np.ndarray, "tasks clusters"]]:
    """How many held-out texts of each task each cluster got."""
    names, codes = np.unique(measures.held_tasks, return_inverse=True)
    counts = np.zeros((len(names), int(scored.found.max()) + 1), np.int64)
    np.add.at(counts, (codes, scored.found), 1)
    return tuple(map(str, names)), counts
