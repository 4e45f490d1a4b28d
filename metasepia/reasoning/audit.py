"""What a context's answers rest on: each example left out in turn, its influence on an answer, and what lies near.

Leaving an example out means to compile the context without it and to ask again; nothing is approximated. The reduction
stays as it was fitted on all examples: it knows no label, and the answers then differ by the example alone and not by
a turned basis. So the left-out answer is exact for the module, given the reduction; the example's vector, though never
its label, still has its share in that reduction. A left-out example that was alone in its class takes the class with
it: its probability is 0.

Examples are numbered as the caller of `Context.of` gave them.
"""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Int

from metasepia.errors import InvalidRequest
from metasepia.reasoning.context import CompiledContext, Context, answer, compile_context, compile_subsets
from metasepia.reasoning.shipped import LoadedModule

EXACT_EXAMPLES = 64
"""Up to so many examples a self-check leaves each out alone; beyond it, in folds."""
FOLDS = 10
COMPILED_BYTES = 64 << 20
"""Contexts compiled at once; one at least, whatever its size."""
INFLUENCE_BYTES = 256 << 20
"""Influences of one call; more are refused."""
PROBABILITY_FLOOR = 1e-6
"""Probabilities count as at least this much in a logarithm, so that every influence is finite."""


def left_out(
    context: Context,
    loaded: LoadedModule,
    compiled: CompiledContext | None = None,
    *,
    only: Sequence[int] | None = None,
) -> Float[np.ndarray, "_ classes"]:
    """The probabilities of each example (or of those in `only`, in that order) when it is left out.

    `compiled` is the context as it was compiled, to spare doing it again.
    """
    compiled = compiled or compile_context(context, loaded)
    chosen = range(len(context.labels)) if only is None else only
    at = _places(context)[_checked(chosen, context)]
    groups = [at[i : i + 1] for i in range(len(at))]
    answers = _answers_without(context, loaded, compiled, groups, [context.vectors[group] for group in groups])
    return np.concatenate([np.empty((0, len(context.classes)), np.float32), *answers])


@dataclass(frozen=True)
class SelfCheck:
    """How often a context is right about its own examples when they are left out; an accuracy from 0 to 1."""

    accuracy: float
    num_left_out: int
    method: str
    """`leave-one-out`, or `10-fold`: a tenth of every class left out at a time, so that less is left to learn from."""


def self_check(
    context: Context,
    loaded: LoadedModule,
    compiled: CompiledContext | None = None,
    *,
    limit: int = EXACT_EXAMPLES,
    folds: int = FOLDS,
) -> SelfCheck:
    """Leave-one-out for up to `limit` examples; beyond it `folds` stratified folds, drawn by the context's seed.

    Either way each example is judged once. One that is alone in its class is wrong by necessity.
    """
    steps = self_check_in_steps(context, loaded, compiled, limit=limit, folds=folds)
    while True:
        try:
            next(steps)
        except StopIteration as done:
            return done.value


def self_check_in_steps(
    context: Context,
    loaded: LoadedModule,
    compiled: CompiledContext | None = None,
    *,
    limit: int = EXACT_EXAMPLES,
    folds: int = FOLDS,
) -> Generator[None, None, SelfCheck]:
    """`self_check` for who has other work to do between two of its forwards: returns it, yielding after each group."""
    compiled = compiled or compile_context(context, loaded)
    num_examples = len(context.labels)
    if num_examples <= limit:
        groups, method = [np.array([i]) for i in range(num_examples)], "leave-one-out"
    else:
        groups, method = _folds(context, folds), f"{folds}-fold"
    answers = _answers_without(context, loaded, compiled, groups, [context.vectors[group] for group in groups])
    right = 0
    for group, probabilities in zip(groups, answers, strict=True):
        said = probabilities.argmax(axis=1)
        right += sum(context.classes[best] == context.labels[i] for best, i in zip(said, group, strict=True))
        yield
    return SelfCheck(int(right) / num_examples, num_examples, method)


@dataclass(frozen=True)
class Influences:
    """By how much each example raises the log-probability of each class, for each query.

    log p(class | all examples) - log p(class | all but this one), natural logarithm: positive where the example speaks
    for the class. Influences do not add up to the answer: two examples that say the same have little each.
    """

    values: Float[np.ndarray, "queries examples classes"]
    examples: tuple[int, ...]
    """The example of each column, as the caller numbered them."""
    classes: tuple[str, ...]

    def strongest(self, query: int, name: str, count: int) -> list[tuple[int, float]]:
        """The examples that move `name` most for a query, up or down, with their influence; strongest first."""
        values = self.values[query, :, self.classes.index(name)]
        order = np.argsort(-np.abs(values), kind="stable")[:count]
        return [(self.examples[i], float(values[i])) for i in order]


