"""Contexts of the set module: compiled once to what its tokens say at each layer, then asked any number of times.

The reduction is a whole PCA of the examples (and of the unlabelled vectors): every direction that they span is kept, in
its own proportion, and the whitened geometry has a floor on the eigenvalues. Linear heads fold into one matrix a layer,
so a query costs the directions times the classes there, and the examples times the classes in the soft heads.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from metasepia.errors import InvalidRequest
from metasepia.reasoning.examples import Context
from metasepia.reasoning.reduction import centre
from metasepia.reasoning.set_module import NUM_GEOMETRIES, SOFT_GEOMETRIES, Scales, SetLayer, SetModule

MAX_COMPILED_BYTES = 1 << 30
"""Of one context; one with more examples times classes is refused."""
WORK_BYTES = 64 << 20
"""Attention weights, and compiled contexts stacked, that one forward holds; more work is cut into several forwards."""
_EPSILON = 1e-10
"""Eigenvalues below this share of the largest are rounding, no direction."""


@dataclass(frozen=True)
class Directions:
    """What was fitted on a pool of vectors: z = (x - mean) / size @ directions, and the whitened geometry's weights."""

    mean: Float[np.ndarray, " width"]
    size: float
    """The largest number in the centred pool: vectors of any scale become ordinary numbers before anything else."""
    directions: Float[np.ndarray, "width rank"]
    """Principal directions, scaled so that the pool's vectors have mean square norm 1."""
    whitening: Float[np.ndarray, " rank"]
    """m / (eigenvalue + m): 1 where an eigenvalue is small beside the floor m."""
    pooled: float
    """Frobenius norm of the pool's Gram matrix, its trace being the number of vectors."""
    num_pooled: int

    @classmethod
    def fit(cls, pool: Float[np.ndarray, "pool width"]) -> "Directions":
        """Finite for any finite vectors; vectors that are all alike have no direction and go to zero."""
        mean, centred, size = centre(pool)
        if centred is None:
            nothing = np.zeros((pool.shape[1], 1), np.float32)
            return cls(mean, size, nothing, np.ones(1, np.float32), 1.0, len(pool))
        if len(pool) <= pool.shape[1]:
            squares, left = np.linalg.eigh(centred @ centred.T)
            kept = squares > _EPSILON * squares[-1]
            components = centred.T @ (left[:, kept] / np.sqrt(squares[kept]))
        else:
            squares, components = np.linalg.eigh(centred.T @ centred)
            kept = squares > _EPSILON * squares[-1]
            components = components[:, kept]
        eigenvalues = squares[kept] / len(pool)
        trace, total = eigenvalues.sum(), np.square(eigenvalues).sum()
        floor = total / trace
        return cls(
            mean,
            size,
            (components / np.sqrt(trace)).astype(np.float32),
            (floor / (eigenvalues + floor)).astype(np.float32),
            float(np.sqrt(total) / trace * len(pool)),
            len(pool),
        )

    def apply(self, vectors: Float[np.ndarray, "n width"]) -> Float[np.ndarray, "n rank"]:
        """A vector far outside the pool is drawn in to norm 100, ten times what any example of a hundred can have."""
        reduced = ((vectors.astype(np.float64) - self.mean) / self.size) @ self.directions
        norm = np.linalg.norm(reduced, axis=1, keepdims=True)
        return (reduced * np.minimum(1.0, 100.0 / np.maximum(norm, 1e-30))).astype(np.float32)

    @property
    def num_bytes(self) -> int:
        return self.mean.nbytes + self.directions.nbytes + self.whitening.nbytes


@dataclass(frozen=True)
class LayerSays:
    """What the tokens of contexts say at one layer; a leading batch axis where several are worked on at once."""

    linear: Float[Tensor, "*batch linear_heads rank spoken"]
    """Linear heads over examples, then over unlabelled vectors, folded: a query hears z @ this."""
    soft: Float[Tensor, "*batch soft_heads examples spoken"]
    unlabelled: Float[Tensor, "*batch geometries unlabelled spoken"] | None
    sharpness: Float[Tensor, "*batch sharp_heads"]
    """Of the soft heads over examples, then over unlabelled vectors."""


