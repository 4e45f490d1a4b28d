"""Mixtures of experts: z' = sum_k alpha_k z_k with alpha on the simplex (Transformer-squared, arXiv:2501.06252).

The vectors are mixed first and renormalised after. The reference allows any alpha in [0, 1]; ours sum to one, over all
layers or in each layer by itself, so that a mixture of one expert is that expert. The base model takes part under the
name `base` as the expert z = 1. Low-rank adapters are mixed among themselves: sum_k alpha_k delta_k. numpy only.
"""

import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np

from metasepia.digests import canonical_json, digest_of, is_digest
from metasepia.errors import CorruptArtefact, InvalidRequest, UnknownName
from metasepia.experts.lora import LoraAdapter
from metasepia.experts.vectors import ExpertVectors
from metasepia.rows import Adapter, Weight

BASE = "base"
"""What a client calls the base model where an expert is named."""
SIMPLEX_TOLERANCE = 1e-6


def check_simplex(adapter: Adapter, num_layers: int | None = None) -> None:
    """Raises InvalidRequest unless the weights lie in [0, 1] and sum to one in each layer, each expert named once.

    `num_layers` is the number of factored layers, where it is known: weights by layer must be as many.
    """
    if len({digest for digest, _ in adapter}) != len(adapter):
        raise InvalidRequest("weights", "an expert is named twice; add its weights up")
    lengths = {len(weight) for _, weight in adapter if isinstance(weight, tuple)}
    if len(lengths) > 1 or 0 in lengths:
        raise InvalidRequest("weights", f"weights by layer must be of one length, got {sorted(lengths)}")
    if num_layers is not None and lengths - {num_layers}:
        raise InvalidRequest(
            "weights", f"weights by layer must be one for each of the {num_layers} factored layers, got {lengths.pop()}"
        )
    for layer in range(lengths.pop() if lengths else 1):
        weights = [weight_in(weight, layer) for _, weight in adapter]
        where = f" in layer {layer}" if any(isinstance(weight, tuple) for _, weight in adapter) else ""
        if not all(0 <= weight <= 1 for weight in weights):  # written so that NaN fails too
            raise InvalidRequest("weights", f"weights must lie from 0 to 1, got {weights}{where}")
        total = math.fsum(weights)
        if not abs(total - 1) <= SIMPLEX_TOLERANCE:
            raise InvalidRequest("weights", f"weights must sum to 1, got {weights}, which sum to {total:g}{where}")


def weight_in(weight: Weight, layer: int) -> float:
    """An expert's weight in one layer."""
    return weight[layer] if isinstance(weight, tuple) else weight


def adapter_of(weights: Mapping[str, float | Sequence[float]]) -> Adapter:
    """The canonical adapter: sorted by digest, one number where all layers agree, experts of weight 0 left out.

    Raises InvalidRequest off the simplex.
    """
    given: Adapter = tuple(
        (digest, float(weight) if isinstance(weight, (int, float)) else tuple(map(float, weight)))
        for digest, weight in sorted(weights.items())
    )
    check_simplex(given)
    adapter = tuple((digest, _canonical(weight)) for digest, weight in given)
    return tuple((digest, weight) for digest, weight in adapter if weight != 0)


def _canonical(weight: Weight) -> Weight:
    return weight[0] if isinstance(weight, tuple) and len(set(weight)) == 1 else weight


def added_up(parts: Iterable[tuple[str, Weight]]) -> Adapter:
    """The canonical adapter of experts that may be named more than once. Raises InvalidRequest off the simplex."""
    totals: dict[str, Weight] = {}
    for digest, weight in parts:
        before = totals.get(digest, 0.0)
        length = max(len(one) if isinstance(one, tuple) else 0 for one in (before, weight))
        layers = tuple(weight_in(before, i) + weight_in(weight, i) for i in range(max(length, 1)))
        totals[digest] = layers if length else layers[0]
    return adapter_of(totals)


def base_of(expert: ExpertVectors) -> ExpertVectors:
    """The base model as an expert that this one can be mixed with."""
    return ExpertVectors.identity(expert.backbone, expert.factors, expert.renormalise)


