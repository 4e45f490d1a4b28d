"""Reads the table of an instruction sweep: curves of one trial, and what each trial came to.

`Summary` holds the figures that the sweep is asked for, one trial each; `kinds` brings trials together that differ in
their seed alone.
"""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from metasepia.instructions.measures import named
from metasepia.instructions.tasks import INSTRUCTION_END, LAST
from metasepia.instructions.trial import InstructionTrial

EARLY_SHARE = 0.5
"""Accuracy and clusters are correlated over this first share of the steps, in which they rise."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What one trial came to at its end, on unseen strings; NaN throughout for one that diverged."""

    accuracy: float
    ari_task: float
    """At the instruction's end, in the layer where it is highest; ARI is 1 for clusters that are the tasks."""
    ari_task_gain: float
    """Of that layer, above its own value before training: random weights cluster a little, too."""
    layer: int
    """Where it is highest."""
    ari_task_layer0: float
    ari_shuffled: float
    """The same clusters against shuffled labels, the largest of all layers."""
    last_ari_output: float
    """At the last token, in the layer where it is highest."""
    last_ari_task: float
    """At the last token, in the last layer."""
    flips_layer1: float
    """Answers that become the other task's when its centroid replaces the state after block 1."""
    flips_held_layer1: float
    """When it stands there, and the other's centroids of all later layers in their places."""
    flips_added_layer1: float
    """When the difference of centroids is added."""
    flips_shuffled: float
    """When centroids are those of shuffled labels, the largest of all layers."""
    kept_own: float
    """Answers that stay when the own task's centroid replaces the state after block 1."""
    flips_last_layer: float
    spearman: float
    """Rank correlation, over steps of the first half, of the highest ARI of a step and accuracy."""
    diverged: int = -1


class Table:
    """The rows of a sweep, by trial."""

    def __init__(self, table: pa.Table, trials: Sequence[InstructionTrial], ended: Sequence[int] | None = None) -> None:
        """`ended`: the trials that are whole, None for all; nothing is asked of the others."""
        self.trials = tuple(trials)
        self.ended = tuple(range(len(trials)) if ended is None else sorted(ended))
        self._values: dict[tuple[int, str, int, str], dict[int, float]] = {}
        self.diverged: dict[int, int] = {}
        """Trial to the step at which its loss was no number."""
        columns = [table[name].to_pylist() for name in ("trial", "metric", "position", "split", "step", "value")]
        for trial, metric, position, split, step, value in zip(*columns, strict=True):
            if metric == "diverged":
                self.diverged[trial] = int(value)
            else:
                self._values.setdefault((trial, metric, position, split), {})[step] = value

    def curve(self, trial: int, metric: str, position: int = LAST, split: str = "unseen") -> dict[int, float]:
        """By step; empty where nothing was measured."""
        return dict(sorted(self._values.get((trial, metric, position, split), {}).items()))

    def layers(self, trial: int, score: str, of: str, position: int) -> list[dict[int, float]]:
        """A curve for each layer, from 0."""
        return [self.curve(trial, named(score, of, layer), position) for layer in range(self.trials[trial].layers + 1)]

    def summary(self, trial: int) -> Summary:
        if trial in self.diverged:
            missing = {field.name: math.nan for field in dataclasses.fields(Summary)}
            return Summary(**{**missing, "layer": -1, "diverged": self.diverged[trial]})  # pyright: ignore[reportArgumentType]
        layers, end = self.trials[trial].layers, max(self.curve(trial, "accuracy"))

        def last(score: str, of: str, position: int = INSTRUCTION_END) -> list[float]:
            return [curve[end] for curve in self.layers(trial, score, of, position)]

        ari = last("ari", "task")
        layer = int(np.argmax(ari))
        flips = last("flips", "replace")
        return Summary(
            accuracy=self.curve(trial, "accuracy")[end],
            ari_task=ari[layer],
            ari_task_gain=ari[layer] - self.layers(trial, "ari", "task", INSTRUCTION_END)[layer][0],
            layer=layer,
            ari_task_layer0=ari[0],
            ari_shuffled=max(last("ari_shuffled", "task")),
            last_ari_output=max(last("ari", "output", LAST)),
            last_ari_task=last("ari", "task", LAST)[layers],
            flips_layer1=flips[1],
            flips_held_layer1=last("flips", "hold")[1],
            flips_added_layer1=last("flips", "add")[1],
            flips_shuffled=max(last("flips", "shuffled")),
            kept_own=last("kept", "own")[1],
            flips_last_layer=flips[layers],
            spearman=self.spearman(trial),
        )

    def spearman(self, trial: int) -> float:
        """Rank correlation of accuracy and the highest ARI of any layer, over the steps of the first half."""
        from scipy.stats import spearmanr

        until = EARLY_SHARE * self.trials[trial].num_steps
        accuracy = {step: value for step, value in self.curve(trial, "accuracy").items() if step <= until}
        curves = self.layers(trial, "ari", "task", INSTRUCTION_END)
        highest = [max(curve[step] for curve in curves) for step in accuracy]
        if len(set(highest)) < 2 or len(set(accuracy.values())) < 2:
            return math.nan
        return float(spearmanr(list(accuracy.values()), highest).statistic)  # pyright: ignore[reportAttributeAccessIssue]


def kinds(table: Table) -> dict[InstructionTrial, list[int]]:
    """Ended trials that differ in their seed alone, by the settings that they share (seed 0 in the key), in order."""
    found: dict[InstructionTrial, list[int]] = {}
    for index in table.ended:
        found.setdefault(dataclasses.replace(table.trials[index], seed=0), []).append(index)
    return found


def medians(summaries: Sequence[Summary]) -> Mapping[str, float]:
    """The median of each figure; diverged trials are left out, and none left gives NaN."""
    whole = [one for one in summaries if one.diverged < 0]
    names = [field.name for field in dataclasses.fields(Summary) if field.name not in ("layer", "diverged")]
    return {name: statistics.median([getattr(one, name) for one in whole]) if whole else math.nan for name in names}