@dataclass(frozen=True)
class CompiledSet:
    """A context in the set module's terms; answers without looking at the examples again."""

    digest: str
    classes: tuple[str, ...]
    reduction: Directions
    keys: Float[Tensor, "geometries examples rank"]
    """What inner products of the soft heads are taken with."""
    present: Float[Tensor, " examples"]
    """0 for examples left out (`compile_subsets`), else 1."""
    unlabelled_keys: Float[Tensor, "geometries unlabelled rank"] | None
    share: Float[Tensor, " classes"]
    facts: Float[Tensor, " facts"]
    layers: tuple[LayerSays, ...]

    @property
    def width(self) -> int:
        return self.reduction.mean.shape[0]

    @property
    def num_bytes(self) -> int:
        tensors = [self.keys, self.unlabelled_keys]
        for layer in self.layers:
            tensors += [layer.linear, layer.soft, layer.unlabelled]
        return self.reduction.num_bytes + sum(t.numel() * t.element_size() for t in tensors if t is not None)


def compile_set(context: Context, module: SetModule, digest: str, reduction: Directions | None = None) -> CompiledSet:
    """`reduction` None fits one. Raises InvalidRequest beyond MAX_COMPILED_BYTES."""
    everything = np.arange(len(context.labels))
    return compile_subsets(context, module, [digest], [everything], reduction or Directions.fit(context.pool))[0]


