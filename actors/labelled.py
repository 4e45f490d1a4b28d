"""Labelled vectors as they cross process borders, out of a stored context and into a context that can be compiled.

No torch until a context is made.
"""

import dataclasses
from typing import TYPE_CHECKING

from actors.messages import LabelledVectors
from metasepia.errors import Outdated
from metasepia.reasoning.named import PREFIX, EmbeddedContext

if TYPE_CHECKING:
    from metasepia.reasoning.context import Context


def labelled_vectors(embedded: EmbeddedContext) -> LabelledVectors:
    """A stored context as the pool takes it, in the order of its blob."""
    named = embedded.named
    return LabelledVectors(
        digest=named.digest,
        vectors=embedded.vectors,
        labels=named.labels,
        seed=named.seed,
        unlabelled=embedded.unlabelled,
        reduction=named.reduction,
    )


def context_of(given: LabelledVectors) -> "Context":
    """Raises InvalidRequest as `Context.of` does, and Outdated for a reduction that this program cannot fit."""
    from metasepia.reasoning.context import Context
    from metasepia.reasoning.reduction import ReductionRecipe

    known = {one.name for one in dataclasses.fields(ReductionRecipe)}
    if not set(given.reduction) <= known:
        raise Outdated(
            f"context {PREFIX}{given.digest}", "reduction", str(dict(given.reduction)), (f"one of {sorted(known)}",)
        )
    recipe = ReductionRecipe(**given.reduction)
    return Context.of(given.vectors, given.labels, seed=given.seed, recipe=recipe, unlabelled=given.unlabelled)
