"""Pictures of an instruction sweep, each as the bytes of a PNG. Needs matplotlib (the extra `train`)."""

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from metasepia.errors import NotSupported
from metasepia.instructions.interventions import PATCHES
from metasepia.instructions.measures import CLUSTERED, POSITIONS
from metasepia.instructions.results import Table
from metasepia.instructions.tasks import INSTRUCTION_END, LAST

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WHERE = {INSTRUCTION_END: "instruction's end", LAST: "last token"}
_PATCH = {
    "replace": "replaced by the other task's centroid",
    "hold": "and held there in all later layers",
    "add": "difference of centroids added",
    "shuffled": "centroid under shuffled labels",
    "own": "own task's centroid (answer stays)",
}


def _figure(width: float, height: float) -> "Figure":
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise NotSupported("drawing", "install matplotlib (the extra `train`)") from None
    return Figure(figsize=(width, height), layout="constrained")


def _png(figure: "Figure") -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110, metadata={"Software": None})
    return file.getvalue()


def _colours(count: int) -> list[Any]:
    from matplotlib import colormaps

    return [colormaps["viridis"](i / max(1, count - 1) * 0.92) for i in range(count)]


def dynamics(table: Table, trials: Sequence[int], title: str) -> bytes:
    """ARI of every layer against steps beside accuracy, for each position and labels: medians and ranges over trials.

    Trials differ in their seed alone.
    """
    first = table.trials[trials[0]]
    figure = _figure(13.0, 3.9)
    panels: Sequence[Axes] = figure.subplots(1, len(CLUSTERED), sharey=True)
    colours = _colours(first.layers + 1)
    for panel, (position, of) in zip(panels, CLUSTERED, strict=True):
        for layer, colour in enumerate(colours):
            curves = [table.layers(one, "ari", of, position)[layer] for one in trials]
            _band(panel, curves, color=colour, label=f"layer {layer}", linewidth=1.6)
        accuracy = [table.curve(one, "accuracy") for one in trials]
        _band(panel, accuracy, color="black", label="accuracy, unseen strings", linewidth=1.4, linestyle="--")
        panel.set(title=f"{_WHERE[position]}, by {of}", xlabel="step", ylim=(-0.05, 1.05))
        # Half of the measurements lie in the first quarter: there it happens.
        panel.set_xscale("function", functions=(np.sqrt, np.square))
        panel.set_xlim(0, first.num_steps)
        panel.set_xticks([round(first.num_steps * share) for share in (0, 0.05, 0.25, 0.5, 1)])
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("ARI of k-means clusters, accuracy")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=8, frameon=False)
    figure.suptitle(title, fontsize=11)
    return _png(figure)


def _band(panel: "Axes", curves: Sequence[Mapping[int, float]], **style: Any) -> None:
    """Median and range of curves over the same steps."""
    steps = list(curves[0])
    values = np.array([[curve[step] for step in steps] for curve in curves])
    panel.plot(steps, np.median(values, 0), **style)
    panel.fill_between(steps, values.min(0), values.max(0), color=style["color"], alpha=0.12, linewidth=0)


