"""Classification contexts: labelled vectors, reduced and compiled once, then asked any number of times.

`rows` compiles for the paper's causal module, `sets` for the set module; here is the one face of both.
"""

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from metasepia.errors import InvalidRequest
from metasepia.reasoning.examples import Context
from metasepia.reasoning.module import ReasoningModule
from metasepia.reasoning.reduction import Reduction
from metasepia.reasoning.rows import CompiledRows, answer_rows, compile_rows
from metasepia.reasoning.set_module import SetModule
from metasepia.reasoning.sets import CompiledSet, Directions, answer_sets, compile_set
from metasepia.reasoning.sets import compile_subsets as compile_subsets_of_set
from metasepia.reasoning.shipped import LoadedModule

__all__ = [
    "CompiledContext",
    "Context",
    "ContextPool",
    "FittedReduction",
    "answer",
    "compile_context",
    "compile_subsets",
]

CompiledContext = CompiledRows | CompiledSet
FittedReduction = Reduction | Directions


def compile_context(
    context: Context, loaded: LoadedModule, *, reduction: FittedReduction | None = None
) -> CompiledContext:
    """The context in the module's terms. `reduction` None fits one on the examples and the unlabelled vectors.

    Raises InvalidRequest for more examples or classes than the module takes.
    """
    digest = context.digest(loaded.digest)
    if isinstance(loaded.module, SetModule):
        assert reduction is None or isinstance(reduction, Directions)
        return compile_set(context, loaded.module, digest, reduction)
    assert reduction is None or isinstance(reduction, Reduction)
    return compile_rows(context, loaded.module, digest, reduction)


def compile_subsets(
    context: Context, loaded: LoadedModule, keeps: Sequence[np.ndarray], reduction: FittedReduction
) -> list[CompiledContext]:
    """Contexts of some of the examples each (canonical places), all under one fitted reduction.

    The set module's are named after the whole context, whose digest is not made again for each.
    """
    if isinstance(loaded.module, SetModule):
        assert isinstance(reduction, Directions)
        whole = context.digest(loaded.digest)
        digests = [f"{whole}/{i}" for i in range(len(keeps))]
        return [*compile_subsets_of_set(context, loaded.module, digests, keeps, reduction)]
    return [compile_context(context.subset(keep), loaded, reduction=reduction) for keep in keeps]


def answer(
    module: ReasoningModule | SetModule, asked: Sequence[tuple[CompiledContext, Float[np.ndarray, "_ _"]]]
) -> list[Float[np.ndarray, "_ _"]]:
    """Class probabilities [queries, classes] of each context's queries, all contexts' in as few forwards as fit.

    Raises InvalidRequest for queries of another width.
    """
    for context, vectors in asked:
        if vectors.ndim != 2 or vectors.shape[1] != context.width:
            raise InvalidRequest(
                "queries",
                f"vectors of shape {list(vectors.shape)} for a context whose vectors have {context.width} numbers",
            )
    if isinstance(module, SetModule):
        return answer_sets(module, [(one, vectors) for one, vectors in asked if isinstance(one, CompiledSet)])
    return answer_rows(module, [(one, vectors) for one, vectors in asked if isinstance(one, CompiledRows)])


class ContextPool:
    """Compiled contexts by digest, at most `max_bytes` of them: the least recently used leave first."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.num_bytes, self.num_hits = max_bytes, 0, 0
        self._contexts: OrderedDict[str, CompiledContext] = OrderedDict()

    def __len__(self) -> int:
        return len(self._contexts)

    def get(self, digest: str) -> CompiledContext | None:
        found = self._contexts.get(digest)
        if found is not None:
            self._contexts.move_to_end(digest)
            self.num_hits += 1
        return found

    def put(self, context: CompiledContext) -> None:
        """Keeps it, unless it is larger than the whole pool."""
        if context.digest in self._contexts or context.num_bytes > self.max_bytes:
            return
        self._contexts[context.digest] = context
        self.num_bytes += context.num_bytes
        while self.num_bytes > self.max_bytes:
            _, dropped = self._contexts.popitem(last=False)
            self.num_bytes -= dropped.num_bytes
