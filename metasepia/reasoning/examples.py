"""Labelled vectors, and perhaps unlabelled ones, in one canonical order: what a classification context is made of."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace

import numpy as np
from jaxtyping import Float

from metasepia.digests import digest_of
from metasepia.errors import InvalidRequest
from metasepia.reasoning.protocols import STREAM
from metasepia.reasoning.reduction import ReductionRecipe


@dataclass(frozen=True, kw_only=True)
class Context:
    """Labelled vectors in their one order, whatever order they came in: sorted by label, then by bytes."""

    vectors: Float[np.ndarray, "examples width"]
    labels: tuple[str, ...]
    classes: tuple[str, ...]
    """Sorted. A `subset` keeps those of the whole."""
    given: tuple[int, ...]
    """Where each example stood in the caller's list."""
    seed: int
    recipe: ReductionRecipe = field(default_factory=ReductionRecipe)
    unlabelled: Float[np.ndarray, "unlabelled width"] | None = None
    """Vectors of the same kind without labels: they inform the reduction."""

    @classmethod
    def of(
        cls,
        vectors: np.ndarray,
        labels: Sequence[str],
        *,
        seed: int = 0,
        recipe: ReductionRecipe | None = None,
        unlabelled: np.ndarray | None = None,
    ) -> "Context":
        """Raises InvalidRequest: no examples, more labels than vectors or fewer, one class, NaN or infinity, unlabelled
        vectors of another width.
        """
        vectors = np.ascontiguousarray(vectors, dtype=np.float32)
        if vectors.ndim != 2 or vectors.shape[0] != len(labels) or vectors.size == 0:
            raise InvalidRequest("examples", f"{len(labels)} labels for vectors of shape {list(vectors.shape)}")
        check_finite("examples", vectors)
        if len(set(labels)) < 2:
            raise InvalidRequest("examples", f"they name one class only, {labels[0]!r}; at least two are needed")
        if unlabelled is not None:
            unlabelled = np.ascontiguousarray(unlabelled, dtype=np.float32)
            if unlabelled.ndim != 2 or unlabelled.shape[1] != vectors.shape[1]:
                raise InvalidRequest(
                    "unlabelled",
                    f"vectors of shape {list(unlabelled.shape)} beside examples of {vectors.shape[1]} numbers",
                )
            check_finite("unlabelled", unlabelled)
            unlabelled = unlabelled[np.argsort([row.tobytes() for row in unlabelled], kind="stable")]
        order = sorted(range(len(labels)), key=lambda i: (labels[i], vectors[i].tobytes()))
        return cls(
            vectors=vectors[order],
            labels=tuple(labels[i] for i in order),
            classes=tuple(sorted(set(labels))),
            given=tuple(order),
            seed=seed,
            recipe=recipe or ReductionRecipe(),
            unlabelled=unlabelled if unlabelled is not None and len(unlabelled) else None,
        )

    @property
    def pool(self) -> Float[np.ndarray, "_ width"]:
        """Every vector that may inform the reduction: the examples' and the unlabelled."""
        return self.vectors if self.unlabelled is None else np.concatenate([self.vectors, self.unlabelled])

    def subset(self, keep: np.ndarray) -> "Context":
        """The examples at `keep` (canonical places), under the same classes, seed and unlabelled vectors."""
        at = np.sort(np.asarray(keep, dtype=np.intp))
        return replace(
            self,
            vectors=np.ascontiguousarray(self.vectors[at]),
            labels=tuple(self.labels[i] for i in at),
            given=tuple(self.given[i] for i in at),
        )

    def digest(self, module: str) -> str:
        """Over examples, seed, label set, module, protocol and reduction; the encoder enters by the vectors it made."""
        header = {
            "kind": "context",
            "labels": self.labels,
            "classes": self.classes,
            "seed": self.seed,
            "module": module,
            "protocol": STREAM,
            "reduction": asdict(self.recipe),
        }
        arrays = {"vectors": self.vectors}
        return digest_of(header, arrays if self.unlabelled is None else arrays | {"unlabelled": self.unlabelled})


def check_finite(field: str, vectors: np.ndarray) -> None:
    """Raises InvalidRequest naming the first vector of `field` that holds NaN or infinity."""
    if not np.isfinite(vectors).all():
        bad = int(np.flatnonzero(~np.isfinite(vectors).all(axis=1))[0])
        raise InvalidRequest(f"{field}[{bad}]", "its vector holds NaN or infinity")
