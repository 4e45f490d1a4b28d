"""A few rows of a checkpoint's output layer: what makes logits of some tokens out of a last hidden state. No torch."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from metasepia.errors import CorruptArtefact
from metasepia.models.prepared import PreparedBackbone
from metasepia.stored import StoredTensor, StoredTensors

_OWN = ("lm_head.weight", "embed_out.weight")
_TIED = ("model.embed_tokens.weight", "transformer.wte.weight", "transformer.word_embeddings.weight")
_DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}


@dataclass(frozen=True, eq=False)
class OutputRows:
    """The output layer's rows of some tokens. Whether they are all there is to a logit the caller must try out: biases,
    scales and soft caps are not looked for.
    """

    weight: Float[np.ndarray, "tokens hidden"]

    @classmethod
    def of(cls, prepared: PreparedBackbone, token_ids: Sequence[int]) -> "OutputRows | None":
        """None where the checkpoint's output layer is not found, or is stored in a type that is not read."""
        try:
            stored = StoredTensors.of_directory(Path(prepared.path))
            config = json.loads((Path(prepared.path) / "config.json").read_text())
        except (OSError, ValueError, CorruptArtefact):
            return None
        names = _OWN if config.get("tie_word_embeddings") is False else (*_OWN, *_TIED)
        found = next((stored[name] for name in names if name in stored), None)
        if found is None or found.dtype not in _DTYPES or len(found.shape) != 2 or max(token_ids) >= found.shape[0]:
            return None
        return cls(np.stack([_row(found, token) for token in token_ids]))

    def logits(self, state: Float[np.ndarray, " hidden"]) -> Float[np.ndarray, " tokens"]:
        return self.weight.astype(np.float64) @ state.astype(np.float64)


def _row(stored: StoredTensor, row: int) -> Float[np.ndarray, " hidden"]:
    dtype, width = np.dtype(_DTYPES[stored.dtype]), stored.shape[1]
    with stored.path.open("rb") as file:
        file.seek(stored.offset + row * width * dtype.itemsize)
        values = np.frombuffer(file.read(width * dtype.itemsize), dtype)
    if stored.dtype == "BF16":  # the upper half of a float32
        values = (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)
