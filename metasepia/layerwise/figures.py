"""The figures of a layer-by-layer reading, as PNG bytes: the same for the same numbers."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from metasepia.clustering import ROUNDING
from metasepia.layerwise.measures import Scored

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F5539", "#6b6f76")
"""Okabe and Ito's, which colour-blind readers tell apart, but for the last two."""
PANELS = {"ari": "ARI of k-means with tasks", "accuracy": "nearest-mean accuracy", "silhouette": "silhouette of tasks"}
CONTROLS = {"embedding": ("mean embedding", "--", "#444444"), "words": ("bag of words", ":", "#444444")}


def by_layer(layers: Sequence[Scored], controls: Sequence[Scored]) -> bytes:
    """Held-out ARI, accuracy and silhouette by layer, with intervals; controls and chance as level lines."""
    plt = _pyplot()
    figure, axes = plt.subplots(1, len(PANELS), figsize=(4.1 * len(PANELS), 3.6), layout="constrained")
    poolings = list(dict.fromkeys(one.pooling for one in layers))
    for axis, (metric, title) in zip(axes, PANELS.items(), strict=True):
        for pooling, colour in zip(poolings, COLOURS, strict=False):
            own = [one for one in layers if one.pooling == pooling]
            at = [one.layer for one in own]
            values = [one[metric, "held_out"] for one in own]
            low = [v.value if v.low is None else v.low for v in values]
            high = [v.value if v.high is None else v.high for v in values]
            axis.fill_between(at, low, high, color=colour, alpha=0.18, linewidth=0)
            axis.plot(at, [v.value for v in values], "o-", color=colour, markersize=3.5, label=f"layers, {pooling}")
        for one in controls:
            name, style, colour = CONTROLS[one.features]
            axis.axhline(one[metric, "held_out"].value, linestyle=style, color=colour, linewidth=1.2, label=name)
        if metric != "silhouette":
            by_chance = float(np.mean([one[f"{metric}_shuffled", "held_out"].value for one in layers]))
            axis.axhline(by_chance, color="#b0b0b0", linewidth=1.2, label="shuffled tasks")
            axis.set_ylim(min(-0.05, axis.get_ylim()[0]), 1.03)
        axis.set(title=title, xlabel="layer (0: embedding)")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.25)
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)
    return _png(figure)


def projections(
    states: Mapping[str, tuple[np.ndarray, np.ndarray]], fit_tasks: np.ndarray, held_tasks: np.ndarray
) -> bytes:
    """Each title's (fitting, held-out) states on the two main axes of the fitting ones; held-out texts are rings."""
    plt = _pyplot()
    columns = 2 if len(states) in (2, 4) else len(states)
    rows = -(-len(states) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.6 * columns, 3.9 * rows), layout="constrained", squeeze=False)
    names = sorted({*map(str, fit_tasks), *map(str, held_tasks)})
    for axis, (title, (fit, held)) in zip(axes.flat, states.items(), strict=True):
        shown, rest, shares = principal(fit, held)
        for i, name in enumerate(names):
            colour = _colour(i, len(names))
            mine, theirs = shown[fit_tasks == name], rest[held_tasks == name]
            axis.scatter(mine[:, 0], mine[:, 1], s=9, color=colour, alpha=0.55, linewidths=0, label=name)
            axis.scatter(theirs[:, 0], theirs[:, 1], s=20, facecolors="none", edgecolors=[colour], linewidths=0.9)
        axis.set(title=title, xticks=[], yticks=[])
        axis.set_xlabel(f"first axis, {shares[0]:.0%} of variance")
        axis.set_ylabel(f"second axis, {shares[1]:.0%}")
    if len(names) <= 16:
        handles, texts = axes.flat[0].get_legend_handles_labels()
        figure.legend(
            handles, texts, loc="outside lower center", ncols=min(6, len(names)), frameon=False, markerscale=2
        )
    return _png(figure)


def principal(fit: np.ndarray, held: np.ndarray) -> tuple[np.ndarray, np.ndarray, tuple[float, float]]:
    """Both on the two axes along which the fitting states vary most, and the shares of variance of these.

    Signs are fixed: each axis points to where its largest component is positive. States on a line have no second axis,
    constant ones none.
    """
    mean = fit.mean(0)
    centred = fit - mean
    _, s, vh = np.linalg.svd(centred, full_matrices=False)
    axes = np.zeros((2, fit.shape[1]))
    alive = min(2, int((s > ROUNDING * s[0]).sum()))
    axes[:alive] = vh[:alive]
    axes *= np.where(np.take_along_axis(axes, np.abs(axes).argmax(1)[:, None], 1) < 0, -1, 1)
    total = float(np.square(s).sum())
    first, second = (*(np.square(s[:2]) / total if total else np.zeros(2)), 0.0)[:2]
    return centred @ axes.T, (held - mean) @ axes.T, (float(first), float(second))


def _colour(i: int, count: int) -> Any:
    if count <= len(COLOURS):
        return COLOURS[i]
    from matplotlib import colormaps

    return colormaps["turbo"]((i + 0.5) / count)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _png(figure: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110, metadata={"Software": None})
    _pyplot().close(figure)
    return file.getvalue()
