"""A map of tasks as one HTML page: data sets, models, experts and prompts in the plane, with hover, filters and pins.

The page needs no network and no library, and forbids itself both (its content security policy). Each space is drawn by
itself, in one or two views: principal components, which among unit vectors are classical scaling of the distances
sqrt(2 - 2 cos), and, for few enough points, t-SNE of the same distances (van der Maaten and Hinton 2008), which keeps
neighbours together and says nothing by what lies far apart. Each view says what it kept. The same points give the same
page, whatever the number of threads.
"""

import base64
import hashlib
import html
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from threadpoolctl import threadpool_limits

from metasepia.digests import is_digest, short
from metasepia.embedding.space import TaskEmbedding
from metasepia.errors import InvalidSettings

FOLDER = Path(__file__).parents[1] / "assets" / "task_map"
NEAREST = 5
"""Neighbours shown of a point, with their cosines."""
MAX_POINTS = 20_000
"""Of one page: beyond, it gets slow to load and to move."""
MAX_NEIGHBOUR_VIEW = 2_000
"""Points of a space that t-SNE is run for: about 15 s of one core."""
PAIRS = 1_000
"""Points whose pairwise distances tell the stress, where there are more: drawn by a fixed seed."""
MAX_SOURCE_CHARS = 160
"""Of one line about a point's source."""


@dataclass(frozen=True, kw_only=True)
class MapPoint:
    """One task, model, prompt or expert, in plain values."""

    name: str
    kind: str
    """data_set, model, prompt, expert or another word: what the legend tells apart."""
    space: str
    """What the space is called on the page; points with equal names share a picture, and no others do."""
    vector: Float[np.ndarray, " dims"]
    """Of any length but zero; the cosine is what counts."""
    source: Mapping[str, Any] = field(default_factory=dict)
    """Shown line by line; values that are not text are spelt as JSON."""
    noise: float | None = None


def points_of(embeddings: Iterable[TaskEmbedding]) -> list[MapPoint]:
    """What a page shows of embeddings. What ran on an expert (source `expert`) is of the kind expert."""
    return [
        MapPoint(
            name=one.name,
            kind="expert" if one.source.get("expert") else one.kind,
            space=f"{one.space.method} {short(one.space.digest)}",
            vector=one.vector,
            source=one.source,
            noise=one.noise,
        )
        for one in embeddings
    ]


