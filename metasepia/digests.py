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
from metasepia.stored import StoredTensors


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

    It does not depend on how the tensors are spread over files, and little of them is in memory at a time. Raises
    CorruptArtefact for a file whose safetensors header does not parse or overruns the file.
    """
    tensors = StoredTensors(files)
    sha = hashlib.sha256(canonical_json(header))
    for name in sorted(tensors):
        stored = tensors[name]
        sha.update(canonical_json([name, stored.dtype, list(stored.shape)]))
        left = stored.num_bytes
        with stored.path.open("rb") as file:
            file.seek(stored.offset)
            while left > 0:
                chunk = file.read(min(left, 1 << 22))
                if not chunk:
                    raise CorruptArtefact(stored.path.name, f"it ends inside tensor {name}")
                sha.update(chunk)
                left -= len(chunk)
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
