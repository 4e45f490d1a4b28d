"""What the encoders of pictures and sounds share. No torch, no decoder: the gateway may import this.

They speak as `metasepia.encoders.TextEncoder` does, so one worker serves all: `tokenize` looks at the headers alone and
is cheap, `plan` says who shares a forward, `forward` decodes and embeds. Cost is counted in tokens, each about what a
token of text costs.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Generic, Literal, TypeVar

import numpy as np
from jaxtyping import Float

Modality = Literal["text", "image", "audio"]

T = TypeVar("T")


@dataclass(frozen=True)
class Prepared(Generic[T]):
    """An item whose header was read; as long as it costs."""

    name: str
    """How a complaint names it: `items[i]`."""
    content: T = field(repr=False)
    num_tokens: int

    def __len__(self) -> int:
        return self.num_tokens


class MediaEncoder(ABC, Generic[T]):
    """Pictures or sounds to unit-norm vectors; an item's vector never depends on its neighbours, beyond rounding."""

    modality: Modality
    digest: str
    """Of the recipe and the weights, if any."""
    width: int
    window: int
    """Tokens of the largest item that it takes."""
    device: str = "cpu"
    dtype = "float32"
    max_batch_tokens: int
    probe: bytes
    """A valid item, for health checks."""

    @abstractmethod
    def tokenize(self, items: Sequence[T]) -> list[Prepared[T]]:
        """Reads headers. Raises InvalidRequest naming `items[i]` for what is no such file, empty or too large."""

    @abstractmethod
    def forward(self, prepared: Sequence[Prepared[T]]) -> Float[np.ndarray, "items width"]:
        """The vectors of one batch of `plan`. Raises InvalidRequest naming the item whose body is broken."""

    def plan(self, lengths: Sequence[int]) -> list[list[int]]:
        """Which items share a forward, by index: those of one length, since padding would change a vector."""
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        batches: list[list[int]] = []
        for length, same in groupby(order, key=lengths.__getitem__):
            group, size = list(same), max(1, self.max_batch_tokens // length)
            batches += [group[at : at + size] for at in range(0, len(group), size)]
        return batches

    def embed(self, items: Sequence[T]) -> Float[np.ndarray, "items width"]:
        """Unit-norm vectors in the order of the items; raises as `tokenize` and `forward` do."""
        prepared = self.tokenize(items)
        vectors = np.empty((len(items), self.width), np.float32)
        for group in self.plan([len(one) for one in prepared]):
            vectors[group] = self.forward([prepared[i] for i in group])
        return vectors


def unit_norm(vectors: Float[np.ndarray, "items width"]) -> Float[np.ndarray, "items width"]:
    """Rows divided by their length; a row of zeros stays."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