def influences(
    context: Context,
    loaded: LoadedModule,
    compiled: CompiledContext,
    queries: Float[np.ndarray, "queries width"],
    *,
    only: Sequence[int] | None = None,
) -> Influences:
    """The influence of each example, or of those in `only`, by exact leave-one-out.

    Costs one compilation and one answer to all queries an example. Raises InvalidRequest for queries of another width,
    for examples that do not exist, and for more than INFLUENCE_BYTES of influences.
    """
    chosen = _checked(range(len(context.labels)) if only is None else only, context)
    num_bytes = 4 * len(queries) * len(chosen) * len(context.classes)
    if num_bytes > INFLUENCE_BYTES:
        raise InvalidRequest(
            "inputs",
            f"the influences of {len(chosen)} examples on {len(queries)} inputs over {len(context.classes)} classes "
            f"take {num_bytes >> 20} MiB; at most {INFLUENCE_BYTES >> 20} are computed: send fewer inputs",
        )
    at = _places(context)[chosen]
    (whole,) = answer(loaded.module, [(compiled, queries)])
    values = np.empty((len(queries), len(chosen), len(context.classes)), np.float32)
    groups = [at[i : i + 1] for i in range(len(at))]
    for i, without in enumerate(_answers_without(context, loaded, compiled, groups, [queries] * len(groups))):
        values[:, i] = _log(whole) - _log(without)
    return Influences(values, tuple(chosen.tolist()), context.classes)


@dataclass(frozen=True)
class Nearest:
    """For each query its nearest examples, nearest first, with their cosine similarity from -1 to 1."""

    examples: Int[np.ndarray, "queries count"]
    similarity: Float[np.ndarray, "queries count"]


def nearest(context: Context, queries: Float[np.ndarray, "queries width"], count: int) -> Nearest:
    """By cosine in the encoder's own space, before any reduction; at a tie the example given first.

    All examples where there are fewer than `count`. A vector of zeros is at similarity 0 from everything.
    """
    vectors = np.empty_like(context.vectors)
    vectors[np.array(context.given)] = context.vectors
    similarity = _unit(queries) @ _unit(vectors).T
    order = np.argsort(-similarity, axis=1, kind="stable")[:, :count]
    return Nearest(order, np.take_along_axis(similarity, order, axis=1).astype(np.float32))


def _answers_without(
    context: Context,
    loaded: LoadedModule,
    compiled: CompiledContext,
    groups: Sequence[np.ndarray],
    queries: Sequence[np.ndarray],
) -> Iterator[Float[np.ndarray, "_ classes"]]:
    """For each group of canonical indices, the answers to its queries by the context without the group.

    As many contexts share a forward as COMPILED_BYTES hold.
    """
    at_once = max(1, COMPILED_BYTES // compiled.num_bytes)
    for begin in range(0, len(groups), at_once):
        some = slice(begin, begin + at_once)
        keeps = [np.setdiff1d(np.arange(len(context.labels)), group) for group in groups[some]]
        subsets = _subsets(context, loaded, keeps, compiled)
        asked = [(one, part) for one, part in zip(subsets, queries[some], strict=True) if one is not None]
        answered = iter(answer(loaded.module, asked))
        for keep, one, part in zip(keeps, subsets, queries[some], strict=True):
            present = np.isin(context.classes, [context.labels[i] for i in keep])
            probabilities = np.zeros((len(part), len(context.classes)), np.float32)
            probabilities[:, present] = 1.0 if one is None else next(answered)
            yield probabilities


def _subsets(
    context: Context, loaded: LoadedModule, keeps: Sequence[np.ndarray], compiled: CompiledContext
) -> list[CompiledContext | None]:
    """A context of some examples each, compiled. None for one of a single class: there is nothing to tell apart.

    One that loses a class is a context of fewer classes, as if it had been made so.
    """
    classes = [tuple(sorted({context.labels[i] for i in keep})) for keep in keeps]
    whole = [keep for keep, own in zip(keeps, classes, strict=True) if own == context.classes]
    ready = iter(compile_subsets(context, loaded, whole, compiled.reduction))
    subsets: list[CompiledContext | None] = []
    for keep, own in zip(keeps, classes, strict=True):
        if own == context.classes:
            subsets.append(next(ready))
        elif len(own) > 1:
            fewer = replace(context.subset(keep), classes=own)
            subsets.append(compile_context(fewer, loaded, reduction=compiled.reduction))
        else:
            subsets.append(None)
    return subsets


def _folds(context: Context, count: int) -> list[np.ndarray]:
    """Canonical indices in `count` folds of equal size and like shares of every class."""
    rng = np.random.default_rng([context.seed, 3])
    labels = np.array(context.labels)
    dealt = np.concatenate([rng.permutation(np.flatnonzero(labels == name)) for name in context.classes])
    return [np.sort(dealt[i::count]) for i in range(min(count, len(dealt)))]


def _places(context: Context) -> np.ndarray:
    """The canonical index of each example as the caller numbered it."""
    places = np.empty(len(context.given), np.intp)
    places[np.array(context.given)] = np.arange(len(context.given))
    return places


def _checked(examples: Sequence[int], context: Context) -> np.ndarray:
    chosen = np.array(list(examples), np.intp)
    outside = chosen[(chosen < 0) | (chosen >= len(context.labels))]
    if len(outside):
        raise InvalidRequest("examples", f"there is no example {outside[0]}; they are 0 to {len(context.labels) - 1}")
    return chosen


def _log(probabilities: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(probabilities, PROBABILITY_FLOOR))


def _unit(vectors: np.ndarray) -> np.ndarray:
    vectors = vectors.astype(np.float64)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 0)
