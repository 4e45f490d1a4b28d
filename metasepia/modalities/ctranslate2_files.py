"""Weights out of a CTranslate2 model.bin (version 6 of its format): names, shapes, numbers. Nothing of it is run.

The layout is that of `ModelSpec._serialize` of CTranslate2: little-endian; version, name and revision of the spec, then
each variable as (name, rank, sizes, dtype, bytes, data), then aliases.
"""

import struct
from pathlib import Path

import numpy as np

from metasepia.errors import CorruptArtefact, NotSupported

VERSION = 6
_DTYPES: tuple[str | None, ...] = ("<f4", "i1", "<i2", "<i4", "<f2", None)
"""In the order of CTranslate2's enum; numpy has no bfloat16."""


class _Reader:
    def __init__(self, path: Path) -> None:
        self.data, self.at, self._name = path.read_bytes(), 0, path.name

    def take(self, num_bytes: int) -> bytes:
        if self.at + num_bytes > len(self.data):
            raise CorruptArtefact(self._name, "not a whole CTranslate2 model: it ends early")
        self.at += num_bytes
        return self.data[self.at - num_bytes : self.at]

    def number(self, kind: str) -> int:
        return struct.unpack("<" + kind, self.take(struct.calcsize("<" + kind)))[0]

    def string(self) -> str:
        spelt = self.take(self.number("H"))  # with the closing zero
        try:
            return spelt[:-1].decode()
        except UnicodeDecodeError as error:
            raise CorruptArtefact(self._name, f"not a CTranslate2 model ({error})") from None


def read(path: Path, spec: str, prefix: str = "") -> dict[str, np.ndarray]:
    """The variables whose names begin with `prefix`, as stored.

    Raises CorruptArtefact for what is not such a file or ends early, NotSupported for another version, spec or dtype.
    """
    reader = _Reader(path)
    version = reader.number("I")
    if version != VERSION:
        raise NotSupported(f"{path.name} as version {version} of CTranslate2's format", f"convert to {VERSION}")
    name, _, count = reader.string(), reader.number("I"), reader.number("I")
    if name != spec:
        raise NotSupported(f"a CTranslate2 model of the spec {name}", f"use one of the spec {spec}")
    found: dict[str, np.ndarray] = {}
    for _ in range(count):
        key = reader.string()
        shape = [reader.number("I") for _ in range(reader.number("B"))]
        code = reader.number("B")
        data = reader.take(reader.number("I"))
        if not key.startswith(prefix):
            continue
        dtype = _DTYPES[code] if code < len(_DTYPES) else None
        if dtype is None:
            raise NotSupported(f"{key} in bfloat16", "convert the model to float16 or float32")
        try:
            found[key] = np.frombuffer(data, dtype).reshape(shape)
        except ValueError as error:
            raise CorruptArtefact(path.name, f"{key}: {error}") from None
    return found
