"""Sums of squared per-text gradients of linear layers, and the count sketch that makes millions of them a vector.

A linear layer's weight gradient for one text is the sum over its tokens of (gradient at the output) (input)^T, so
E[g^2] needs the text's product for itself before it is squared: one small product a text and weight, none of them kept.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from metasepia.digests import digest_of


class CountSketch:
    """A linear map of named tensors to `size` numbers that keeps scalar products (Charikar et al., 2002).

    Each entry is added to one place with a random sign. Place and sign are a function of the tensor's name, the
    entry's index and the seed alone, so sketches made anywhere are comparable. E[<sketch(a), sketch(b)>] = <a, b>, with
    a standard deviation of at most sqrt(2 / size) |a| |b|.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed = size, seed
        self._places: dict[tuple[str, int], tuple[np.ndarray, np.ndarray]] = {}

    def __call__(self, tensors: Mapping[str, Float[Tensor, "..."]]) -> Float[np.ndarray, " size"]:
        """float64; summed in the order of the names, so that equal tensors give equal bits."""
        total = np.zeros(self.size)
        for name in sorted(tensors):
            values = tensors[name].detach().cpu().double().flatten().numpy()
            places, signs = self._of(name, len(values))
            total += np.bincount(places, weights=values * signs, minlength=self.size)
        return total

    def _of(self, name: str, count: int) -> tuple[np.ndarray, np.ndarray]:
        if (name, count) not in self._places:
            bits = hashed(count, name, self.seed)
            signs = (bits & np.uint64(1)).astype(np.int8) * 2 - 1
            self._places[name, count] = ((bits >> np.uint64(11)) % np.uint64(self.size)).astype(np.int64), signs
        return self._places[name, count]


def hashed(count: int, name: str, seed: int) -> np.ndarray:
    """`count` words of 64 random bits, a function of name, seed and place alone (SplitMix64, Steele et al., 2014)."""
    start = int(digest_of([name, seed])[:16], 16)
    with np.errstate(over="ignore"):
        word = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(start)
        word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))


def random_signs(shape: tuple[int, ...], name: str, seed: int) -> Float[Tensor, "..."]:
    """+1 and -1, a function of shape, name and seed."""
    bits = hashed(int(np.prod(shape)), name, seed) >> np.uint64(63)
    return torch.from_numpy(bits.astype(np.float32) * 2 - 1).reshape(shape)


class GradientSums:
    """What is kept of the gradients of some linear layers: sums over texts of their squares, or of themselves."""

    def __init__(self, *, squared: bool) -> None:
        self.squared = squared
        self.sums: dict[str, Tensor] = {}

    def add(
        self,
        name: str,
        grads: Float[Tensor, "texts seq out"],
        inputs: Float[Tensor, "texts seq in"],
        lengths: Sequence[int],
    ) -> None:
        """One batch of a layer's output gradients and inputs; a text's first `lengths[i]` tokens are its own."""
        width_out, width_in = grads.shape[-1], inputs.shape[-1]
        weight = self.sums.setdefault(f"{name}.weight", grads.new_zeros(width_out, width_in))
        bias = self.sums.setdefault(f"{name}.bias", grads.new_zeros(width_out))
        if not self.squared:
            for grad, x, length in zip(grads, inputs, lengths, strict=True):
                weight.addmm_(grad[:length].t(), x[:length])
                bias.add_(grad[:length].sum(0))
            return
        of_text = torch.empty_like(weight)  # stays in the cache from text to text
        for grad, x, length in zip(grads, inputs, lengths, strict=True):
            torch.mm(grad[:length].t(), x[:length], out=of_text)
            weight.addcmul_(of_text, of_text)
            bias.add_(grad[:length].sum(0).square_())
