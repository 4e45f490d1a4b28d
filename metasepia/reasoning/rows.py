"""Contexts of the paper's causal module: binary rows of keys and values, several views of each.

More than two classes are one-versus-rest: one binary problem a class, probabilities normalised to one. Examples beyond
what the module has positions for are divided among the views: each view compiles another part, so that every example
counts and none is dropped. The module's logits are averaged over views.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from metasepia.errors import InvalidRequest
from metasepia.reasoning.examples import Context
from metasepia.reasoning.module import CompiledRow, ModuleShape, ReasoningModule
from metasepia.reasoning.reduction import Reduction

SHARED_ROWS = 256
"""Binary problems times views that a context of many classes keeps to by having fewer views, though never below 2."""
MAX_ROWS = 4096
"""Compiled rows of one context: binary problems times views. Beyond it a context is refused."""
FORWARD_BYTES = 64 << 20
"""What one layer of one forward may hold, about; more work is cut into several forwards."""
TOKEN_NUMBERS = 12
"""Numbers that a layer holds for a token beside its keys and values, in widths: states, q, k, v, the wide middle."""


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


def plan_rows(context: Context, shape: ModuleShape) -> Plan:
    """Which examples each compiled row holds, and in which order. Raises InvalidRequest beyond MAX_ROWS rows."""
    classes = context.classes
    num_problems = 1 if len(classes) == 2 else len(classes)
    views = max(1, min(context.recipe.views, max(2, SHARED_ROWS // num_problems)))
    if views * num_problems > MAX_ROWS:
        raise InvalidRequest(
            "examples", f"{len(classes)} classes; at most {MAX_ROWS // views} can be told apart in one context"
        )
    place = {name: i for i, name in enumerate(classes)}
    labels = np.array([place[label] for label in context.labels])
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
        PlannedRow(problem, view, _ordered(positive, view, shape.max_examples, context.seed), positive)
        for problem, positive in enumerate(positives)
        for view in range(views)
    ]
    return Plan(num_problems, views, rows)


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
class CompiledRows:
    """A context in the module's keys and values, [problems x views] rows; answers without looking at it again."""

    digest: str
    classes: tuple[str, ...]
    num_problems: int
    num_views: int
    reduction: Reduction
    rows: list[CompiledRow]

    @property
    def width(self) -> int:
        return self.reduction.mean.shape[0]

    @property
    def num_bytes(self) -> int:
        return self.reduction.num_bytes + sum(row.num_bytes for row in self.rows)


def compile_rows(
    context: Context, module: ReasoningModule, digest: str, reduction: Reduction | None = None
) -> CompiledRows:
    """`reduction` None fits one. Raises InvalidRequest as `plan_rows` does."""
    shape = module.shape
    plan = plan_rows(context, shape)
    recipe = replace(context.recipe, views=plan.num_views)
    if reduction is None:
        reduction = Reduction.fit(context.pool, dims=shape.dims, recipe=recipe, seed=context.seed)
    reduced = torch.from_numpy(reduction.apply(context.vectors)).to(module.positions.device)
    rows: list[CompiledRow] = []
    tokens_bytes = 2 * shape.max_examples * shape.width * 4 * TOKEN_NUMBERS
    at_once = max(1, FORWARD_BYTES // tokens_bytes)
    for i in range(0, len(plan.rows), at_once):
        some = plan.rows[i : i + at_once]
        rows += module.compile_rows(
            [reduced[row.view][torch.from_numpy(row.order)] for row in some],
            [torch.from_numpy(row.positive[row.order].astype(np.float32)).to(reduced.device) for row in some],
        )
    return CompiledRows(digest, context.classes, plan.num_problems, plan.num_views, reduction, rows)


def answer_rows(
    module: ReasoningModule, asked: Sequence[tuple[CompiledRows, Float[np.ndarray, "_ width"]]]
) -> list[Float[np.ndarray, "_ _"]]:
    """Class probabilities [queries, classes] of each context's queries, in forwards of at most FORWARD_BYTES.

    Keys and values are read where they lie. Raises InvalidRequest for queries of another width.
    """
    rows: list[CompiledRow] = []
    queries: list[Tensor] = []
    device = module.positions.device
    for context, vectors in asked:
        reduced = torch.from_numpy(context.reduction.apply(vectors)).to(device)
        for i, row in enumerate(context.rows):
            rows.append(row)
            queries.append(reduced[i % context.num_views])
    pieces = [torch.empty(0)]  # of each row's logits in turn, in the rows' order
    for forward in _forwards([len(one) for one in queries], module.shape):
        cut = [queries[row][first:end] for row, first, end in forward]
        pieces += module.answer([rows[row] for row, _, _ in forward], cut)
    sizes = [len(context.rows) * len(vectors) for context, vectors in asked]
    return [
        _probabilities(own.view(context.num_problems, context.num_views, len(vectors)).mean(1)).numpy()
        for (context, vectors), own in zip(
            asked, torch.cat([one.to("cpu") for one in pieces]).split(sizes), strict=True
        )
    ]


def _forwards(counts: Sequence[int], shape: ModuleShape) -> list[list[tuple[int, int, int]]]:
    """Rows and which of their queries (first, end) go together, in order: rows that lie together are asked together."""
    most = max(1, FORWARD_BYTES // (shape.width * 4 * TOKEN_NUMBERS))
    forwards: list[list[tuple[int, int, int]]] = [[]]
    free = most
    for row, count in enumerate(counts):
        first = 0
        while first < count:
            if not free:
                forwards.append([])
                free = most
            end = min(count, first + free)
            forwards[-1].append((row, first, end))
            free -= end - first
            first = end
    return [forward for forward in forwards if forward]


def _probabilities(logits: Float[Tensor, "problems queries"]) -> Float[Tensor, "queries classes"]:
    """Two classes: the logit is the second one's. More: sigmoids normalised, in logarithms so that none is 0 / 0."""
    if len(logits) == 1:
        return torch.stack([torch.sigmoid(-logits[0]), torch.sigmoid(logits[0])], dim=1)
    return torch.softmax(torch.nn.functional.logsigmoid(logits.double()), dim=0).T.float().contiguous()
