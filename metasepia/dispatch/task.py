"""Choosing an expert from a request's text, stage `task`: the registered data sets whose texts it could be one of.

A data set is described by a *region* of an encoder's space: a few centroids of its texts, and how near to these other
texts of the same data set came. A text's rank among those is a conformal p-value (Vovk, Gammerman and Shafer,
Algorithmic Learning in a Random World, 2005): of texts exchangeable with the ones held out, a share of at most
`level` is left outside, whatever the encoder and the clusters are. The stage abstains outside every region, and where
regions of different experts are about as near. numpy only.
"""

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from metasepia.dispatch.centroid import Dispatched
from metasepia.errors import CorruptArtefact, InvalidRequest

KEY = "text_region"
"""Of a card, of an expert or of a data set."""
MIN_TEXTS = 8
MAX_TEXTS = 8192
"""Texts that a region is made from; of more, so many are drawn by the seed."""
MAX_CENTROIDS = 8
MAX_HELD_OUT = 499
"""Similarities that a region keeps; of more, so many are drawn by the seed, which are as exchangeable as all."""
_ENOUGH = 80
"""Texts from which on half of them are held out. Fewer are held out a tenth (or one) at a time."""
_FOLDS = 10
_ROUNDS = 25


@dataclass(frozen=True, kw_only=True, eq=False)
class TextRegion:
    """Where the texts of one data set lie in an encoder's space, and how far from there they still lie."""

    encoder: str
    """Digest of the text encoder, whose vectors have unit norm."""
    centroids: Float[np.ndarray, "centroids width"]
    """Of unit norm."""
    held_out: Float[np.ndarray, " texts"]
    """Ascending: of texts of the data set that the centroids were not made from, the cosine with the nearest one."""

    def similarities(self, vectors: Float[np.ndarray, "texts width"]) -> Float[np.ndarray, " texts"]:
        """The cosine of each text with the nearest centroid."""
        return (vectors @ self.centroids.T).max(1)

    def p_values(self, similarities: Float[np.ndarray, " texts"]) -> Float[np.ndarray, " texts"]:
        """The share of the data set's texts that are no nearer, the text itself counted among them; in (0, 1]."""
        return (1 + np.searchsorted(self.held_out, similarities, side="right")) / (1 + len(self.held_out))

    def threshold(self, level: float) -> float:
        """The cosine from which on a text lies inside: those below it are the ones with a p-value of at most `level`.

        The least p-value there is, 1 / (1 + held out), always counts as outside, so that the true level is the larger
        of the two. A level of 0 leaves nothing outside.
        """
        if level <= 0:
            return -math.inf
        rank = max(1, math.floor(level * (1 + len(self.held_out)) + 1e-9))
        return float(self.held_out[min(rank, len(self.held_out)) - 1])

    def to_card(self) -> dict[str, object]:
        """For a card, under `text_region`. Nothing is rounded here: `describe` has done it."""
        return {
            "encoder": self.encoder,
            "width": self.centroids.shape[1],
            "centroids": base64.b64encode(self.centroids.astype("<f2").tobytes()).decode("ascii"),
            "held_out": [round(float(one), 4) for one in self.held_out],
        }

    @classmethod
    def of_card(cls, card: Mapping[str, Any], name: str = "the expert") -> "TextRegion | None":
        """None for a card without one. Raises CorruptArtefact for one that cannot be used."""
        entry = card.get(KEY)
        if entry is None:
            return None
        try:
            encoder, width = str(entry["encoder"]), int(entry["width"])
            numbers = np.frombuffer(base64.b64decode(entry["centroids"], validate=True), "<f2")
            centroids = numbers.reshape(-1, width).astype(np.float32)
            held_out = np.sort(np.asarray(entry["held_out"], np.float64))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise CorruptArtefact(name, f"its card's {KEY} cannot be read ({error!r})") from error
        if held_out.ndim != 1 or not len(held_out) or not len(centroids):
            raise CorruptArtefact(name, f"its card's {KEY} has no centroid, or no similarity of held-out texts")
        norms = np.linalg.norm(centroids, axis=1)
        if not (np.isfinite(held_out).all() and np.abs(held_out).max() <= 1.001 and np.abs(norms - 1).max() < 0.01):
            raise CorruptArtefact(name, f"its card's {KEY} holds a centroid that is not of unit norm, or no cosine")
        return cls(encoder=encoder, centroids=centroids, held_out=held_out)


