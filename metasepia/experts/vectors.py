"""Expert vectors as files and values: multipliers of singular values (Transformer-squared, SVF, arXiv:2501.06252).

numpy only, so that the gateway, the registry and the mixing actor read and check experts without torch; the arithmetic
of serving them is in `metasepia.experts.svf`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32
from safetensors import SafetensorError
from safetensors.numpy import load, save

from metasepia.digests import canonical_json, digest_of, is_digest, short
from metasepia.errors import CorruptArtefact, InvalidRequest

FORMAT = "metasepia.expert.1"
MAX_EXPERT_BYTES = 64 << 20
"""A blob beyond this is refused unread. SmolLM2-135M's MLP experts take 0.2 MiB, those of a 70B model 8 MiB."""
MAX_HEADER_BYTES = 4 << 20
"""Of a safetensors file; a 70B model's adapter on every layer has 0.2 MiB."""


@dataclass(frozen=True, kw_only=True)
class FactorIndex:
    """What an expert must fit: the factored layers of one backbone by full parameter name, without the factors."""

    digest: str
    backbone: str
    lengths: Mapping[str, int]
    """Singular values of each layer: the smaller of its two sides."""

    @staticmethod
    def digest_for(backbone: str, names: tuple[str, ...]) -> str:
        """The factors' digest: backbone and layer names, known before anything is factored (DESIGN 5)."""
        return digest_of({"kind": "factors", "backbone": backbone, "layers": sorted(names)})

    @classmethod
    def read(cls, digest: str, home: Path) -> "FactorIndex":
        """The index that `svf.factors_of` left beside its factors. Raises CorruptArtefact when there is none."""
        path = index_path(digest, home)
        try:
            tree = json.loads(path.read_text())
            return cls(digest=tree["digest"], backbone=tree["backbone"], lengths=dict(tree["lengths"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CorruptArtefact(f"factors {short(digest)}", f"{path.name} cannot be read ({error})") from error

    def to_json(self) -> str:
        return json.dumps({"digest": self.digest, "backbone": self.backbone, "lengths": dict(self.lengths)}, indent=1)


def index_path(digest: str, home: Path) -> Path:
    return home / "factors" / f"{digest}.json"


def factors_path(digest: str, home: Path, rank: int = 0) -> Path:
    """The whole factors, or a file of the leading `rank` singular vectors."""
    return home / "factors" / (f"{digest}.r{rank}.safetensors" if rank else f"{digest}.safetensors")


def found_factors(digest: str, home: Path, rank: int = 0) -> Path | None:
    """The file with at least the leading `rank` singular vectors (0: all), the smallest where there are several.

    None where nobody has made one.
    """
    kept = {int(p.suffixes[-2][2:]): p for p in (home / "factors").glob(f"{digest}.r*.safetensors")} if rank else {}
    enough = [kept[one] for one in sorted(kept) if one >= rank]
    whole = factors_path(digest, home)
    return enough[0] if enough else whole if whole.is_file() else None


@dataclass(frozen=True, kw_only=True, eq=False)
class ExpertVectors:
    """One expert: W' = n U diag(s z) Vh for each named layer, n = sum(s) / sum(s z) if `renormalise`, else 1.

    A layer that is absent has z = 1. A vector shorter than its layer's singular values is *truncated*: it multiplies
    the leading ones, and the others have z = 1. The file form is safetensors: one fp32 vector a layer, and metadata.
    """

    backbone: str
    """Digest of the backbone whose singular values z multiplies."""
    factors: str
    """Digest of the factors: the order of the singular values is theirs."""
    z: Mapping[str, Float32[np.ndarray, " singular"]]
    renormalise: bool = False
    """The reference's rescaling to the original nuclear norm; only relative sizes within a layer then matter."""

    @classmethod
    def identity(cls, backbone: str, factors: str, renormalise: bool = False) -> "ExpertVectors":
        """The base model as an expert: z = 1 everywhere. Known to every backbone by its digest, and never stored."""
        return cls(backbone=backbone, factors=factors, z={}, renormalise=renormalise)

    @cached_property
    def digest(self) -> str:
        header = {"kind": "expert", "backbone": self.backbone, "factors": self.factors, "renormalise": self.renormalise}
        return digest_of(header, self.z)

    @property
    def num_bytes(self) -> int:
        return sum(vector.nbytes for vector in self.z.values())

    @property
    def rank(self) -> int:
        """The longest vector's length: no singular value after it is changed. 0 for the identity."""
        return max((len(vector) for vector in self.z.values()), default=0)

    def is_truncated(self, index: FactorIndex) -> bool:
        """Whether any vector is shorter than its layer's singular values."""
        return any(len(vector) < index.lengths[layer] for layer, vector in self.z.items())

    def truncated(self, rank: int, index: FactorIndex) -> "ExpertVectors":
        """This expert on the leading `rank` singular values of each layer; the others have z = 1.

        A renormalised expert is divided by the mean of what is cut off first, which changes nothing in it (only
        relative sizes within a layer count) and makes 1 the best constant for the rest. Raises InvalidRequest for a
        rank below 1, or where that mean is not positive.
        """
        if rank < 1:
            raise InvalidRequest("rank", f"an expert is cut to at least 1 singular value, got {rank}")
        z: dict[str, np.ndarray] = {}
        for layer, vector in self.z.items():
            kept, rest = vector[:rank], vector[rank : index.lengths[layer]]
            if self.renormalise and len(rest):
                untouched = index.lengths[layer] - len(vector)
                mean = (float(rest.sum(dtype=np.float64)) + untouched) / (len(rest) + untouched)
                if not mean > 0:
                    raise InvalidRequest("rank", f"{layer}: beyond singular value {rank} the mean of z is {mean:g}")
                kept = (kept / mean).astype(np.float32)
            z[layer] = np.ascontiguousarray(kept)
        return ExpertVectors(backbone=self.backbone, factors=self.factors, z=z, renormalise=self.renormalise)

    def to_bytes(self) -> bytes:
        header = {
            "format": FORMAT,
            "backbone": self.backbone,
            "factors": self.factors,
            "renormalise": self.renormalise,
        }
        # One entry only: safetensors writes several in an order that changes from run to run.
        metadata = {"expert": canonical_json(header).decode()}
        return save({name: np.ascontiguousarray(vector) for name, vector in self.z.items()}, metadata)

    @classmethod
    def from_bytes(cls, blob: bytes, name: str = "the expert", max_bytes: int = MAX_EXPERT_BYTES) -> "ExpertVectors":
        """Reads what `to_bytes` wrote. `name` is what the errors call it; fits no backbone yet (see `check_fits`).

        Raises CorruptArtefact: too large, not safetensors, not an expert, not fp32 vectors, NaN or infinity.
        """
        if len(blob) > max_bytes:
            raise CorruptArtefact(name, f"it has {len(blob)} bytes and at most {max_bytes} are read")
        header = metadata_of(blob, name).get("expert", {})
        tensors = tensors_of(blob, name)
        if header.get("format") != FORMAT:
            raise CorruptArtefact(name, f"its metadata says format {header.get('format')!r}, not {FORMAT!r}")
        for key in ("backbone", "factors"):
            if not is_digest(str(header.get(key))):
                raise CorruptArtefact(name, f"its metadata says {key} {header.get(key)!r}, not 64 hex digits")
        if not isinstance(header.get("renormalise"), bool):
            raise CorruptArtefact(
                name, f"its metadata says renormalise {header.get('renormalise')!r}, not true or false"
            )
        if not tensors:
            raise CorruptArtefact(name, "it holds no vectors")
        for layer, vector in tensors.items():
            if vector.dtype != np.float32 or vector.ndim != 1:
                raise CorruptArtefact(
                    name, f"{layer} is {vector.dtype} of shape {list(vector.shape)}; it must be a float32 vector"
                )
            if not np.isfinite(vector).all():
                raise CorruptArtefact(name, f"{layer} holds NaN or infinity")
        return cls(
            backbone=header["backbone"],
            factors=header["factors"],
            z=dict(tensors),
            renormalise=header["renormalise"],
        )

    def check_fits(self, index: FactorIndex, name: str | None = None) -> None:
        """Raises CorruptArtefact for another backbone or factors, an unknown layer, a vector longer than its layer."""
        name = name or f"expert {short(self.digest)}"
        if self.backbone != index.backbone:
            raise CorruptArtefact(
                name, f"it was made for backbone {short(self.backbone)} and this one is {short(index.backbone)}"
            )
        if self.factors != index.digest:
            raise CorruptArtefact(
                name, f"it was made for factors {short(self.factors)} and these are {short(index.digest)}"
            )
        for layer, vector in self.z.items():
            if layer not in index.lengths:
                known = sorted(index.lengths)
                raise CorruptArtefact(
                    name, f"{layer} is none of the {len(known)} factored layers ({known[0]} ... {known[-1]})"
                )
            if not 1 <= len(vector) <= index.lengths[layer]:
                raise CorruptArtefact(
                    name, f"{layer} has {len(vector)} multipliers and the layer {index.lengths[layer]} singular values"
                )


def metadata_of(blob: bytes, name: str) -> dict[str, dict[str, Any]]:
    """What a safetensors file's metadata says of the expert in it: under `expert` or `lora`, by its form.

    Raises CorruptArtefact for a file whose header does not parse.
    """
    header_len = int.from_bytes(blob[:8], "little")
    try:
        if len(blob) < 8 or header_len > len(blob) - 8:
            raise ValueError("its header is longer than the file")
        if header_len > MAX_HEADER_BYTES:
            raise ValueError(f"its header has {header_len} bytes and at most {MAX_HEADER_BYTES} are read")
        entries = json.loads(blob[8 : 8 + header_len]).get("__metadata__") or {}
        found = {key: json.loads(text) for key, text in entries.items() if key in ("expert", "lora")}
        if not all(isinstance(one, dict) for one in found.values()):
            raise TypeError("its metadata is no JSON object")
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise CorruptArtefact(name, f"it is not a safetensors file ({type(error).__name__}: {error})") from error
    return found


def tensors_of(blob: bytes, name: str) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file. Raises CorruptArtefact."""
    try:
        return load(blob)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CorruptArtefact(name, f"it is not a safetensors file ({type(error).__name__}: {error})") from error
