"""Tensors in safetensors files, found by name and read by rectangle: who needs some rows or columns reads no others.

Files are read, not mapped: a rank's memory is then its share of the weights and one small buffer, and never pages of a
file many times larger. No torch until something is read.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metasepia.errors import CorruptArtefact

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
"""Beside a checkpoint of several files: `weight_map` says in which of them each tensor lies."""
BUFFER_BYTES = 8 << 20
"""Read at a time; small enough to stay in a processor's cache until it is copied on."""
MIN_SEGMENT_BYTES = 2048
"""Parts of rows at least as long are read one by one; shorter ones together with what lies between them."""
DTYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}
"""Types that are read: safetensors' name, torch's, and bytes of one number."""


@dataclass(frozen=True)
class StoredTensor:
    path: Path
    dtype: str
    """As the file spells it: F32, BF16..."""
    shape: tuple[int, ...]
    offset: int
    """Of its first byte, from the beginning of the file."""
    num_bytes: int


class StoredTensors(Mapping[str, StoredTensor]):
    """The tensors of several files under their names."""

    def __init__(self, files: Sequence[Path]) -> None:
        """Raises CorruptArtefact for a header that does not parse, a tensor beyond its file's end, a name twice."""
        self._tensors: dict[str, StoredTensor] = {}
        for path in files:
            for name, tensor in _entries(path):
                if name in self._tensors:
                    raise CorruptArtefact(path.name, f"{name} is in {self._tensors[name].path.name} too")
                self._tensors[name] = tensor

    @classmethod
    def of_directory(cls, directory: Path) -> "StoredTensors":
        """The checkpoint in `directory`. Raises CorruptArtefact also for what its index names and no file holds."""
        stored = cls(weight_files(directory))
        if (directory / INDEX).is_file():
            missing = sorted(_weight_map(directory).keys() - stored.keys())
            if missing:
                raise CorruptArtefact(str(directory), f"its index names {missing[0]}, and the file there lacks it")
        return stored

    def __getitem__(self, name: str) -> StoredTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def num_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self._tensors.values())

    def read(self, name: str, into: "torch.Tensor", rows: slice = slice(None), columns: slice = slice(None)) -> None:
        """Copies a rectangle of a stored matrix, or some rows of a vector, into `into`, in its dtype and on its device.

        Straight into its memory where that needs no conversion; else through one buffer of BUFFER_BYTES, or of one row
        where that is longer. A tensor of more than two
        dimensions counts as a matrix of its first. Raises CorruptArtefact for a dtype that is not read, or a torn file.
        """
        import torch

        stored = self[name]
        if stored.dtype not in DTYPES:
            raise CorruptArtefact(stored.path.name, f"{name} is stored as {stored.dtype}, of which we read nothing")
        width = math.prod(stored.shape[1:])
        first, last, _ = rows.indices(stored.shape[0] if stored.shape else 1)
        left, right, _ = columns.indices(width)
        if into.numel() != (last - first) * (right - left):
            wanted = [last - first, right - left]
            raise ValueError(f"{name}: a part of shape {wanted} does not fit into one of {list(into.shape)}")
        if into.numel() == 0:
            return
        dtype: torch.dtype = getattr(torch, DTYPES[stored.dtype][0])
        row_bytes, skipped, segment = (count * dtype.itemsize for count in (width, left, right - left))
        if segment < min(row_bytes, MIN_SEGMENT_BYTES):
            skipped, segment = 0, row_bytes  # whole rows, and the columns are cut out of the buffer
        else:
            left, right = 0, right - left
        exact = segment == (right - left) * dtype.itemsize
        direct = exact and into.dtype == dtype and into.device.type == "cpu" and into.is_contiguous()
        num_rows = last - first if direct else min(max(1, BUFFER_BYTES // segment), last - first)
        target = into.view(last - first, -1)
        own: Any = target.view(torch.uint8).numpy().data.cast("B") if direct else None
        view = own if direct else memoryview(bytearray(num_rows * segment))
        with stored.path.open("rb", buffering=0) as file:
            for begin in range(first, last, num_rows):
                count = min(num_rows, last - begin)
                offset = stored.offset + begin * row_bytes + skipped
                if segment == row_bytes:
                    _read_exactly(file.fileno(), view[: count * segment], offset, stored.path, name)
                else:
                    for i in range(count):
                        part = view[i * segment : (i + 1) * segment]
                        _read_exactly(file.fileno(), part, offset + i * row_bytes, stored.path, name)
                if not direct:
                    read = torch.frombuffer(view, dtype=dtype, count=count * segment // dtype.itemsize).view(count, -1)
                    target[begin - first : begin - first + count].copy_(read[:, left:right])

    def load(self, name: str, dtype: "torch.dtype") -> "torch.Tensor":
        """One whole tensor, in memory of its own."""
        import torch

        whole = torch.empty(self[name].shape, dtype=dtype)
        self.read(name, whole)
        return whole


def read_ahead(files: Sequence[Path]) -> bool:
    """Asks the kernel to bring files into its cache and returns at once; no memory of this process is taken.

    False, and nothing is asked, where they would take more than half of the machine's memory: it has better uses.
    """
    size = sum(path.stat().st_size for path in files)
    if 2 * size > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
        return False
    for path in files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
    return True


def weight_files(directory: Path) -> list[Path]:
    """The files of a checkpoint: those its index names, and all *.safetensors where it has no index.

    Raises CorruptArtefact for an index that cannot be read, or that names a file that is not there.
    """
    if not (directory / INDEX).is_file():
        return sorted(directory.glob("*.safetensors"))
    files = [directory / name for name in sorted(set(_weight_map(directory).values()))]
    for path in files:
        if path.parent != directory or not path.is_file():
            raise CorruptArtefact(str(directory), f"its index names {path.name}, which is not there")
    return files


def _weight_map(directory: Path) -> dict[str, str]:
    try:
        found = json.loads((directory / INDEX).read_text())["weight_map"]
        return {str(name): str(file) for name, file in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptArtefact(INDEX, f"it cannot be read ({type(error).__name__}: {error})") from error


def _entries(path: Path) -> Iterator[tuple[str, StoredTensor]]:
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        header_len = int.from_bytes(file.read(8), "little")
        if header_len > size - 8:
            raise CorruptArtefact(path.name, "its safetensors header is longer than the file")
        try:
            header = json.loads(file.read(header_len))
            entries = [(name, entry) for name, entry in header.items() if name != "__metadata__"]
            found = [
                (
                    name,
                    str(entry["dtype"]),
                    tuple(int(side) for side in entry["shape"]),
                    *map(int, entry["data_offsets"]),
                )
                for name, entry in entries
            ]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorruptArtefact(path.name, f"its safetensors header cannot be read ({error})") from error
    for name, dtype, shape, begin, end in found:
        item_bytes = DTYPES[dtype][1] if dtype in DTYPES else None
        if min(begin, end, *shape, 0) < 0 or (item_bytes and math.prod(shape) * item_bytes != end - begin):
            raise CorruptArtefact(path.name, f"{name} of shape {list(shape)} does not take bytes {begin} to {end}")
        if 8 + header_len + end > size:
            raise CorruptArtefact(path.name, f"it ends inside tensor {name}")
        yield name, StoredTensor(path, dtype, shape, 8 + header_len + begin, end - begin)


def _read_exactly(descriptor: int, into: memoryview, offset: int, path: Path, name: str) -> None:
    done = 0
    while done < len(into):
        count = os.preadv(descriptor, [into[done:]], offset + done)
        if not count:
            raise CorruptArtefact(path.name, f"it ends inside tensor {name}")
        done += count