def describe(
    vectors: Float[np.ndarray, "texts width"],
    *,
    encoder: str,
    held_out: Float[np.ndarray, "others width"] | None = None,
    seed: int = 0,
) -> TextRegion:
    """The region of a data set, from its texts' unit-norm vectors. One seed, one region, to the byte.

    `held_out`: vectors of the texts to calibrate on, where the data set knows which of its texts are as unlike the
    others as a new one (templated texts: of templates of their own). None: half of the texts, drawn by the seed; of
    fewer than 80, each once, against centroids of the others (cross-conformal: the level is then good to a factor of
    two in the worst case, arXiv:1905.02928, and about right as a rule).
    Raises InvalidRequest for fewer than 8 texts, and for vectors that are not finite or of no direction.
    """
    vectors, calibration = _checked(vectors), None if held_out is None else _checked(held_out, least=1)
    rng = np.random.default_rng([seed, 7])
    vectors = vectors[np.sort(rng.permutation(len(vectors))[:MAX_TEXTS])]
    count = len(vectors)
    if calibration is not None:
        centroids = _centroids(vectors, rng)
        similarities = (calibration @ centroids.T).max(1)
    elif count >= _ENOUGH:
        order = rng.permutation(count)
        learn, rest = order[: count // 2], order[count // 2 :]
        centroids = _centroids(vectors[learn], rng)
        similarities = (vectors[rest] @ centroids.T).max(1)
    else:
        fold = rng.permutation(count) % (count if count < 2 * _FOLDS else _FOLDS)
        similarities = np.empty(count)
        for one in np.unique(fold):
            out = fold == one
            similarities[out] = (vectors[out] @ _centroids(vectors[~out], rng).T).max(1)
        centroids = _centroids(vectors, rng)
    kept = np.sort(rng.permutation(similarities)[:MAX_HELD_OUT].astype(np.float64))
    # Down, never up: a text is not left outside for the sake of a rounding.
    return TextRegion(encoder=encoder, centroids=centroids, held_out=np.floor(kept * 1e4) / 1e4)


def _checked(vectors: Float[np.ndarray, "texts width"], least: int = MIN_TEXTS) -> Float[np.ndarray, "texts width"]:
    vectors = np.asarray(vectors, np.float32)
    if vectors.ndim != 2 or len(vectors) < least:
        raise InvalidRequest("texts", f"a region needs {least} texts or more, got {len(vectors)}")
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    if not np.isfinite(norms).all() or not norms.all():
        raise InvalidRequest("texts", "a text's vector is not finite, or has no direction")
    return vectors / norms


def _centroids(vectors: Float[np.ndarray, "texts width"], rng: Any) -> Float[np.ndarray, "centroids width"]:
    """Spherical k-means (Dhillon and Modha, Machine Learning 42, 2001), k growing with the root of the texts.

    The first centres are drawn as k-means++ draws them. In float16, as they are kept.
    """
    k = min(MAX_CENTROIDS, max(1, round(math.sqrt(len(vectors) / 8))))
    chosen = [int(rng.integers(len(vectors)))]
    while len(chosen) < k:
        far = np.clip(1 - (vectors @ vectors[chosen].T).max(1), 0, None).astype(np.float64)
        if not far.sum() > 0:
            break  # there are no more different texts
        chosen.append(int(rng.choice(len(vectors), p=far / far.sum())))
    centroids = vectors[chosen]
    assigned = np.full(len(vectors), -1)
    for _ in range(_ROUNDS):
        nearest = (vectors @ centroids.T).argmax(1)
        if (nearest == assigned).all():
            break
        assigned = nearest
        sums = np.zeros_like(centroids)
        np.add.at(sums, assigned, vectors)
        norms = np.linalg.norm(sums, axis=1, keepdims=True)
        centroids = np.where(norms > 1e-6, sums / np.maximum(norms, 1e-6), centroids)  # one that lost all texts stays
    return centroids.astype(np.float16).astype(np.float32)


class RegionTable:
    """The regions of all data sets that have an expert, in one encoder's space."""

    def __init__(self, encoder: str, regions: Sequence[tuple[str, TextRegion]], *, level: float, margin: float) -> None:
        """`regions` by expert digest, several of an expert if need be; those of another encoder or width are left out.

        `level`: share of a data set's own texts that may be left outside it, from 0, which leaves none, to 0.5;
        `margin`: cosine by which the nearest region must be nearer than one of another expert.
        """
        own = [(expert, one) for expert, one in regions if one.encoder == encoder]
        own = [(expert, one) for expert, one in own if one.centroids.shape[1] == own[0][1].centroids.shape[1]]
        self.encoder, self.margin = encoder, margin
        self._experts = np.array([expert for expert, _ in own], dtype=object)
        self._thresholds = np.array([one.threshold(level) for _, one in own])
        sizes = [len(one.centroids) for _, one in own]
        self._begins = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(int) if own else np.zeros(0, int)
        self._centroids = np.concatenate([one.centroids for _, one in own]) if own else np.zeros((0, 0), np.float32)

    def __len__(self) -> int:
        return len(self._experts)

    def choose(self, vector: Float[np.ndarray, " width"]) -> Dispatched:
        """The expert of the nearest region that the text lies in.

        The margin is the cosine above both that region's threshold and the nearest region of another expert that the
        text lies in too; 0 or less below every threshold. Abstains there, below the margin asked for between two
        experts, and with an empty table.
        """
        if not len(self):
            return Dispatched(expert=None, margin=0.0, stage="task")
        similarities = np.maximum.reduceat(self._centroids @ vector, self._begins)
        above = similarities - self._thresholds
        inside = above >= 0
        if not inside.any():
            return Dispatched(expert=None, margin=float(above.max()), stage="task")
        order = np.flatnonzero(inside)
        best = int(order[np.argmax(similarities[order])])
        others = order[self._experts[order] != self._experts[best]]
        ahead = float(similarities[best] - similarities[others].max()) if len(others) else math.inf
        margin = min(float(above[best]), ahead)
        margin = margin if math.isfinite(margin) else float(similarities[best])  # level 0 and no other expert
        if ahead < self.margin:
            return Dispatched(expert=None, margin=margin, stage="task")
        return Dispatched(expert=str(self._experts[best]), margin=margin, stage="task")