def patches(table: Table, sides: Mapping[str, Sequence[int]], title: str) -> bytes:
    """Share of patched answers by layer at the end, one panel a side (a mask), one line a kind of patch."""
    figure = _figure(5.2 * len(sides), 4.1)
    panels: Sequence[Axes] = figure.subplots(1, len(sides), sharey=True, squeeze=False)[0]
    for panel, (name, trials) in zip(panels, sides.items(), strict=True):
        layers = range(table.trials[trials[0]].layers + 1)
        styles = (("C0", "-"), ("C3", ":"), ("C1", "--"), ("C7", "-"), ("C2", "-"))  # where lines meet, all show
        for patch, (colour, dashes) in zip(PATCHES, styles, strict=True):
            score = "kept" if patch == "own" else "flips"
            curves = [table.layers(one, score, patch, INSTRUCTION_END) for one in trials]
            shares = np.array([[curve[max(curve)] for curve in of_trial] for of_trial in curves])
            median = np.median(shares, 0)
            panel.plot(layers, median, dashes, color=colour, marker="o", markersize=4, linewidth=2, label=_PATCH[patch])
            panel.fill_between(layers, shares.min(0), shares.max(0), color=colour, alpha=0.15, linewidth=0)
        panel.set_title(name, fontsize=10)
        panel.set(xlabel="layer whose state is patched", ylim=(-0.05, 1.05), xticks=list(layers))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("share of answers that flip (or stay)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(title, fontsize=11)
    return _png(figure)


def projections(
    kept: Mapping[int, Tensor],
    task: Int[Tensor, " points"],
    output: Int[Tensor, " points"],
    rows: Sequence[tuple[int, int, str]],
    title: str,
) -> bytes:
    """States on their two principal components at several steps, a column a step.

    `kept`: by step [layers, points, positions, width] (`InstructionPack.kept`). A row is (layer, position, "task" or
    "output"): what is shown, and what its points are coloured by. Every panel has components of its own.
    """
    from matplotlib import colormaps

    figure = _figure(2.7 * len(kept) + 0.4, 2.6 * len(rows) + 0.5)
    panels = figure.subplots(len(rows), len(kept), squeeze=False)
    labels = {"task": task.numpy(), "output": output.numpy()}
    for place, (layer, position, of) in enumerate(rows):
        for panel, (step, states) in zip(panels[place], kept.items(), strict=True):
            points, explained = _principal(states[layer, :, POSITIONS.index(position)].double().numpy())
            codes = labels[of][: len(points)]
            colours = colormaps["tab10" if codes.max() < 10 else "tab20"](codes % 20)
            panel.scatter(points[:, 0], points[:, 1], c=colours, s=12, linewidths=0, alpha=0.8)
            panel.set(xticks=[], yticks=[])
            panel.set_xlabel(f"{100 * explained:.0f} % of variance", fontsize=8)
            if place == 0:
                panel.set_title(f"step {step}", fontsize=10)
        panels[place][0].set_ylabel(f"layer {layer}, {_WHERE[position]}\ncoloured by {of}", fontsize=9)
    figure.suptitle(title, fontsize=11)
    return _png(figure)


def _principal(states: Float[np.ndarray, "points width"]) -> tuple[Float[np.ndarray, "points 2"], float]:
    """Two principal components, with the signs that make each one's largest coordinate positive; variance explained.

    Constant states lie at the origin and explain nothing.
    """
    centred = states - states.mean(0)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    if s[0] <= 1e-9 * max(1.0, float(np.abs(states).max())):
        return np.zeros((len(states), 2)), 0.0
    points = u[:, :2] * s[:2]
    if points.shape[1] < 2:
        points = np.pad(points, ((0, 0), (0, 1)))
    points *= np.sign(points[np.abs(points).argmax(0), [0, 1]]) + (points.max(0) == 0)
    return points, float((s[:2] ** 2).sum() / (s**2).sum())


def axis_effect(table: Table, groups: Mapping[Any, Sequence[int]], axis: str, title: str) -> bytes:
    """Against one axis: accuracy and clusters at the end, and the step at which accuracy first reached 0.9."""
    figure = _figure(9.0, 3.4)
    panels: Sequence[Axes] = figure.subplots(1, 2)
    places = range(len(groups))
    summaries = {value: [table.summary(one) for one in trials] for value, trials in groups.items()}
    for name, label in (("accuracy", "accuracy, unseen strings"), ("ari_task", "ARI(task), highest layer")):
        values = [[getattr(one, name) for one in of if one.diverged < 0] for of in summaries.values()]
        _points(panels[0], places, values, label)
    reached = [[_first_step(table.curve(one, "accuracy"), 0.9) for one in trials] for trials in groups.values()]
    _points(panels[1], places, [[one for one in of if one is not None] for of in reached], "accuracy 0.9")
    clustered = [
        [_first_step(_highest(table.layers(one, "ari", "task", INSTRUCTION_END)), 0.7) for one in trials]
        for trials in groups.values()
    ]
    _points(panels[1], places, [[one for one in of if one is not None] for of in clustered], "ARI(task) 0.7")
    panels[0].set(ylim=(-0.05, 1.05), ylabel="at the end", xlabel=axis)
    panels[1].set(ylabel="first step at which it is reached", xlabel=axis)
    panels[1].set_ylim(bottom=0)
    for panel in panels:
        panel.set_xticks(list(places), [str(value) for value in groups])
        panel.set_xlim(-0.5, len(groups) - 0.5)
        panel.legend(frameon=False, fontsize=9)
        panel.grid(alpha=0.3)
    figure.suptitle(title, fontsize=11)
    return _png(figure)


def _points(panel: "Axes", places: Sequence[int], values: Sequence[Sequence[float]], label: str) -> None:
    """Each value as a dot, medians joined; a place without values stays empty."""
    there = [(place, of) for place, of in zip(places, values, strict=True) if len(of)]
    if not there:
        return
    (line,) = panel.plot([place for place, _ in there], [float(np.median(of)) for _, of in there], label=label)
    dots = [(place, value) for place, of in there for value in of]
    panel.plot(*zip(*dots, strict=True), linestyle="", marker="o", markersize=4, alpha=0.6, color=line.get_color())


def _highest(curves: Sequence[Mapping[int, float]]) -> dict[int, float]:
    return {step: max(curve[step] for curve in curves) for step in curves[0]} if curves else {}


def _first_step(curve: Mapping[int, float], level: float) -> int | None:
    return next((step for step, value in curve.items() if value >= level), None)
