"""Classification contexts: labelled vectors, reduced, ordered and compiled once, then asked any number of times.

More than two classes are one-versus-rest: one binary problem a class, probabilities normalised to one. Examples beyond
what the module has positions for are divided among the views: each view compiles another part, so that every example
counts and none is dropped. The module's logits are averaged over views.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from metasepia.digests import digest_of
from metasepia.errors import InvalidRequest
from metasepia.reasoning.module import CompiledRow, ModuleShape, ReasoningModule
from metasepia.reasoning.protocols import STREAM
from metasepia.reasoning.reduction import Reduction, ReductionRecipe
from metasepia.reasoning.shipped import LoadedModule

SHARED_ROWS = 256
"""Binary problems times views that a context of many classes keeps to by having fewer views, though never below 2."""
MAX_ROWS = 4096
"""Compiled rows of one context: binary problems times views. Beyond it a context is refused."""
FORWARD_BYTES = 64 << 20
"""Keys, values and masks gathered for one layer of one forward; more work is cut into several forwards."""


@dataclass(frozen=True, kw_only=True)
class Context:
    """Labelled vectors in their one order, whatever order they came in: sorted by label, then by bytes."""

    vectors: Float[np.ndarray, "examples width"]
    labels: tuple[str, ...]
    seed: int
    recipe: ReductionRecipe = field(default_factory=ReductionRecipe)

    @classmethod
    def of(
        cls, vectors: np.ndarray, labels: Sequence[str], *, seed: int = 0, recipe: ReductionRecipe | None = None
    ) -> "Context":
        """Raises InvalidRequest: no examples, more labels than vectors or fewer, one class, NaN or infinity."""
        vectors = np.ascontiguousarray(vectors, dtype=np.float32)
        if vectors.ndim != 2 or vectors.shape[0] != len(labels) or vectors.size == 0:
            raise InvalidRequest("examples", f"{len(labels)} labels for vectors of shape {list(vectors.shape)}")
        if not np.isfinite(vectors).all():
            bad = int(np.flatnonzero(~np.isfinite(vectors).all(axis=1))[0])
            raise InvalidRequest(f"examples[{bad}]", "its vector holds NaN or infinity")
        if len(set(labels)) < 2:
            raise InvalidRequest("examples", f"they name one class only, {labels[0]!r}; at least two are needed")
        order = sorted(range(len(labels)), key=lambda i: (labels[i], vectors[i].tobytes()))
        recipe = recipe or ReductionRecipe()
        return cls(vectors=vectors[order], labels=tuple(labels[i] for i in order), seed=seed, recipe=recipe)

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(sorted(set(self.labels)))

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
        return digest_of(header, {"vectors": self.vectors})

    def plan(self, shape: ModuleShape) -> "Plan":
        """Which examples each compiled row holds, and in which order. Raises InvalidRequest beyond MAX_ROWS rows."""
        classes = self.classes
        num_problems = 1 if len(classes) == 2 else len(classes)
        views = max(1, min(self.recipe.views, max(2, SHARED_ROWS // num_problems)))
        if views * num_problems > MAX_ROWS:
            raise InvalidRequest(
                "examples", f"{len(classes)} classes; at most {MAX_ROWS // views} can be told apart in one context"
            )
        place = {name: i for i, name in enumerate(classes)}
        labels = np.array([place[label] for label in self.labels])
        positives = [labels == c for c in ([1] if num_problems == 1 else range(num_problems))]
        parts = [_division(positive, shape.max_examples)[0] for positive in positives]
        views = max(views, *parts)
        if views * num_problems > MAX_ROWS:
            raise InvalidRequest(
                "examples",
                f"{len(labels)} examples of {len(classes)} classes need {views * num_problems} compiled rows of "
                f"{shape.max_examples} examples; at most {MAX_ROWS} are allowed: send fewer examples or classes",
            )
        rows = [
            PlannedRow(problem, view, _ordered(positive, view, shape.max_examples, self.seed), positive)
            for problem, positive in enumerate(positives)
            for view in range(views)
        ]
        return Plan(num_problems, views, rows)


@dataclass(frozen=True)
class PlannedRow:
    problem: int
    view: int
    order: np.ndarray
    positive: np.ndarray


@dataclass(frozen=True)
class Plan:
    num_problems: int
    num_views: int
    rows: list[PlannedRow]


def _division(positive: np.ndarray, max_examples: int) -> tuple[int, bool | None]:
    """How many parts a binary problem is cut into so that each fits, and which class every part holds whole."""
    num_positive, num_negative = int(positive.sum()), int((~positive).sum())
    few, many = sorted((num_positive, num_negative))
    if few + many <= max_examples:
        return 1, None
    if few <= max_examples // 2:
        return math.ceil(many / (max_examples - few)), num_positive == few
    return math.ceil(many / (max_examples // 2)), None


def _ordered(positive: np.ndarray, view: int, max_examples: int, seed: int) -> np.ndarray:
    """One view's examples: each class shuffled, then interleaved in proportion, so that no class comes in a block.

    The division into parts is drawn anew each time that all parts have had a view.
    """
    num_parts, whole = _division(positive, max_examples)
    division = np.random.default_rng([seed, 1, view // num_parts])
    parts = []
    for is_positive in (True, False):
        members = division.permutation(np.flatnonzero(positive == is_positive))
        parts.append(members if is_positive == whole else members[view % num_parts :: num_parts])
    order = np.random.default_rng([seed, 2, view])
    places = [(order.permutation(len(part)) + order.random()) / max(1, len(part)) for part in parts]
    return np.concatenate(parts)[np.argsort(np.concatenate(places), kind="stable")]


@dataclass(frozen=True)
class CompiledContext:
    """A context in the module's keys and values, [problems x views] rows; answers without looking at it again."""

    digest: str
    classes: tuple[str, ...]
    num_problems: int
    num_views: int
    reduction: Reduction
    rows: list[CompiledRow]

    @property
    def num_bytes(self) -> int:
        return self.reduction.num_bytes + sum(row.num_bytes for row in self.rows)


