"""How labelled texts become the vectors of a sequence (the embedding protocols of TART, arXiv:2306.07536).

`stream`: each text is embedded alone, mean over its tokens. No label and no other example enters a vector, so a query's
vector is the same in every context and may be cached by its text.
"""

from collections.abc import Callable, Sequence

from jaxtyping import Float
from numpy import ndarray

STREAM = "stream"


def stream(
    embed: Callable[[Sequence[str]], Float[ndarray, "texts width"]], examples: Sequence[str], queries: Sequence[str]
) -> tuple[Float[ndarray, "examples width"], Float[ndarray, "queries width"]]:
    """Vectors of examples and queries, from one call of `embed`."""
    vectors = embed([*examples, *queries])
    return vectors[: len(examples)], vectors[len(examples) :]
