"""Where task embeddings lie: spaces told by surrogate, method, settings and probe texts, and vectors that never mix.

Two embeddings are compared only where all four are the same; everything else raises DifferentSpaces.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import numpy as np
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.numpy import load, save

from metasepia.digests import canonical_json, digest_of, is_digest
from metasepia.embedding.answers import Answers
from metasepia.errors import CorruptArtefact, DifferentSpaces, InvalidRequest

MethodName = Literal["agreement", "prefix", "fisher"]
METHODS: tuple[str, ...] = get_args(MethodName)
TaskKind = Literal["data_set", "model", "prompt"]
KINDS: tuple[str, ...] = get_args(TaskKind)
FORMAT = 1
"""Of the stored header."""
UNIT = 1e-3
"""How far from 1 a vector's norm may be."""


@dataclass(frozen=True, kw_only=True)
class Space:
    """What an embedding depends on beside its task."""

    surrogate: str
    """The encoder's digest."""
    method: MethodName
    settings: Mapping[str, Any]
    """The method's, in values that JSON has; part of the digest."""
    probes: str
    """The probe texts' digest."""

    @cached_property
    def digest(self) -> str:
        return digest_of({"kind": "space", **self.to_json()})

    def __hash__(self) -> int:
        return hash(self.digest)

    def to_json(self) -> dict[str, Any]:
        return {
            "surrogate": self.surrogate,
            "method": self.method,
            "settings": dict(self.settings),
            "probes": self.probes,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Space":
        """Raises CorruptArtefact for what is no space."""
        try:
            space = cls(
                surrogate=value["surrogate"],
                method=value["method"],
                settings=dict(value["settings"]),
                probes=value["probes"],
            )
            if not (is_digest(space.surrogate) and is_digest(space.probes) and space.method in METHODS):
                raise ValueError("a digest or the method")
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptArtefact("space", f"it cannot be read ({type(error).__name__}: {error})") from error
        return space

    def check_same(self, other: "Space") -> None:
        """Raises DifferentSpaces with the parts that differ."""
        if self is other or self == other:
            return
        parts = ("surrogate", "method", "settings", "probes")
        different = tuple(part for part in parts if getattr(self, part) != getattr(other, part))
        raise DifferentSpaces(self.digest, other.digest, different)


@dataclass(frozen=True, kw_only=True, eq=False)
class TaskEmbedding:
    """A task's vector, what it is of, and what it was made from."""

    space: Space
    vector: Float[np.ndarray, " dims"]
    """float32, unit norm."""
    kind: TaskKind
    name: str
    source: Mapping[str, Any]
    """What it was made from, in values that JSON has: digest of the answers, number of texts, labels, black box..."""
    noise: float | None = None
    """Expected 1 - cosine between two redraws of sampled answers; None where the answers are exact."""

    def __post_init__(self) -> None:
        if self.vector.ndim != 1 or self.vector.dtype != np.float32 or not np.isfinite(self.vector).all():
            raise InvalidRequest("vector", f"must be finite float32 in one dimension, got {self.vector.dtype}")
        norm = float(np.linalg.norm(self.vector.astype(np.float64)))
        if not abs(norm - 1) <= UNIT:
            raise InvalidRequest("vector", f"must be of unit norm, got {norm:g}")
        if self.kind not in KINDS:
            raise InvalidRequest("kind", f"{self.kind!r} is none of {', '.join(KINDS)}")
        if self.noise is not None and not (np.isfinite(self.noise) and self.noise >= 0):
            raise InvalidRequest("noise", f"must be finite and not negative, got {self.noise}")

    @property
    def dims(self) -> int:
        return len(self.vector)

    @cached_property
    def digest(self) -> str:
        """Of all that is stored: vector, space, kind, name, source, noise."""
        return digest_of(self._header(), {"vector": self.vector})

    def _header(self) -> dict[str, Any]:
        return {
            "kind": "embedding",
            "format": FORMAT,
            "space": self.space.to_json(),
            "task": self.kind,
            "name": self.name,
            "source": dict(self.source),
            "noise": self.noise,
        }

    def to_bytes(self) -> bytes:
        """A safetensors file with `vector`; its metadata hold the rest as JSON."""
        header = canonical_json(self._header()).decode()
        return save({"vector": np.ascontiguousarray(self.vector)}, metadata={"metasepia": header})

    @classmethod
    def from_bytes(cls, data: bytes) -> "TaskEmbedding":
        """Raises CorruptArtefact for bytes that `to_bytes` never wrote."""
        try:
            length = int.from_bytes(data[:8], "little")
            header = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["metasepia"])
            vector = load(data)["vector"]
            if header["kind"] != "embedding" or header["format"] != FORMAT:
                raise ValueError(f"kind {header['kind']!r}, format {header['format']!r}")
            return cls(
                space=Space.from_json(header["space"]),
                vector=vector,
                kind=header["task"],
                name=header["name"],
                source=header["source"],
                noise=header["noise"],
            )
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorruptArtefact("task embedding", f"it cannot be read ({type(error).__name__}: {error})") from error

    def renamed(self, name: str) -> "TaskEmbedding":
        return dataclasses.replace(self, name=name)


def cosine(a: TaskEmbedding, b: TaskEmbedding) -> float:
    """In [-1, 1]. Raises DifferentSpaces."""
    a.space.check_same(b.space)
    return float(np.clip(a.vector.astype(np.float64) @ b.vector.astype(np.float64), -1, 1))


def cosines(query: TaskEmbedding, many: Sequence[TaskEmbedding]) -> Float[np.ndarray, " many"]:
    """The cosine to each, float32. Raises DifferentSpaces, before anything is computed."""
    for one in many:
        query.space.check_same(one.space)
    if not many:
        return np.zeros(0, np.float32)
    return np.clip(np.stack([one.vector for one in many]) @ query.vector, -1, 1)


@runtime_checkable
class EmbeddingMethod(Protocol):
    """What turns answers into vectors of one space. Methods are in `metasepia.embedding.methods`."""

    @property
    def space(self) -> Space: ...
    @property
    def dims(self) -> int: ...
    def embed(
        self, tasks: Sequence[Answers], *, seed: int = 0, told: Callable[[int, int], None] | None = None
    ) -> Float[np.ndarray, "tasks dims"]:
        """Unit-norm float32 vectors of any mixture of texts and label sets, several tasks at once.

        A task's vector does not depend on the others, beyond rounding. `told(done, total)` hears of progress. Raises
        InvalidRequest for a task that tells no texts apart, WindowExceeded for a text beyond the encoder's window.
        """
        ...
