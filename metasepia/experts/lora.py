"""Low-rank adapters as files and values: W' = W + B A for each named layer (LoRA, arXiv:2106.09685).

They are served beside expert vectors, under the same names and routes. PEFT's alpha / r is multiplied into B when an
adapter is read (`peft_files`), so nothing here has a scale. numpy only, as `vectors`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Float32
from safetensors.numpy import save

from metasepia.digests import canonical_json, digest_of, is_digest, short
from metasepia.errors import CorruptArtefact
from metasepia.experts import vectors
from metasepia.experts.vectors import ExpertVectors, metadata_of, tensors_of
from metasepia.stored import StoredTensors

FORMAT = "metasepia.lora.1"
MAX_LORA_BYTES = 1 << 30
"""A blob beyond this is refused unread. Rank 16 on every layer of an 8B model takes 160 MiB."""

Shapes = Mapping[str, tuple[int, int]]
"""Linear layers by full parameter name (`model.layers.0.mlp.up_proj.weight`), each [out, in]."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LoraAdapter:
    """One adapter: W' = W + b a for each named layer; a layer that is absent stays as it is. Ranks differ freely.

    The file form is safetensors, `<layer>/a` and `<layer>/b` in fp32, and metadata.
    """

    backbone: str
    """Digest of the backbone whose weights the products are added to."""
    a: Mapping[str, Float32[np.ndarray, "rank in"]]
    b: Mapping[str, Float32[np.ndarray, "out rank"]]

    @cached_property
    def digest(self) -> str:
        return digest_of({"kind": "lora", "backbone": self.backbone}, self._tensors)

    @property
    def num_bytes(self) -> int:
        return sum(one.nbytes for part in (self.a, self.b) for one in part.values())

    @property
    def num_parameters(self) -> int:
        return self.num_bytes // 4

    @property
    def rank(self) -> int:
        """The largest of its layers' ranks."""
        return max(len(one) for one in self.a.values())

    def to_bytes(self) -> bytes:
        header = {"format": FORMAT, "backbone": self.backbone}
        tensors = {name: np.ascontiguousarray(one) for name, one in self._tensors.items()}
        return save(tensors, {"lora": canonical_json(header).decode()})

    @classmethod
    def from_bytes(cls, blob: bytes, name: str = "the adapter", max_bytes: int = MAX_LORA_BYTES) -> "LoraAdapter":
        """Reads what `to_bytes` wrote. `name` is what the errors call it; fits no backbone yet (see `check_fits`).

        Raises CorruptArtefact: too large, not safetensors, not an adapter, not fp32 pairs, NaN or infinity.
        """
        if len(blob) > max_bytes:
            raise CorruptArtefact(name, f"it has {len(blob)} bytes and at most {max_bytes} are read")
        header = metadata_of(blob, name).get("lora", {})
        if header.get("format") != FORMAT:
            raise CorruptArtefact(name, f"its metadata says format {header.get('format')!r}, not {FORMAT!r}")
        if not is_digest(str(header.get("backbone"))):
            raise CorruptArtefact(name, f"its metadata says backbone {header.get('backbone')!r}, not 64 hex digits")
        tensors = tensors_of(blob, name)
        layers = sorted({key.rpartition("/")[0] for key in tensors})
        for layer in layers:
            if not layer or not {f"{layer}/a", f"{layer}/b"} <= tensors.keys():
                raise CorruptArtefact(name, f"{layer or 'a tensor without a layer'} has not both of a and b")
        if len(tensors) != 2 * len(layers):
            raise CorruptArtefact(name, "it holds tensors that are neither a nor b of a layer")
        a = {layer: tensors[f"{layer}/a"] for layer in layers}
        b = {layer: tensors[f"{layer}/b"] for layer in layers}
        check_pairs(a, b, name)
        return cls(backbone=str(header["backbone"]), a=a, b=b)

    def check_fits(self, shapes: Shapes, name: str | None = None) -> None:
        """Raises CorruptArtefact for a layer that the backbone has not got, or has in another shape."""
        name = name or f"adapter {short(self.digest)}"
        for layer, a in self.a.items():
            wanted, found = shapes.get(layer), (len(self.b[layer]), a.shape[1])
            if wanted is None:
                known = sorted(shapes)
                raise CorruptArtefact(
                    name, f"{layer} is none of the backbone's {len(known)} linear layers ({known[0]} ... {known[-1]})"
                )
            if found != tuple(wanted):
                raise CorruptArtefact(name, f"{layer} is for a weight {list(found)} and the layer's is {list(wanted)}")

    @cached_property
    def _tensors(self) -> dict[str, np.ndarray]:
        return {f"{n}/a": one for n, one in self.a.items()} | {f"{n}/b": one for n, one in self.b.items()}


def check_pairs(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray], name: str) -> None:
    """Raises CorruptArtefact unless every layer is a finite fp32 pair of one rank, and there is one."""
    if not a:
        raise CorruptArtefact(name, "it holds no layers")
    for layer, down in a.items():
        up = b[layer]
        if down.dtype != np.float32 or up.dtype != np.float32:
            raise CorruptArtefact(name, f"{layer} is {down.dtype} and {up.dtype}; both must be float32")
        if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1] or not down.size or not up.size:
            shapes = f"{list(down.shape)}, {list(up.shape)}"
            raise CorruptArtefact(name, f"{layer} has shapes {shapes}; they must be [rank, in], [out, rank]")
        if not (np.isfinite(down).all() and np.isfinite(up).all()):
            raise CorruptArtefact(name, f"{layer} holds NaN or infinity")


def read_adapter(blob: bytes, name: str) -> ExpertVectors | LoraAdapter:
    """Whatever the registry keeps as an expert, by the format in its metadata. Raises CorruptArtefact."""
    metadata = metadata_of(blob, name)
    if "lora" in metadata:
        return LoraAdapter.from_bytes(blob, name)
    if "expert" in metadata:
        return ExpertVectors.from_bytes(blob, name)
    raise CorruptArtefact(
        name, f"its metadata names no format; {vectors.FORMAT} and {FORMAT} are read, and PEFT's two files together"
    )


def linear_shapes(directory: Path) -> dict[str, tuple[int, int]]:
    """The linear layers of a checkpoint's blocks, from the headers of its safetensors files; no weight is read.

    Left out, by their names, are embeddings and the output head, which no adapter acts on.
    Raises CorruptArtefact for a directory without such files, or with one whose header does not parse.
    """
    shapes: dict[str, tuple[int, int]] = {}
    for name, stored in StoredTensors.of_directory(directory).items():
        if len(stored.shape) != 2 or not name.endswith(".weight"):
            continue
        module = name.split(".")[-2] if "." in name else ""
        if "embed" not in module and module not in ("wte", "wpe", "lm_head"):
            shapes[name] = (stored.shape[0], stored.shape[1])
    if not shapes:
        raise CorruptArtefact(str(directory), "it holds no safetensors files with linear layers")
    return shapes


def facts_of(adapter: ExpertVectors | LoraAdapter) -> dict[str, object]:
    """What the card of any registered expert says of its content, whoever wrote the rest of the card."""
    lora = isinstance(adapter, LoraAdapter)
    layers = adapter.a if lora else adapter.z
    facts: dict[str, object] = {
        "kind": "expert",
        "form": "lora" if lora else "svf",
        "digest": adapter.digest,
        "backbone": adapter.backbone,
        "parameters": adapter.num_bytes // 4,
        "num_layers": len(layers),
        "rank": adapter.rank,
    }
    return facts if lora else facts | {"factors": adapter.factors, "renormalise": adapter.renormalise}