@torch.no_grad()
def compile_subsets(
    context: Context, module: SetModule, digests: Sequence[str], keeps: Sequence[np.ndarray], reduction: Directions
) -> list[CompiledSet]:
    """Contexts of some examples each, under one reduction and one set of keys. Raises as `compile_set` does."""
    shape, n, num_classes = module.shape, len(context.labels), len(context.classes)
    num_unlabelled = 0 if context.unlabelled is None else len(context.unlabelled)
    spoken = num_classes * shape.value_dim
    rank = reduction.whitening.shape[0]
    said = (shape.soft_heads * n + len(SOFT_GEOMETRIES) * num_unlabelled + (NUM_GEOMETRIES + 2) * rank) * spoken
    if 4 * said * shape.layers > MAX_COMPILED_BYTES:
        raise InvalidRequest(
            "examples",
            f"{n} examples of {num_classes} classes would take {4 * said * shape.layers >> 20} MiB compiled; at most "
            f"{MAX_COMPILED_BYTES >> 20} are allowed: send fewer examples or classes",
        )
    z = torch.from_numpy(reduction.apply(context.vectors)).to(module.device)
    z_unlabelled = None
    if context.unlabelled is not None:
        z_unlabelled = torch.from_numpy(reduction.apply(context.unlabelled)).to(module.device)
    place = {name: i for i, name in enumerate(context.classes)}
    labels = torch.tensor([place[label] for label in context.labels], device=module.device)
    one_hot = torch.nn.functional.one_hot(labels, num_classes).float()
    at_once = max(1, WORK_BYTES // (4 * (said + 2 * (n + num_unlabelled) ** 2)))
    compiled: list[CompiledSet] = []
    for begin in range(0, len(keeps), at_once):
        some = keeps[begin : begin + at_once]
        present = torch.zeros(len(some), n, device=module.device)
        for row, keep in zip(present, some, strict=True):
            row[torch.from_numpy(np.asarray(keep, dtype=np.int64)).to(module.device)] = 1.0
        compiled += _compile(context.classes, module, reduction, z, z_unlabelled, one_hot, present, digests[begin:])
    return compiled


def _compile(
    classes: tuple[str, ...],
    module: SetModule,
    reduction: Directions,
    z: Float[Tensor, "examples rank"],
    z_unlabelled: Float[Tensor, "unlabelled rank"] | None,
    one_hot: Float[Tensor, "examples classes"],
    present: Float[Tensor, "batch examples"],
    digests: Sequence[str],
) -> list[CompiledSet]:
    batch = len(present)
    white = torch.from_numpy(reduction.whitening).to(module.device)
    filters = torch.stack([torch.ones_like(white), white, 1 - white])  # [geometries, rank]
    grams = torch.stack([(z * one) @ z.T for one in filters])
    pooled = torch.full((batch,), reduction.pooled, device=module.device).clamp_min(1e-6)
    scales = Scales.of(grams.expand(batch, -1, -1, -1), present, pooled)
    mask = None if bool(present.all()) else (present - 1) * 1e9
    among = grams[list(SOFT_GEOMETRIES)]  # the examples' products with their own keys
    del grams
    among.diagonal(dim1=1, dim2=2).fill_(-1e9)
    num_examples = present.sum(1)
    facts = scales.facts(num_examples, torch.full_like(num_examples, reduction.num_pooled))
    share = (one_hot * present[..., None]).sum(1) / num_examples[:, None]
    # Scales differ between subsets; the keys that they share are left unscaled, and sharpness is divided instead.
    keys = torch.stack([z * filters[g] for g in SOFT_GEOMETRIES])
    unlabelled_keys = None
    if z_unlabelled is not None:
        unlabelled_keys = torch.stack([z_unlabelled * filters[g] for g in SOFT_GEOMETRIES])
    softness = (scales.diagonal * scales.spread)[:, SOFT_GEOMETRIES]  # [batch, 2]
    straightness = (scales.diagonal * scales.frobenius)[:, :, None, None]

    hidden = module.read_in(module.begin_examples(one_hot.expand(batch, -1, -1), share, facts))
    beside = across = beside_products = None
    if z_unlabelled is not None and unlabelled_keys is not None:
        beside = module.read_in(module.begin(share, facts, len(z_unlabelled), True))
        across = (z @ unlabelled_keys.transpose(-1, -2)).expand(batch, -1, -1, -1)
        others = z_unlabelled @ unlabelled_keys.transpose(-1, -2)
        others.diagonal(dim1=1, dim2=2).fill_(-1e9)
        to_examples = _masked((z_unlabelled @ keys.transpose(-1, -2)).expand(batch, -1, -1, -1), mask)
        beside_products = Products(to_examples, others.expand(batch, -1, -1, -1))
    products = Products(_masked(among.expand(batch, -1, -1, -1), mask), across)
    layers: list[LayerSays] = []
    half = module.shape.soft_heads // 2
    for layer in module.layers:
        assert isinstance(layer, SetLayer)
        said = layer.spoken(hidden, module.shape.heads) * present[:, None, :, None]
        linear = (z.T @ said[:, :NUM_GEOMETRIES]) * filters[..., None] / straightness
        unlabelled = None
        if beside is not None and z_unlabelled is not None:
            also = layer.spoken(beside, module.shape.unlabelled_heads)
            straight, unlabelled = also[:, : len(SOFT_GEOMETRIES)], also[:, len(SOFT_GEOMETRIES) :]
            folded = (z_unlabelled.T @ straight) * filters[list(SOFT_GEOMETRIES), :, None]
            folded = folded / (scales.diagonal[:, SOFT_GEOMETRIES] * pooled[:, None])[..., None, None]
            linear = torch.cat([linear, folded], 1)
        sharpness = layer.sharpnesses(facts) / softness.repeat_interleave(half, dim=1)
        if unlabelled is not None:
            sharpness = torch.cat([sharpness, layer.unlabelled_sharpness.exp() / softness], 1)
        says = LayerSays(linear, said[:, NUM_GEOMETRIES:], unlabelled, sharpness)
        layers.append(says)
        if len(layers) == len(module.layers):
            break
        hidden = layer.finish(hidden, _padded(_hear(says, z.expand(batch, -1, -1), products), module))
        if beside is not None and z_unlabelled is not None and beside_products is not None:
            beside = layer.finish(beside, _hear(says, z_unlabelled.expand(batch, -1, -1), beside_products))
    return [
        CompiledSet(
            digests[i],
            classes,
            reduction,
            keys,
            present[i],
            unlabelled_keys,
            share[i],
            facts[i],
            tuple(
                LayerSays(
                    says.linear[i].clone(),
                    says.soft[i].clone(),
                    None if says.unlabelled is None else says.unlabelled[i].clone(),
                    says.sharpness[i].clone(),
                )
                for says in layers
            ),
        )
        for i in range(batch)
    ]


@dataclass(frozen=True)
class Products:
    """Inner products of rows with the keys of the soft heads. No layer changes them: made once for all layers.

    A key that a row must not hear (itself, an example left out, padding) stands at -1e9.
    """

    examples: Float[Tensor, "batch geometries rows examples"]
    unlabelled: Float[Tensor, "batch geometries rows unlabelled"] | None


def _masked(products: Tensor, mask: Tensor | None) -> Tensor:
    return products if mask is None else products + mask[:, None, None]


def _hear(
    says: LayerSays, z: Float[Tensor, "batch rows rank"], products: Products
) -> Float[Tensor, "batch heads rows spoken"]:
    """What rows hear, in the order that the layer takes: linear and soft heads over examples, then over unlabelled."""
    half = says.soft.shape[-3] // 2
    linear = z.unsqueeze(-3) @ says.linear
    soft: list[Tensor] = []
    step = max(1, WORK_BYTES // (4 * z.shape[0] * 2 * half * max(1, products.examples.shape[-1])))
    for some in products.examples.split(step, dim=2):
        weights = some.repeat_interleave(half, dim=1) * says.sharpness[:, : 2 * half, None, None]
        soft.append(torch.softmax(weights, -1) @ says.soft)
    heard = [linear[:, :NUM_GEOMETRIES], torch.cat(soft, 2)]
    if says.unlabelled is not None and products.unlabelled is not None:
        sharp = torch.softmax(products.unlabelled * says.sharpness[:, 2 * half :, None, None], -1)
        heard += [linear[:, NUM_GEOMETRIES:], sharp @ says.unlabelled]
    return torch.cat(heard, 1)


def _padded(heard: Tensor, module: SetModule) -> Tensor:
    """Without unlabelled vectors their heads are silent."""
    missing = module.shape.heads + module.shape.unlabelled_heads - heard.shape[1]
    return torch.nn.functional.pad(heard, (0, 0, 0, 0, 0, missing))


@torch.no_grad()
def answer_sets(
    module: SetModule, asked: Sequence[tuple[CompiledSet, Float[np.ndarray, "_ _"]]]
) -> list[Float[np.ndarray, "_ _"]]:
    """Class probabilities [queries, classes] of each context's queries; contexts of as many classes share forwards.

    A query's answer does not depend on the other queries or contexts beyond rounding.
    """
    results = [np.zeros((len(vectors), len(context.classes)), np.float32) for context, vectors in asked]
    # Long lists of queries are cut, so that the pieces that share a forward are of similar size.
    pieces = [(i, begin) for i, (_, vectors) in enumerate(asked) for begin in range(0, len(vectors), 256)]

    def size(piece: tuple[int, int]) -> tuple[int, int, int, int]:
        context, vectors = asked[piece[0]]
        unlabelled = 0 if context.unlabelled_keys is None else context.unlabelled_keys.shape[1]
        return len(context.classes), unlabelled, context.keys.shape[1], min(256, len(vectors) - piece[1])

    group: list[tuple[int, int]] = []
    num_bytes = 0
    for piece in sorted(pieces, key=size):
        classes, unlabelled, examples, queries = size(piece)
        context = asked[piece[0]][0]
        cost = context.num_bytes - context.reduction.num_bytes
        cost += 4 * queries * (2 * classes * module.shape.width * 4 + module.shape.heads * (examples + unlabelled))
        first = size(group[0])[:2] if group else (classes, unlabelled)
        if group and (num_bytes + cost > WORK_BYTES or (first[0], first[1] > 0) != (classes, unlabelled > 0)):
            _answer_group(module, asked, group, results)
            group, num_bytes = [], 0
        group.append(piece)
        num_bytes += cost
    if group:
        _answer_group(module, asked, group, results)
    return results


def _answer_group(
    module: SetModule,
    asked: Sequence[tuple[CompiledSet, np.ndarray]],
    group: Sequence[tuple[int, int]],
    results: list[np.ndarray],
) -> None:
    contexts = [asked[i][0] for i, _ in group]
    reduced = [
        torch.from_numpy(context.reduction.apply(asked[i][1][begin : begin + 256])).to(module.device)
        for context, (i, begin) in zip(contexts, group, strict=True)
    ]
    rank = max(context.keys.shape[2] for context in contexts)
    z = _stack(reduced, (max(len(one) for one in reduced), rank))
    examples = max(context.keys.shape[1] for context in contexts)
    keys = _stack([context.keys for context in contexts], (len(SOFT_GEOMETRIES), examples, rank))
    present = _stack([context.present for context in contexts], (examples,))
    mask = None if bool(present.all()) else (present - 1) * 1e9
    unlabelled_keys, unlabelled_mask, unlabelled = None, None, 0
    others = [one.unlabelled_keys for one in contexts if one.unlabelled_keys is not None]
    if others:
        unlabelled = max(one.shape[1] for one in others)
        unlabelled_keys = _stack(others, (len(SOFT_GEOMETRIES), unlabelled, rank))
        there = _stack([z.new_ones(one.shape[1]) for one in others], (unlabelled,))
        unlabelled_mask = (there - 1) * 1e9
    to_unlabelled = None
    if unlabelled_keys is not None:
        to_unlabelled = _masked(z.unsqueeze(1) @ unlabelled_keys.transpose(-1, -2), unlabelled_mask)
    products = Products(_masked(z.unsqueeze(1) @ keys.transpose(-1, -2), mask), to_unlabelled)
    share, facts = torch.stack([one.share for one in contexts]), torch.stack([one.facts for one in contexts])
    hidden = module.read_in(module.begin(share, facts, z.shape[1], True))
    spoken = len(contexts[0].classes) * module.shape.value_dim
    for at, layer in enumerate(module.layers):
        assert isinstance(layer, SetLayer)
        parts = [context.layers[at] for context in contexts]
        silent = [part.unlabelled for part in parts if part.unlabelled is not None]
        says = LayerSays(
            _stack([part.linear for part in parts], (parts[0].linear.shape[0], rank, spoken)),
            _stack([part.soft for part in parts], (module.shape.soft_heads, examples, spoken)),
            _stack(silent, (len(SOFT_GEOMETRIES), unlabelled, spoken)) if silent else None,
            torch.stack([part.sharpness for part in parts]),
        )
        hidden = layer.finish(hidden, _padded(_hear(says, z, products), module))
    chances = torch.softmax(module.logits_of(hidden), dim=-1).cpu().numpy()
    for (i, begin), one, own in zip(group, reduced, chances, strict=True):
        results[i][begin : begin + len(one)] = own[: len(one)]


def _stack(tensors: Sequence[Tensor], shape: tuple[int, ...]) -> Tensor:
    """[len(tensors), *shape], each tensor padded with zeros at its ends."""
    if all(one.shape == shape for one in tensors):
        return torch.stack(list(tensors)) if len(tensors) > 1 else tensors[0].unsqueeze(0)
    stacked = tensors[0].new_zeros(len(tensors), *shape)
    for row, one in zip(stacked, tensors, strict=True):
        row[tuple(slice(0, size) for size in one.shape)] = one
    return stacked
