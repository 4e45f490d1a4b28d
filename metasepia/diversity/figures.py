"""The paper's figures (Raventos et al., arXiv:2306.15063) redrawn from a sweep's table, as PNG files in memory.

Needs matplotlib (the extra `train`); raises NotSupported without it.
"""

import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from metasepia.diversity.crossing import Crossing
from metasepia.diversity.findings import SPLIT_WORDS, Findings
from metasepia.diversity.measures import PATH_ALPHAS, SPLITS, path_metric
from metasepia.diversity.results import Group, spelled, tasks_spelled, words_of
from metasepia.errors import NotSupported

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by colour-blind readers; line styles say the same again.
_MODEL: dict[str, Any] = {"color": "#0072B2", "marker": "o", "markersize": 5, "linewidth": 2.0}
_POOL: dict[str, Any] = {"color": "#D55E00", "linestyle": "--", "linewidth": 1.6, "marker": "s", "markersize": 4}
_PRIOR: dict[str, Any] = {"color": "#00835D", "linestyle": "-.", "linewidth": 1.6, "marker": "^", "markersize": 4}
NAMES = {"dmmse": "dMMSE", "ridge": "ridge", "discrete": "the pool's posterior", "gaussian": "the Gaussian posterior"}


@dataclass(frozen=True)
class Picture:
    """A figure for a page; `name` is its file's, without the ending."""

    name: str
    title: str
    png: bytes
    caption: str
    alt: str
    """What it shows, in words, for those who do not see it."""


def pictures(findings: Findings) -> list[Picture]:
    """Every figure that the sweep has data for: three or four of each group, then those that compare groups."""
    made: list[Picture] = []
    for g, group in enumerate(findings.results.groups):
        if group.by_tasks:
            made += [_over_tasks(findings, g), _training(group, g), _positions(findings, g)]
            made += _paths(findings, g)
    return [*made, *_movement(findings), *_budgets(findings)]


def error_words(group: Group) -> str:
    """What the errors are of, with their unit."""
    if group.problem == "linear":
        return "noiseless squared error / D"
    return "squared error of the probability"


