"""An expert of one backbone put onto another (Transformer-squared, arXiv:2501.06252, section 4.4). numpy only.

The paper moves a vector of Llama-3-8B to Mistral-7B entry by entry: both order their singular values, and their shapes
are equal. Here shapes may differ. A target layer takes the vector of the source layer of its kind (the name without the
block's number) at its relative depth; a vector of another length is interpolated linearly along the relative position
in the spectrum. `shuffled` permutes each vector within itself: what is left of an effect then is not in the order.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float32

from metasepia.errors import InvalidRequest
from metasepia.experts.vectors import ExpertVectors, FactorIndex

Mode = Literal["ordered", "interpolated", "shuffled"]
MODES: tuple[Mode, ...] = get_args(Mode)


def transferred(
    expert: ExpertVectors, source: FactorIndex, target: FactorIndex, mode: Mode, *, seed: int = 0
) -> ExpertVectors:
    """The expert on the target's factors; a target layer whose source layer has no vector has none either.

    `source` and `target` are the layers that the two backbones have factored. `ordered` wants equal shapes and changes
    no number; `interpolated` takes any; `shuffled` is the one of the two that fits, each vector permuted by `seed`. A
    truncated vector counts as 1 beyond its end, and stays truncated where nothing is interpolated. Raises
    InvalidRequest where shapes are unequal and must not be, or where the two share no kind of layer.
    """
    pairs = matched(tuple(source.lengths), tuple(target.lengths))
    if not any(name in expert.z for name in pairs.values()):
        kinds = [sorted({kind_of(name)[1] for name in names}) for names in (expert.z, target.lengths)]
        raise InvalidRequest("expert", f"its layers are {kinds[0]} and the target's {kinds[1]}: none is of one kind")
    unequal = unequal_layers(source, target)
    if mode == "ordered" and unequal:
        raise InvalidRequest("mode", f"ordered wants backbones of equal shape, and {unequal}; choose interpolated")
    z: dict[str, Float32[np.ndarray, " singular"]] = {}
    for place, (name, origin) in enumerate(sorted(pairs.items())):
        if origin not in expert.z:
            continue
        vector = expert.z[origin]
        if source.lengths[origin] != target.lengths[name]:
            vector = resampled(_whole(vector, source.lengths[origin]), target.lengths[name])
        if mode == "shuffled":
            vector = np.random.default_rng([seed, place]).permutation(vector)
        z[name] = np.ascontiguousarray(vector, np.float32)
    return ExpertVectors(backbone=target.backbone, factors=target.digest, z=z, renormalise=expert.renormalise)


def unequal_layers(source: FactorIndex, target: FactorIndex) -> str:
    """In words, where the shapes of two backbones differ; empty where they are equal."""
    counts = num_blocks(source.lengths), num_blocks(target.lengths)
    if counts[0] != counts[1]:
        return f"one has {counts[0]} blocks and the other {counts[1]}"
    for name, origin in matched(tuple(source.lengths), tuple(target.lengths)).items():
        lengths = source.lengths[origin], target.lengths[name]
        if lengths[0] != lengths[1]:
            return f"{origin} has {lengths[0]} singular values and {name} has {lengths[1]}"
    return ""


def matched(source: Sequence[str], target: Sequence[str]) -> dict[str, str]:
    """For each target layer whose kind the source has: the source layer of that kind at its relative depth.

    Block j of n stands at (j + 1/2) / n. Layers outside the blocks match by name.
    """
    blocks: dict[str, list[tuple[int, str]]] = {}
    for name in source:
        block, kind = kind_of(name)
        blocks.setdefault(kind, []).append((-1 if block is None else block, name))
    depths = num_blocks(source), num_blocks(target)
    pairs: dict[str, str] = {}
    for name in target:
        block, kind = kind_of(name)
        if kind not in blocks:
            continue
        if block is None:
            pairs[name] = blocks[kind][0][1]
            continue
        wanted = (block + 0.5) / depths[1] * depths[0] - 0.5
        pairs[name] = min(blocks[kind], key=lambda one: (abs(one[0] - wanted), one[0]))[1]
    return pairs


def num_blocks(names: Iterable[str]) -> int:
    return 1 + max((block for block, _ in map(kind_of, names) if block is not None), default=-1)


def kind_of(name: str) -> tuple[int | None, str]:
    """A layer's block, and its name without it: (3, "mlp.up_proj.weight") of model.layers.3.mlp.up_proj.weight.

    What stands before the number is the family's word for a block and is left out.
    """
    found = re.fullmatch(r"(?:.*?\.)?(\d+)\.(.+)", name)
    return (int(found[1]), found[2]) if found else (None, name)


def resampled(vector: Float32[np.ndarray, " singular"], length: int) -> Float32[np.ndarray, " length"]:
    """Values at the relative positions (i + 1/2) / length of the spectrum, linear between those given, flat outside."""
    given = (np.arange(len(vector)) + 0.5) / len(vector)
    return np.interp((np.arange(length) + 0.5) / length, given, vector).astype(np.float32)


def _whole(vector: Float32[np.ndarray, " kept"], length: int) -> Float32[np.ndarray, " singular"]:
    return np.concatenate([vector, np.ones(length - len(vector), np.float32)])