def compile_context(context: Context, loaded: LoadedModule) -> CompiledContext:
    """Raises InvalidRequest as `Context.plan` does."""
    shape, module = loaded.module.shape, loaded.module
    plan = context.plan(shape)
    recipe = replace(context.recipe, views=plan.num_views)
    reduction = Reduction.fit(context.vectors, dims=shape.dims, recipe=recipe, seed=context.seed)
    reduced = torch.from_numpy(reduction.apply(context.vectors)).to(module.positions.device)
    rows: list[CompiledRow] = []
    tokens_bytes = 2 * shape.max_examples * shape.width * 4 * 8  # what a block holds at once, about
    at_once = max(1, FORWARD_BYTES // tokens_bytes)
    for i in range(0, len(plan.rows), at_once):
        some = plan.rows[i : i + at_once]
        rows += module.compile_rows(
            [reduced[row.view][torch.from_numpy(row.order)] for row in some],
            [torch.from_numpy(row.positive[row.order].astype(np.float32)).to(reduced.device) for row in some],
        )
    return CompiledContext(
        context.digest(loaded.digest), context.classes, plan.num_problems, plan.num_views, reduction, rows
    )


def answer(
    module: ReasoningModule, asked: Sequence[tuple[CompiledContext, Float[np.ndarray, "_ width"]]]
) -> list[Float[np.ndarray, "_ _"]]:
    """Class probabilities [queries, classes] of each context's queries, all contexts' in one forward.

    More than FORWARD_BYTES of keys are cut into several forwards. Raises InvalidRequest for queries of another width.
    """
    rows: list[CompiledRow] = []
    queries: list[Tensor] = []
    device = module.positions.device
    for context, vectors in asked:
        width = context.reduction.mean.shape[0]
        if vectors.ndim != 2 or vectors.shape[1] != width:
            raise InvalidRequest(
                "queries", f"vectors of shape {list(vectors.shape)} for a context whose vectors have {width} numbers"
            )
        reduced = torch.from_numpy(context.reduction.apply(vectors)).to(device)
        for i, row in enumerate(context.rows):
            rows.append(row)
            queries.append(reduced[i % context.num_views])
    logits: list[Tensor] = [torch.empty(0)] * len(rows)
    for group in _forwards(rows, queries, module.shape):
        for i, one in zip(group, module.answer([rows[i] for i in group], [queries[i] for i in group]), strict=True):
            logits[i] = one.cpu()
    results, first = [], 0
    for context, _ in asked:
        own = torch.stack(logits[first : first + len(context.rows)])
        first += len(context.rows)
        results.append(_probabilities(own.view(context.num_problems, context.num_views, -1).mean(1)).numpy())
    return results


def _forwards(rows: Sequence[CompiledRow], queries: Sequence[Tensor], shape: ModuleShape) -> list[list[int]]:
    """Rows that go together: of similar numbers of queries and tokens, so that little is padded."""
    groups: list[list[int]] = []
    num_bytes = FORWARD_BYTES
    for i in sorted(range(len(rows)), key=lambda i: (len(queries[i]), rows[i].num_tokens)):
        if not len(queries[i]):
            continue
        # The last row has the longest tile so far; keys and values are held stacked and once more a tile.
        tile = min(64, len(queries[i]))
        tiles = math.ceil(len(queries[i]) / tile)
        cost = (tiles + 1) * (rows[i].num_tokens + tile) * shape.width * 8
        if num_bytes + cost > FORWARD_BYTES:
            groups.append([])
            num_bytes = 0
        groups[-1].append(i)
        num_bytes += cost
    return groups


def _probabilities(logits: Float[Tensor, "problems queries"]) -> Float[Tensor, "queries classes"]:
    """Two classes: the logit is the second one's. More: sigmoids normalised, in logarithms so that none is 0 / 0."""
    if len(logits) == 1:
        return torch.stack([torch.sigmoid(-logits[0]), torch.sigmoid(logits[0])], dim=1)
    return torch.softmax(torch.nn.functional.logsigmoid(logits.double()), dim=0).T.float().contiguous()


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