def _figure(columns: int, rows: int = 1, *, height: float = 3.3) -> tuple["Figure", list["Axes"]]:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise NotSupported("drawing figures", "matplotlib is not installed (the extra `train`)") from None
    figure = Figure(figsize=(4.7 * columns, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for one in axes:
        one.grid(alpha=0.25)
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _log_scale(axes: "Axes") -> None:
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    _plain_ticks(axes.yaxis, narrow=bool(high < 8 * low))


def _plain_ticks(axis: Any, *, narrow: bool = False) -> None:
    """Of a log axis, written out: 1, 2 and 5 in each decade; round numbers where it spans less than one."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    axis.set_major_locator(MaxNLocator(5) if narrow else LogLocator(subs=(1.0, 2.0, 5.0), numticks=20))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def _whole_numbers() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(integer=True)


def _png(figure: "Figure") -> bytes:
    held = io.BytesIO()
    figure.savefig(held, dpi=110, metadata={"Software": None})
    return held.getvalue()


def _over_tasks(findings: Findings, g: int) -> Picture:
    """Errors and distances against M, as the paper's figure 2."""
    group = findings.results.groups[g]
    of_pool, of_prior = group.estimators
    figure, axes = _figure(2, 2)
    sizes = list(group.by_tasks)
    for column, split in enumerate(SPLITS):
        top, bottom = axes[column], axes[2 + column]
        _lines(top, group, sizes, split, [("error", "model", _MODEL)])
        for name, style in ((of_pool, _POOL), (of_prior, _PRIOR)):
            _lines(top, group, sizes, split, [(f"{name}_error", NAMES[name], style)], seeds=False)
            _lines(bottom, group, sizes, split, [(f"delta_{name}", f"to {NAMES[name]}", style)])
        top.set(title=SPLIT_WORDS[split], ylabel=error_words(group), ylim=(0, None))
        bottom.set(ylabel="squared distance of the model" + (" / D" if group.problem == "linear" else ""))
        _log_scale(bottom)
        crossing = findings.crossings[g, split]
        if crossing is not None and crossing.found:
            _mark(bottom, crossing)
        for one in (top, bottom):
            _tasks_axis(one, sizes)
            one.legend(fontsize=8, framealpha=0.9)
    told = [
        f"on {SPLIT_WORDS[split]} the model is nearer {NAMES[of_prior]} than {NAMES[of_pool]} from: {crossing.text}"
        for split in SPLITS
        if (crossing := findings.crossings[g, split]) is not None
    ]
    return Picture(
        f"tasks-{g}",
        _titled("Against the number of pretraining tasks", group),
        _png(figure),
        "Above: errors of the model and of both estimators. Below: the model's squared distance to each. Lines are "
        "means over seeds, dots are seeds; the band is the 95 % interval of the crossing.",
        "Four panels over the number of tasks. " + "; ".join(told) + ".",
    )


def _lines(
    axes: "Axes", group: Group, sizes: Sequence[int | None], split: str, metrics: Iterable[Any], *, seeds: bool = True
) -> None:
    places = _places(sizes)
    finite = [i for i, m in enumerate(sizes) if m is not None]
    for metric, label, style in metrics:
        means = [group.mean(metric, split, m) for m in sizes]
        axes.plot([places[i] for i in finite], [means[i] for i in finite], label=label, **style)
        # Infinity lies on no line: a line to it would show figures between.
        beyond = [i for i in range(len(sizes)) if i not in finite]
        axes.plot([places[i] for i in beyond], [means[i] for i in beyond], **{**style, "linestyle": "none"})
        if seeds:
            for place, m in zip(places, sizes, strict=True):
                values = group.seed_values(metric, split, m)
                axes.plot([place] * len(values), values, ".", color=style["color"], alpha=0.45, markersize=4)


def _places(sizes: Sequence[int | None]) -> list[float]:
    """log2 M; the infinite pool stands a little beyond the largest."""
    largest = max((math.log2(m) for m in sizes if m is not None), default=0.0)
    return [largest + 2.0 if m is None else math.log2(m) for m in sizes]


def _tasks_axis(axes: "Axes", sizes: Sequence[int | None]) -> None:
    places = _places(sizes)
    every = 1 + (len(sizes) - 1) // 12
    shown = [i for i, m in enumerate(sizes) if i % every == 0 or m is None]
    axes.set_xticks([places[i] for i in shown], [_power(sizes[i]) for i in shown])
    axes.set_xlabel("pretraining tasks M")
    if None in sizes and len(sizes) > 1:
        axes.axvline(places[-1] - 1.0, color="#888888", linewidth=0.8, linestyle=":")


def _power(num_tasks: int | None) -> str:
    if num_tasks is None:
        return "∞"
    exponent = math.log2(num_tasks)
    return f"$2^{{{exponent:.0f}}}$" if exponent.is_integer() else str(num_tasks)


def _mark(axes: "Axes", crossing: Crossing) -> None:
    axes.axvline(crossing.log2_tasks, color="#444444", linewidth=1.2, label="crossing")
    low = max(crossing.low, math.log2(crossing.smallest))
    high = min(crossing.high, math.log2(crossing.largest))
    axes.axvspan(low, high, color="#444444", alpha=0.12, linewidth=0)


def _training(group: Group, g: int) -> Picture:
    """Distances along training, by M: the dip of the one to ridge is the transience of general solutions."""
    figure, axes = _figure(2)
    sizes = list(group.by_tasks)
    turned: list[str] = []
    for column, name in enumerate((group.estimators[1], group.estimators[0])):
        one = axes[column]
        for m, colour in zip(sizes, _colours(sizes), strict=True):
            curves = [group.results.curve(i, f"delta_{name}", "new") for i in group.by_tasks[m]]
            steps = curves[0][0]
            values = np.mean([curve[1] for curve in curves], axis=0)
            style: dict[str, Any] = {"linestyle": "--", "linewidth": 2.2} if m is None else {"linewidth": 1.6}
            one.plot(steps, values, color=colour, marker=".", label=f"M = {_power(m)}", **style)
            least = int(np.nanargmin(values)) if np.isfinite(values).any() else 0
            if column == 0 and m is not None and least < len(steps) - 1 and values[-1] > 1.1 * values[least]:
                turned.append(f"M = {tasks_spelled(m)} (nearest at step {steps[least]})")
        one.set(title=f"to {NAMES[name]}, new tasks", xlabel="training step", ylabel="squared distance of the model")
        one.set_xscale("log")
        _plain_ticks(one.xaxis)
        _log_scale(one)
    figure.legend(*axes[1].get_legend_handles_labels(), fontsize=8, loc="outside right center", frameon=False)
    prior = NAMES[group.estimators[1]]
    return Picture(
        f"training-{g}",
        _titled("Along training", group),
        _png(figure),
        f"Squared distance to each estimator on new tasks, by number of pretraining tasks; means over seeds. A curve "
        f"that falls and rises again comes near {prior} and leaves it.",
        f"Distances over training steps. Nearer {prior} on the way than at the end: {', '.join(turned) or 'none'}.",
    )


def _colours(sizes: Sequence[int | None]) -> list[Any]:
    from matplotlib import colormaps

    finite = [m for m in sizes if m is not None]
    shades = colormaps["viridis"](np.linspace(0.0, 0.88, max(1, len(finite))))
    return ["#000000" if m is None else shades[finite.index(m)] for m in sizes]


def chosen_sizes(findings: Findings, g: int) -> list[int | None]:
    """The smallest M, the one nearest the crossing on new tasks (or the middle one), and infinity or the largest."""
    group = findings.results.groups[g]
    sizes, finite = list(group.by_tasks), list(group.finite)
    if len(sizes) <= 3:
        return sizes
    crossing = findings.crossings[g, "new"]
    place = crossing.log2_tasks if crossing is not None and crossing.found else math.log2(finite[len(finite) // 2])
    middle = min(finite, key=lambda m: abs(math.log2(m) - place))
    return list(dict.fromkeys([sizes[0], middle, sizes[-1]]))


def _positions(findings: Findings, g: int) -> Picture:
    group = findings.results.groups[g]
    sizes = chosen_sizes(findings, g)
    figure, axes = _figure(len(sizes), 2)
    points = range(group.first.points)
    for row, split in enumerate(SPLITS):
        for column, m in enumerate(sizes):
            one = axes[row * len(sizes) + column]
            for metric, label, style in _errors(group):
                values = [group.mean(metric, split, m, position=k) for k in points]
                one.plot([k + 1 for k in points], values, label=label, **style)
            one.set(title=f"M = {_power(m)}, {SPLIT_WORDS[split]}", xlabel="point k", ylabel=error_words(group))
            one.set_ylim(0, None)
            one.xaxis.set_major_locator(_whole_numbers())
    axes[0].legend(fontsize=8)
    last = group.first.points - 1
    told = [
        f"M = {tasks_spelled(m)}, new tasks, last point: model {group.mean('error', 'new', m, position=last):.3g}, "
        f"{NAMES[group.estimators[1]]} {group.mean(f'{group.estimators[1]}_error', 'new', m, position=last):.3g}"
        for m in sizes
    ]
    return Picture(
        f"positions-{g}",
        _titled("By position in the context", group),
        _png(figure),
        "Errors at each point of the sequence, given those before it; means over seeds.",
        "Errors over position. " + "; ".join(told) + ".",
    )


def _errors(group: Group) -> list[tuple[str, str, dict[str, Any]]]:
    of_pool, of_prior = group.estimators
    return [
        ("error", "model", _MODEL),
        (f"{of_pool}_error", NAMES[of_pool], _POOL),
        (f"{of_prior}_error", NAMES[of_prior], _PRIOR),
    ]


def _paths(findings: Findings, g: int) -> list[Picture]:
    group = findings.results.groups[g]
    sizes = [m for m in chosen_sizes(findings, g) if not math.isnan(_on_path(group, "error", m, 0.5))]
    if not sizes:
        return []
    figure, axes = _figure(len(sizes))
    for one, m in zip(axes, sizes, strict=True):
        for metric, label, style in _errors(group):
            one.plot(PATH_ALPHAS, [_on_path(group, metric, m, alpha) for alpha in PATH_ALPHAS], label=label, **style)
        one.set(title=f"M = {_power(m)}", xlabel="alpha between two tasks", ylabel=error_words(group), ylim=(0, None))
    axes[0].legend(fontsize=8)
    told = [f"M = {tasks_spelled(m)}: model {_on_path(group, 'error', m, 0.5):.3g} half way" for m in sizes]
    return [
        Picture(
            f"path-{g}",
            _titled("Between two pretraining tasks", group),
            _png(figure),
            "Errors on tasks that lie between two of the pool (alpha 0 and 1), at the norm of a task.",
            "Errors along the way between two tasks. " + "; ".join(told) + ".",
        )
    ]


def _on_path(group: Group, metric: str, num_tasks: int | None, alpha: float) -> float:
    return group.mean(path_metric(metric, alpha), "", num_tasks)


def _movement(findings: Findings) -> list[Picture]:
    """The crossing against each axis with more than one value."""
    results = findings.results
    axes_shown = {
        name: values
        for name, values in results.axes.items()
        if any(moved.axis == name for moved in findings.moves) and not isinstance(values[0], str)
    }
    if not axes_shown:
        return []
    figure, axes = _figure(len(axes_shown))
    told: list[str] = []
    for one, (name, values) in zip(axes, axes_shown.items(), strict=True):
        rests: dict[str, list[int]] = {}
        for g, group in enumerate(results.groups):
            rest = ", ".join(f"{words_of(n)} {spelled(n, v)}" for n, v in group.setting.items() if n != name)
            rests.setdefault(rest, []).append(g)
        for i, (rest, members) in enumerate(rests.items()):
            _crossings(one, findings, name, values, members, rest or "new tasks", i)
        one.set_xticks(range(len(values)), [spelled(name, value) for value in values])
        one.set(xlabel=words_of(name), ylabel="crossing on new tasks, log2 M")
        one.margins(x=0.2)
        one.legend(fontsize=8)
        told += [
            f"{words_of(name)} {spelled(name, m.values[0])} to {spelled(name, m.values[1])}: {m.move.text}"
            for m in findings.moves
            if m.axis == name and m.split == "new"
        ]
    caption = "Where the crossing on new tasks lies for each value, with 95 % intervals; missing where not crossed."
    return [Picture("movement", "How the crossing moves", _png(figure), caption, "; ".join(told) + ".")]


def _crossings(
    axes: "Axes", findings: Findings, name: str, values: Sequence[Any], members: Sequence[int], label: str, i: int
) -> None:
    places, middles, lows, highs = [], [], [], []
    for g in sorted(members, key=lambda g: values.index(findings.results.groups[g].setting[name])):
        crossing = findings.crossings[g, "new"]
        if crossing is None or not crossing.found:
            continue
        places.append(values.index(findings.results.groups[g].setting[name]) + 0.04 * i)
        middles.append(crossing.log2_tasks)
        lows.append(max(0.0, crossing.log2_tasks - max(crossing.low, math.log2(crossing.smallest))))
        highs.append(max(0.0, min(crossing.high, math.log2(crossing.largest)) - crossing.log2_tasks))
    axes.errorbar(places, middles, [lows, highs], marker="o", capsize=4, label=label)


def _budgets(findings: Findings) -> list[Picture]:
    """The paper's criterion: distance to ridge on new tasks under two budgets."""
    if not findings.by_budget:
        return []
    figure, axes = _figure(len(findings.by_budget))
    results = findings.results
    for one, found in zip(axes, findings.by_budget, strict=True):
        for value, style in zip(found.values, (_PRIOR, _MODEL), strict=True):
            for group in results.groups:
                rest = ", ".join(f"{words_of(n)} {spelled(n, v)}" for n, v in group.setting.items() if n != found.axis)
                if group.setting[found.axis] == value and rest == found.rest:
                    sizes = list(group.by_tasks)
                    label = f"{words_of(found.axis)} {spelled(found.axis, value)}"
                    _lines(one, group, sizes, "new", [(f"delta_{group.estimators[1]}", label, style)])
                    _tasks_axis(one, sizes)
        if found.crossing.found:
            _mark(one, found.crossing)
        one.set(title=found.rest or "new tasks", ylabel=f"squared distance to {NAMES[results.groups[0].estimators[1]]}")
        _log_scale(one)
        one.legend(fontsize=8)
    caption = "On new tasks: below the crossing more training leads away from the prior's estimator, above it nearer."
    told = "; ".join(f"{words_of(found.axis)}: {found.crossing.text}" for found in findings.by_budget)
    return [Picture("budget", "By the paper's criterion", _png(figure), caption, told + ".")]


def _titled(title: str, group: Group) -> str:
    return f"{title} ({group.label})" if group.label else title