def render(points: Sequence[MapPoint], title: str, *, notes: Sequence[str] = ()) -> str:
    """The page. `notes` are sentences shown under the title.

    Raises InvalidSettings for more than MAX_POINTS, and for vectors of one space that differ in length, are zero or not
    finite.
    """
    if len(points) > MAX_POINTS:
        raise InvalidSettings("points", len(points), f"at most {MAX_POINTS} on one page; choose some of them")
    # One thread: sums then have one order, and the page the same bytes on as many cores as there may be.
    with threadpool_limits(1):
        data = _data(points, notes)
    style, script = ((FOLDER / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    return Template((FOLDER / "page.html").read_text(encoding="utf-8")).substitute(
        title=html.escape(title),
        policy=f"default-src 'none'; base-uri 'none'; form-action 'none'; style-src {_hash(style)}; "
        f"script-src {_hash(script)}",
        style=style,
        script=script,
        data=_embedded(data),
    )


# -- the plane


@dataclass(frozen=True)
class View:
    """A picture of a space's points, and what is lost in it."""

    name: str
    xy: Float[np.ndarray, "points 2"]
    """Centred; the farthest point from the centre, along either axis, is at 1."""
    told: str


def views_of(vectors: Float[np.ndarray, "points dims"], found: Int[np.ndarray, "points near"]) -> list[View]:
    """Of unit vectors whose nearest others are `found`."""
    xy, share = principal_plane(vectors)
    lost = _lost(vectors, xy, found)
    views = [
        View("principal components", _fitted(xy), f"Two principal components: {share:.0%} of the variance, {lost}.")
    ]
    if 8 <= len(vectors) <= MAX_NEIGHBOUR_VIEW and np.ptp(xy) > 0:
        xy = neighbour_plane(vectors, xy)
        lost = _lost(vectors, xy, found)
        views.append(View("neighbours (t-SNE)", _fitted(xy), f"t-SNE: near means alike, far says nothing; {lost}."))
    return views


def principal_plane(vectors: Float[np.ndarray, "points dims"]) -> tuple[Float[np.ndarray, "points 2"], float]:
    """Coordinates along the two leading principal components and their share of the variance, from 0 to 1.

    The sign of an axis is such that its largest coordinate (the first of equals) is positive. Computed in float64 from
    the smaller of the two Gram matrices, or by Lanczos' method where both are large, from a fixed start.
    """
    centred = vectors.astype(np.float64) - vectors.mean(0, dtype=np.float64)
    total = float((centred**2).sum())
    if total <= 1e-12 * len(vectors):
        return np.zeros((len(vectors), 2)), 1.0
    xy = np.zeros((len(vectors), 2))
    if min(centred.shape) <= 1024:
        by_point = centred.shape[0] <= centred.shape[1]
        values, axes = np.linalg.eigh(centred @ centred.T if by_point else centred.T @ centred)
        values, axes = values[::-1][:2].clip(0), axes[:, ::-1][:, :2]
        xy[:, : axes.shape[1]] = axes * np.sqrt(values) if by_point else centred @ axes
    else:
        from scipy.sparse.linalg import LinearOperator, eigsh

        gram = LinearOperator((len(centred),) * 2, matvec=lambda v: centred @ (centred.T @ v), dtype=np.float64)  # pyright: ignore[reportCallIssue]
        values, axes = eigsh(gram, k=2, v0=np.random.default_rng(0).standard_normal(len(centred)))
        xy = (axes * np.sqrt(values.clip(0)))[:, ::-1]
    for axis in xy.T:
        if axis[np.argmax(np.abs(axis).round(12))] < 0:
            axis *= -1
    return xy, float((xy**2).sum()) / total


def neighbour_plane(
    vectors: Float[np.ndarray, "points dims"], start: Float[np.ndarray, "points 2"]
) -> Float[np.ndarray, "points 2"]:
    """t-SNE of the distances sqrt(2 - 2 cos), begun at `start`."""
    from sklearn.manifold import TSNE

    distances = np.sqrt(np.maximum(0, 2 - 2 * (vectors.astype(np.float64) @ vectors.T.astype(np.float64))))
    np.fill_diagonal(distances, 0)
    begin = start / start[:, 0].std() * 1e-4
    perplexity = min(30.0, (len(vectors) - 1) / 3)
    made = TSNE(init=begin, metric="precomputed", perplexity=perplexity, random_state=0, n_jobs=1)
    return made.fit_transform(distances).astype(np.float64)


def nearest(
    vectors: Float[np.ndarray, "points dims"], k: int
) -> tuple[Int[np.ndarray, "points near"], Float[np.ndarray, "points near"]]:
    """The k others of largest cosine of each unit vector, best first, the earlier of equals; fewer where there are."""
    k = min(k, len(vectors) - 1)
    found, values = np.zeros((len(vectors), k), np.int64), np.zeros((len(vectors), k))
    for begin in range(0, len(vectors), 512):
        part = (vectors[begin : begin + 512] @ vectors.T).clip(-1, 1).astype(np.float64)
        part[np.arange(len(part)), np.arange(begin, begin + len(part))] = -np.inf
        # Rounded, so that which of two equal ones comes first does not hang on the last bit of a product.
        order = np.argsort(-part.round(6), axis=1, kind="stable")[:, :k]
        found[begin : begin + 512] = order
        values[begin : begin + 512] = np.take_along_axis(part, order, 1)
    return found, values


def stress(vectors: Float[np.ndarray, "points dims"], xy: Float[np.ndarray, "points 2"]) -> float:
    """Kruskal's stress-1 of the picture's distances, scaled at best, against sqrt(2 - 2 cos): 0 where all are kept.

    Over all pairs of at most PAIRS points.
    """
    if len(vectors) > PAIRS:
        chosen = np.sort(np.random.default_rng(0).permutation(len(vectors))[:PAIRS])
        vectors, xy = vectors[chosen], xy[chosen]
    upper = np.triu_indices(len(vectors), 1)
    true = np.sqrt(np.maximum(0, 2 - 2 * (vectors @ vectors.T)))[upper].astype(np.float64)
    drawn = np.hypot(*(xy[:, None] - xy[None]).transpose(2, 0, 1))[upper]
    scale = (true @ drawn) / max(float(drawn @ drawn), 1e-300)
    return float(np.sqrt(((true - scale * drawn) ** 2).sum() / max(float(true @ true), 1e-300)))


def _lost(
    vectors: Float[np.ndarray, "points dims"],
    xy: Float[np.ndarray, "points 2"],
    found: Int[np.ndarray, "points near"],
) -> str:
    if len(vectors) < 3:
        return f"stress {stress(vectors, xy):.2f}"
    from sklearn.neighbors import NearestNeighbors

    drawn = NearestNeighbors(n_neighbors=found.shape[1]).fit(xy).kneighbors(return_distance=False)
    kept = np.mean([len(set(a) & set(b)) / len(a) for a, b in zip(found.tolist(), drawn.tolist(), strict=True)])
    return f"stress {stress(vectors, xy):.2f}, {kept:.0%} of the nearest {found.shape[1]} kept"


def _fitted(xy: Float[np.ndarray, "points 2"]) -> Float[np.ndarray, "points 2"]:
    middle = (xy.max(0) + xy.min(0)) / 2
    return (xy - middle) / max(float(np.abs(xy - middle).max()), 1e-300)


# -- the page


def _data(points: Sequence[MapPoint], notes: Sequence[str]) -> dict[str, Any]:
    kinds, names = _in_order(one.kind for one in points), _in_order(one.space for one in points)
    near: list[list[int]] = [[] for _ in points]
    cosine: list[list[float]] = [[] for _ in points]
    spaces: list[dict[str, Any]] = []
    for name in names:
        members = [place for place, one in enumerate(points) if one.space == name]
        vectors = _unit([points[place] for place in members])
        found, values = nearest(vectors, NEAREST)
        for place, row, row_values in zip(members, found.tolist(), values.tolist(), strict=True):
            near[place] = [members[j] for j in row]
            cosine[place] = [round(value, 3) for value in row_values]
        spaces.append({"name": name, "members": members, "views": [_view(one) for one in views_of(vectors, found)]})
    return {
        "kinds": kinds,
        "spaces": spaces,
        "notes": list(notes),
        "points": {
            "name": [one.name for one in points],
            "kind": [kinds.index(one.kind) for one in points],
            "space": [names.index(one.space) for one in points],
            "source": [_lines(one.source) for one in points],
            "noise": [None if one.noise is None else float(f"{one.noise:.3g}") for one in points],
            "near": near,
            "cosine": cosine,
        },
    }


def _view(view: View) -> dict[str, Any]:
    # + 0.0: no negative zeros, which JSON would spell
    return {"name": view.name, "told": view.told, "xy": (view.xy.round(4) + 0.0).tolist()}


def _unit(points: Sequence[MapPoint]) -> Float[np.ndarray, "points dims"]:
    if len({len(one.vector) for one in points}) > 1:
        lengths = sorted({len(one.vector) for one in points})
        raise InvalidSettings("vector", lengths, f"of one length in the space {points[0].space!r}")
    vectors = np.stack([np.asarray(one.vector, np.float64) for one in points])
    norms = np.linalg.norm(vectors, axis=1)
    for one, norm in zip(points, norms, strict=True):
        if not (np.isfinite(norm) and norm > 0):
            raise InvalidSettings("vector", f"of {one.name!r}", "finite and not zero")
    return (vectors / norms[:, None]).astype(np.float32)


def _in_order(words: Iterable[str]) -> list[str]:
    """Each once, the usual kinds first, so that they keep their colours from page to page."""
    usual = ["data_set", "model", "prompt", "expert"]
    seen = dict.fromkeys(words)
    return [one for one in usual if one in seen] + [one for one in seen if one not in usual]


def _lines(source: Mapping[str, Any]) -> list[str]:
    """For people: what is empty is left out, digests are cut to their first digits."""
    lines = []
    for name, value in source.items():
        if value is None or value in ("", [], (), {}):
            continue
        if isinstance(value, list | tuple) and all(isinstance(one, str) for one in value):
            value = ", ".join(value)
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)
        text = short(text) if is_digest(text) else " ".join(text.split())
        lines.append(f"{name}: {text[: MAX_SOURCE_CHARS - 1] + '…' if len(text) > MAX_SOURCE_CHARS else text}")
    return lines


def _embedded(data: Mapping[str, Any]) -> str:
    """JSON that cannot end the element it stands in, whatever the names hold."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
