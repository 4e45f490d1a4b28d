"""Mixtures of expert vectors: z' = sum_k alpha_k z_k with alpha on the simplex (Transformer-squared, arXiv:2501.06252).

The vectors are mixed first and renormalised after. The reference allows any alpha in [0, 1]; ours sum to one, so that a
mixture of one expert is that expert. The base model takes part as the expert z = 1. numpy only.
"""

import math
from collections.abc import Mapping

import numpy as np

from metasepia.digests import canonical_json, digest_of
from metasepia.errors import InvalidRequest, UnknownName
from metasepia.experts import ExpertVectors
from metasepia.rows import Adapter

SIMPLEX_TOLERANCE = 1e-6


def check_simplex(adapter: Adapter) -> None:
    """Raises InvalidRequest unless the weights lie in [0, 1], sum to one, and name each expert once."""
    weights = [weight for _, weight in adapter]
    if not all(0 <= weight <= 1 for weight in weights):  # written so that NaN fails too
        raise InvalidRequest("weights", f"weights must lie from 0 to 1, got {weights}")
    total = math.fsum(weights)
    if not abs(total - 1) <= SIMPLEX_TOLERANCE:
        raise InvalidRequest("weights", f"weights must sum to 1, got {weights}, which sum to {total:g}")
    if len({digest for digest, _ in adapter}) != len(adapter):
        raise InvalidRequest("weights", "an expert is named twice; add its weights up")


def adapter_of(weights: Mapping[str, float]) -> Adapter:
    """The canonical adapter: sorted by digest, experts of weight 0 left out. Raises InvalidRequest off the simplex."""
    adapter = tuple(sorted((digest, float(weight)) for digest, weight in weights.items()))
    check_simplex(adapter)
    return tuple((digest, weight) for digest, weight in adapter if weight > 0)


def mixture_digest(adapter: Adapter) -> str:
    return digest_of({"kind": "mixture", "experts": [list(pair) for pair in sorted(adapter)]})


def mixture_blob(adapter: Adapter) -> bytes:
    """What the registry keeps of a mixture."""
    return canonical_json({"kind": "mixture", "experts": [list(pair) for pair in sorted(adapter)]})


class ExpertMixer:
    """Mixes experts of one backbone."""

    def __init__(self, experts: Mapping[str, ExpertVectors]) -> None:
        """`experts` by name or digest."""
        self._experts = dict(experts)

    def mix(self, weights: Mapping[str, float]) -> ExpertVectors:
        """The expert sum_k alpha_k z_k; a layer that one expert lacks counts as 1 there.

        Raises UnknownName, and InvalidRequest for weights off the simplex, for experts of different backbones or
        factors, and for renormalised experts together with others.
        """
        adapter = adapter_of(weights)
        for name, _ in adapter:
            if name not in self._experts:
                raise UnknownName("expert", name, tuple(sorted(self._experts)))
        parts = [(weight, self._experts[name]) for name, weight in adapter]
        first = parts[0][1]
        check_same_kind([expert for _, expert in parts])
        z: dict[str, np.ndarray] = {}
        for layer in sorted({layer for _, expert in parts for layer in expert.z}):
            length = next(len(expert.z[layer]) for _, expert in parts if layer in expert.z)
            total = np.zeros(length, np.float32)
            for weight, expert in parts:
                total += np.float32(weight) * expert.z.get(layer, np.float32(1))
            z[layer] = total
        return ExpertVectors(backbone=first.backbone, factors=first.factors, z=z, renormalise=first.renormalise)


def check_same_kind(experts: list[ExpertVectors]) -> None:
    """Raises InvalidRequest unless all share backbone, factors and form."""
    first = experts[0]
    for expert in experts[1:]:
        if (expert.backbone, expert.factors) != (first.backbone, first.factors):
            raise InvalidRequest("weights", "experts of different backbones or factors cannot be mixed")
        if expert.renormalise != first.renormalise:
            raise InvalidRequest("weights", "renormalised experts cannot be mixed with others; choose one kind")
