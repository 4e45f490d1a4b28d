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
    return (x >> num_bits) & ((1 << (64 - num_bits)) - 1)


def bits(key: int, index: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """64 uniform bits for each index, as int64."""
    x = index * _signed(GOLDEN) + key
    for shift, multiplier in zip((30, 27), _MULTIPLIERS, strict=True):
        x = (x ^ _shift_right(x, shift)) * _signed(multiplier)
    return x ^ _shift_right(x, 31)


@functools.cache
def _upper_quantiles(kind: str, device: torch.device) -> Tensor:
    """Quantiles above the median at the middles of 2**16 equal steps of probability; the lower half is its mirror."""
    normal = NormalDist()
    levels = [0.5 + (i + 0.5) / (2 << _TABLE_BITS) for i in range(1 << _TABLE_BITS)]
    values = [normal.inv_cdf(p) if kind == "normal" else math.log(p / (1 - p)) for p in levels]
    return torch.tensor(values, dtype=torch.float64).to(torch.float32).to(device)


def _from_table(kind: str, key: int, index: Tensor) -> Tensor:
    drawn = bits(key, index)
    upper = _upper_quantiles(kind, index.device)[_shift_right(drawn, 64 - _TABLE_BITS)]
    return torch.where((drawn & 1) == 1, upper, -upper)


def normal(key: int, index: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Standard normal numbers."""
    return _from_table("normal", key, index)


def logistic(key: int, index: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Numbers with P(value < t) = sigmoid(t): `score > logistic` is a Bernoulli draw of probability sigmoid(score)."""
    return _from_table("logistic", key, index)


def choice(num_choices: int, key: int, index: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """Integers from 0 to num_choices - 1, uniform to one part in 2**31 / num_choices."""
    return (_shift_right(bits(key, index), 33) * num_choices) >> 31