def adapter_of_rows(adapter: Adapter, bases: Collection[str]) -> Adapter:
    """What rows carry for an adapter: the base alone, whose digests are `bases`, is the base weights themselves."""
    return () if len(adapter) == 1 and adapter[0][0] in bases else adapter


def mixture_digest(adapter: Adapter) -> str:
    return digest_of(_tree(adapter))


def mixture_blob(adapter: Adapter) -> bytes:
    """What the registry keeps of a mixture."""
    return canonical_json(_tree(adapter))


def _tree(adapter: Adapter) -> dict[str, object]:
    return {"kind": "mixture", "experts": [list(pair) for pair in sorted(adapter, key=lambda pair: pair[0])]}


def read_mixture(blob: bytes, name: str = "the mixture") -> Adapter:
    """The adapter that `mixture_blob` wrote. Raises CorruptArtefact."""
    try:
        experts = json.loads(blob)["experts"]
        if not all(is_digest(digest) for digest, _ in experts):
            raise ValueError("an expert's digest is none")
        return adapter_of(dict(experts))
    except (ValueError, KeyError, TypeError, InvalidRequest) as error:
        raise CorruptArtefact(name, f"it is not a mixture ({error})") from error


class ExpertMixer:
    """Mixes experts of one backbone."""

    def __init__(self, experts: Mapping[str, ExpertVectors], layers: Sequence[str] = ()) -> None:
        """`experts` by name or digest; the base they can be mixed with is known by its digest without being given.

        `layers` are the factored layers in their order (`FactorIndex.lengths`), for weights by layer.
        """
        bases = [base_of(expert) for expert in experts.values()]
        self._experts = {base.digest: base for base in bases} | dict(experts)
        self._layers = tuple(layers)
        self._known = tuple(sorted(experts))

    def mix(self, weights: Mapping[str, float | Sequence[float]]) -> ExpertVectors:
        """The expert sum_k alpha_k z_k; where an expert has no multipliers they count as 1.

        Raises UnknownName, and InvalidRequest for weights off the simplex, for experts of different backbones or
        factors, and for renormalised experts together with others.
        """
        adapter = adapter_of(weights)
        for name, _ in adapter:
            if name not in self._experts:
                raise UnknownName("expert", name, self._known)
        parts = [(weight, self._experts[name]) for name, weight in adapter]
        first = parts[0][1]
        check_same_kind([expert for _, expert in parts])
        place: dict[str, int] = {}
        if any(isinstance(weight, tuple) for weight, _ in parts):
            check_simplex(adapter, len(self._layers))
            place = {layer: i for i, layer in enumerate(self._layers)}
        z: dict[str, np.ndarray] = {}
        for layer in sorted({layer for _, expert in parts for layer in expert.z}):
            length = max(len(expert.z[layer]) for _, expert in parts if layer in expert.z)
            total = np.zeros(length, np.float32)
            for weight, expert in parts:
                own = expert.z.get(layer, np.ones(0, np.float32))
                padded = np.concatenate([own, np.ones(length - len(own), np.float32)])
                total += np.float32(weight_in(weight, place.get(layer, 0))) * padded
            z[layer] = total
        return ExpertVectors(backbone=first.backbone, factors=first.factors, z=z, renormalise=first.renormalise)


def check_same_kind(experts: Sequence[ExpertVectors | LoraAdapter]) -> None:
    """Raises InvalidRequest unless all share backbone, factors and form."""
    first = experts[0]
    for expert in experts[1:]:
        if expert.backbone != first.backbone:
            raise InvalidRequest("weights", "experts of different backbones or factors cannot be mixed")
        if isinstance(expert, LoraAdapter) or isinstance(first, LoraAdapter):
            if type(expert) is not type(first):
                raise InvalidRequest(
                    "weights", "low-rank adapters cannot be mixed with expert vectors; choose one kind"
                )
            continue
        if expert.factors != first.factors:
            raise InvalidRequest("weights", "experts of different backbones or factors cannot be mixed")
        if expert.renormalise != first.renormalise:
            raise InvalidRequest("weights", "renormalised experts cannot be mixed with others; choose one kind")
