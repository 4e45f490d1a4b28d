"""From an encoder's vectors to the module's few dimensions: PCA, whitening with a floor, and several views.

TART (arXiv:2306.07536) takes the leading principal components of the examples and whitens them. On a few examples that
divides by eigenvalues near zero; here an eigenvalue counts as at least `floor` times the largest. One module sees
`dims` directions at a time; a *view* is a random rotation's `dims` of all components, and the answers of several views
are averaged, so that directions beyond the first few have a say too. Fitted on the context's examples only
(inductive): no label and no query enters.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

MAX_COORDINATE = 30.0
"""Standard deviations at which a reduced coordinate is cut; training never saw beyond 4.3."""


@dataclass(frozen=True, kw_only=True)
class ReductionRecipe:
    """Part of a context's identity."""

    floor: float = 1.0
    """In (0, 1]: eigenvalues count as at least this share of the largest. 1 keeps the vectors' own proportions."""
    components: int = 32
    """At least 1: the leading components that views are made of. More than the views can cover only dilute them."""
    views: int = 32
    """At least 1. Each costs one compiled row and one token a query."""


@dataclass(frozen=True)
class Reduction:
    """What was fitted: x goes to (x - mean) @ projections[view]."""

    mean: Float[np.ndarray, " width"]
    projections: Float[np.ndarray, "views width dims"]

    @classmethod
    def fit(
        cls, vectors: Float[np.ndarray, "examples width"], *, dims: int, recipe: ReductionRecipe, seed: int
    ) -> "Reduction":
        """Finite for any finite vectors. Each view has mean variance 1 over its used coordinates on the examples.

        With fewer components than `dims` the rest are zero, as the inactive ones of the training curriculum (the
        reference tiles); examples that are all alike map to zero.
        """
        mean, centred, size = centre(vectors)
        projections = np.zeros((recipe.views, vectors.shape[1], dims))
        if centred is None:
            return cls(mean, projections)
        _, singular, components = np.linalg.svd(centred, full_matrices=False)
        eigenvalues = singular**2 / len(vectors)
        rank = min(recipe.components, int((eigenvalues > 1e-10 * eigenvalues[0]).sum()))
        scale = 1 / np.sqrt(np.maximum(eigenvalues[:rank], recipe.floor * eigenvalues[0]))
        scaled = components[:rank].T * scale  # [width, rank]
        variances = eigenvalues[:rank] * scale**2
        rng = np.random.default_rng(seed)
        groups: list[np.ndarray] = []
        for view in range(recipe.views):
            if not groups:
                rotation = _rotation(rng, rank) if rank > dims else np.eye(rank)
                groups = [rotation[:, i : i + dims] for i in range(0, rank - dims + 1, dims)] or [rotation]
            chosen = groups.pop()
            spread = np.sqrt((variances @ chosen**2).mean())
            projections[view, :, : chosen.shape[1]] = scaled @ chosen / (spread * size)
        return cls(mean, projections)

    def apply(self, vectors: Float[np.ndarray, "n width"]) -> Float[np.ndarray, "views n dims"]:
        reduced = (vectors.astype(np.float64) - self.mean) @ self.projections
        return np.clip(reduced, -MAX_COORDINATE, MAX_COORDINATE).astype(np.float32)

    @property
    def num_bytes(self) -> int:
        return self.mean.nbytes + self.projections.nbytes


def centre(
    vectors: Float[np.ndarray, "n width"],
) -> tuple[Float[np.ndarray, " width"], Float[np.ndarray, "n width"] | None, float]:
    """The mean, the vectors about it over the largest of their numbers, and that size; float64, for any finite scale.

    None and size 1 for vectors that are all alike: rounding in the mean leaves a residue there, which is no direction.
    """
    vectors = vectors.astype(np.float64)
    mean = vectors.mean(axis=0)
    centred = vectors - mean
    size = float(np.abs(centred).max())
    if size <= 1e-7 * float(np.abs(vectors).max()):
        return mean, None, 1.0
    return mean, centred / size, size


def _rotation(rng: np.random.Generator, size: int) -> np.ndarray:
    """A random orthogonal matrix [size, size], uniform (Haar) by the signs of R's diagonal."""
    q, r = np.linalg.qr(rng.standard_normal((size, size)))
    return q * np.sign(np.diag(r))
