"""Content digests: sha256 over canonical JSON, then the tensors sorted by name (name, dtype, shape, bytes).

Equal digests mean equal content; a name is only ever a pointer to one. No torch here: the gateway and the registry
use it.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from metasepia.errors import CorruptArtefact


def canonical_json(value: object) -> bytes:
    """One spelling for each value: sorted keys, no spaces, UTF-8, no NaN or infinity (ValueError)."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def digest_of(header: object, tensors: Mapping[str, np.ndarray] | None = None) -> str:
    """The digest of a header (anything canonical JSON can spell) and named arrays: 64 hex digits."""
    sha = hashlib.sha256(canonical_json(header))
    for name in sorted(tensors or {}):
        array = np.ascontiguousarray((tensors or {})[name])
        sha.update(canonical_json([name, array.dtype.str, list(array.shape)]))
        sha.update(array.data if array.size else b"")
    return sha.hexdigest()


def digest_of_safetensors(header: object, files: list[Path]) -> str:
    """The digest of a header and of every tensor stored in `files`, read as bytes: any dtype, no framework.

    Raises CorruptArtefact for a file whose safetensors header does not parse or overruns the file.
    """
    entries: dict[str, tuple[Path, str, list[int], int, int]] = {}
    for path in files:
        with path.open("rb") as file:
            header_len = int.from_bytes(file.read(8), "little")
            if header_len > path.stat().st_size - 8:
                raise CorruptArtefact(path.name, "its safetensors header is longer than the file")
            try:
                index = json.loads(file.read(header_len))
            except ValueError as error:
                raise CorruptArtefact(path.name, "its safetensors header is not JSON") from error
        for name, entry in index.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                entries[name] = (path, entry["dtype"], entry["shape"], 8 + header_len + begin, end - begin)
    sha = hashlib.sha256(canonical_json(header))
    for name in sorted(entries):
        path, dtype, shape, offset, num_bytes = entries[name]
        sha.update(canonical_json([name, dtype, shape]))
        with path.open("rb") as file:
            file.seek(offset)
            while num_bytes > 0:
                chunk = file.read(min(num_bytes, 1 << 22))
                if not chunk:
                    raise CorruptArtefact(path.name, f"it ends inside tensor {name}")
                sha.update(chunk)
                num_bytes -= len(chunk)
    return sha.hexdigest()


def digest_of_file(path: Path) -> str:
    """sha256 of a file's bytes (a GGUF, a blob)."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_digest(text: str) -> bool:
    return len(text) == 64 and all(c in "0123456789abcdef" for c in text)


def short(digest: str) -> str:
    """The first twelve digits, for people to read; never a key."""
    return digest[:12]
