"""Random numbers as pure functions of (seed, stream, step, index): the same bits on CPU and GPU, in any batch size.

A 64-bit key is hashed from (stream, seed, step); number `index` of that key is SplitMix64's output (Steele, Lea and
Flood, OOPSLA 2014) for the state key + index * golden. Normal and logistic numbers are read from tables of 2**17
quantiles made once on the CPU, so no device's own logarithm enters: their tails end at 4.5 and 12.5.
"""

import functools
import hashlib
import math
from statistics import NormalDist

import torch
from jaxtyping import Float, Int
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_TABLE_BITS = 16


def _signed(value: int) -> int:
    """The int64 with the same 64 bits."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def key_of(stream: str, seed: int, step: int) -> int:
    """An int64 that names one sequence of numbers; distinct arguments give unrelated sequences."""
    return int.from_bytes(hashlib.sha256(f"{stream}\0{seed}\0{step}".encode()).digest()[:8], "little", signed=True)


def _shift_right(x: Tensor, num_bits: int) -> Tensor:
    """Logical shift; torch's own keeps the sign."""
    return (x >> num_bits).bitwise_and_((1 << (64 - num_bits)) - 1)


def bits(key: int | Int[Tensor, "..."], index: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """64 uniform bits for each index, as int64; several keys at once are a tensor that broadcasts against the index."""
    x = index * _signed(GOLDEN) + key
    for shift, multiplier in zip((30, 27), _MULTIPLIERS, strict=True):
        x ^= _shift_right(x, shift)
        x *= _signed(multiplier)
    x ^= _shift_right(x, 31)
    return x


@functools.cache
def _quantiles(kind: str, device: torch.device) -> Tensor:
    """Quantiles at the middles of 2**17 equal steps of probability: each at 2 i + 1, its mirror image at 2 i."""
    normal = NormalDist()
    levels = [0.5 + (i + 0.5) / (2 << _TABLE_BITS) for i in range(1 << _TABLE_BITS)]
    values = [normal.inv_cdf(p) if kind == "normal" else math.log(p / (1 - p)) for p in levels]
    upper = torch.tensor(values, dtype=torch.float64).to(torch.float32)
    return torch.stack((-upper, upper), dim=1).flatten().to(device)


def _from_table(kind: str, key: int | Tensor, index: Tensor) -> Tensor:
    drawn = bits(key, index)
    # The highest 16 bits choose the quantile, the lowest bit its sign.
    place = drawn >> (63 - _TABLE_BITS)
    place &= (2 << _TABLE_BITS) - 2
    place |= drawn.bitwise_and_(1)
    return _quantiles(kind, index.device).index_select(0, place.flatten()).view(place.shape)


def normal(key: int | Int[Tensor, "..."], index: Int[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Standard normal numbers."""
    return _from_table("normal", key, index)


def logistic(key: int | Int[Tensor, "..."], index: Int[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Numbers with P(value < t) = sigmoid(t): `score > logistic` is a Bernoulli draw of probability sigmoid(score)."""
    return _from_table("logistic", key, index)


def choice(
    num_choices: int | Int[Tensor, "..."], key: int | Int[Tensor, "..."], index: Int[Tensor, "..."]
) -> Int[Tensor, "..."]:
    """Integers from 0 to num_choices - 1, uniform to one part in 2**31 / num_choices."""
    return (_shift_right(bits(key, index), 33) * num_choices) >> 31
