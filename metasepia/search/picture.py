"""The picture of a few-shot search, as SVG: nothing to install, and the same bytes for the same trace."""

from collections.abc import Mapping, Sequence
from typing import Any

from metasepia.search.fewshot import By

_COLOURS = (
    "#4269d0",
    "#efb118",
    "#ff725c",
    "#6cc5b0",
    "#3ca951",
    "#ff8ab7",
    "#a463f2",
    "#97bbf5",
    "#9c6b4e",
    "#9498a0",
)
_WIDTH, _HEIGHT, _LEFT, _TOP, _GAP = 360.0, 200.0, 56.0, 34.0, 70.0


def picture(names: Sequence[str], trace: Sequence[Mapping[str, Any]], score: By) -> bytes:
    """The search as SVG: the best and the mean score of each generation, and the best mixture's weights."""
    count = max(len(trace), 1)
    best = [one["scores"][one["best"]][0] for one in trace]
    mean = [sum(value for value, _ in one["scores"]) / len(one["scores"]) for one in trace]
    low, high = (min([*best, *mean], default=0.0), max([*best, *mean], default=1.0))
    low, high = (low - 0.5, high + 0.5) if high - low < 1e-9 else (low, high)
    second = _LEFT + _WIDTH + _GAP
    parts = [
        *_axes(
            _LEFT, "mean log-probability of a token" if score == "likelihood" else "share of shots right", low, high
        ),
        *_axes(second, "weights of the best mixture", 0.0, 1.0),
        _line([(_x(_LEFT, i, count), _y(value, low, high)) for i, value in enumerate(mean)], "#9498a0"),
        _line([(_x(_LEFT, i, count), _y(value, low, high)) for i, value in enumerate(best)], "#4269d0"),
        _text(_LEFT + 8, _TOP + _HEIGHT - 20, "best", "#4269d0"),
        _text(_LEFT + 8, _TOP + _HEIGHT - 6, "mean of the population", "#9498a0"),
    ]
    bar = _WIDTH / count
    for i, one in enumerate(trace):
        below = 0.0
        for k, weight in enumerate(one["weights"]):
            top, bottom = _y(below + weight, 0.0, 1.0), _y(below, 0.0, 1.0)
            parts.append(
                f'<rect x="{second + i * bar:.1f}" y="{top:.1f}" width="{max(bar - 1, 0.5):.1f}" '
                f'height="{bottom - top:.1f}" fill="{_COLOURS[k % len(_COLOURS)]}"/>'
            )
            below += weight
    right = second + _WIDTH + 12
    for k, name in enumerate(names):
        parts.append(_text(right, _TOP + 10 + 15 * k, name, _COLOURS[k % len(_COLOURS)]))
    width = right + 9 * max(map(len, names), default=0) + 12
    height = max(_TOP + _HEIGHT + 34, _TOP + 20 + 15 * len(names))
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" font-family="sans-serif">'
    )
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *parts, "</svg>\n"]).encode()


def _axes(left: float, title: str, low: float, high: float) -> list[str]:
    bottom = _TOP + _HEIGHT
    return [
        _text(left, _TOP - 14, title, "#1b1e23"),
        f'<rect x="{left:.0f}" y="{_TOP:.0f}" width="{_WIDTH:.0f}" height="{_HEIGHT:.0f}" fill="none" stroke="#ccc"/>',
        _text(left - 50, _TOP + 8, f"{high:.3g}", "#1b1e23"),
        _text(left - 50, bottom, f"{low:.3g}", "#1b1e23"),
        _text(left + _WIDTH / 2 - 32, bottom + 22, "generation", "#1b1e23"),
    ]


def _x(left: float, i: int, count: int) -> float:
    return left + _WIDTH * (i + 0.5) / count


def _y(value: float, low: float, high: float) -> float:
    return _TOP + _HEIGHT * (1 - (value - low) / (high - low))


def _line(points: Sequence[tuple[float, float]], colour: str) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colour}"/>' for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>{dots}'


def _text(x: float, y: float, text: str, colour: str) -> str:
    safe = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return f'<text x="{x:.0f}" y="{y:.0f}" font-size="12" fill="{colour}">{safe}</text>'
