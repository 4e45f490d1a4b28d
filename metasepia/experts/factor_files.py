"""The file of a backbone's factors while it is made: one safetensors file, its tensors filled in one layer at a time.

Shapes are known before anything is factored, so the header is written first and the file has its final size; a layer
counts once it is on disk and its name is in the journal beside it. A process that is killed has lost one layer.
"""

import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from metasepia.errors import InvalidSettings
from metasepia.local_disk import sync_directory

if TYPE_CHECKING:
    from torch import Tensor


class FactorFile:
    """`path` once `finish` has been called; until then `path`.partial and its journal. One process at a time."""

    def __init__(self, path: Path, shapes: Mapping[str, tuple[int, int]], rank: int = 0) -> None:
        """Goes on with what an earlier process left of the same layers. `rank`: leading singular vectors to keep, 0
        keeps all. Raises InvalidSettings when the disk has no room."""
        self._path, self._shapes = path, dict(shapes)
        self._partial, self._journal = path.with_suffix(".partial"), path.with_suffix(".journal")
        header: dict[str, dict[str, object]] = {}
        self._offsets: dict[str, int] = {}
        self._sides: dict[str, list[int]] = {}
        end = 0
        for name, (rows, columns) in self._shapes.items():
            singular = min(rows, columns)
            kept = min(rank or singular, singular)
            for part, sides in (("u", [rows, kept]), ("s", [singular]), ("vh", [kept, columns])):
                begin, end = end, end + 4 * math.prod(sides)
                header[f"{name}/{part}"] = {"dtype": "F32", "shape": sides, "data_offsets": [begin, end]}
                self._offsets[f"{name}/{part}"], self._sides[f"{name}/{part}"] = begin, sides
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the numbers begin at a multiple of eight
        self._head = len(text).to_bytes(8, "little") + text
        self._size = len(self._head) + end
        if not self._goes_on():
            self._begin()
        names = self._journal.read_text().split("\n")[:-1]  # the last line is torn unless it is empty
        self._done = [name for name in names if name in self._shapes]

    @property
    def num_bytes(self) -> int:
        return self._size

    @property
    def num_done(self) -> int:
        return len(self._done)

    def missing(self) -> list[str]:
        """Layers that are to be put."""
        return [name for name in self._shapes if name not in self._done]

    def put(self, name: str, u: "Tensor", s: "Tensor", vh: "Tensor") -> None:
        """Writes a layer's factors (float32, on the CPU) down to the disk; of u and vh the vectors that are kept."""
        kept = self._sides[f"{name}/u"][1]
        with self._partial.open("r+b") as file:
            for part, tensor in (("u", u[:, :kept]), ("s", s), ("vh", vh[:kept])):
                key = f"{name}/{part}"
                assert list(tensor.shape) == self._sides[key], f"{key} of shape {list(tensor.shape)}"
                file.seek(len(self._head) + self._offsets[key])
                file.write(tensor.contiguous().numpy().data)
            file.flush()
            os.fsync(file.fileno())
        with self._journal.open("a") as journal:  # after the numbers: what it names is on disk
            journal.write(f"{name}\n")
            journal.flush()
            os.fsync(journal.fileno())
        self._done.append(name)

    def finish(self) -> None:
        """Gives the file its name."""
        assert not self.missing(), "layers are missing"
        self._partial.chmod(0o644)  # other users of this home may serve from it
        self._partial.replace(self._path)
        self._journal.unlink()
        sync_directory(self._path.parent)

    def _goes_on(self) -> bool:
        if not self._partial.is_file() or not self._journal.is_file():
            return False
        with self._partial.open("rb") as file:
            return os.fstat(file.fileno()).st_size == self._size and file.read(len(self._head)) == self._head

    def _begin(self) -> None:
        self._journal.unlink(missing_ok=True)
        self._partial.unlink(missing_ok=True)
        free = shutil.disk_usage(self._partial.parent).free
        if self._size > free:
            raise InvalidSettings(
                "home",
                str(self._partial.parent),
                f"on a disk with {self._size / 2**30:.1f} GiB free for the factors, not {free / 2**30:.1f}; "
                "`expert_rank` makes them smaller",
            )
        with self._partial.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, self._size)
            file.write(self._head)
            file.flush()
            os.fsync(file.fileno())
        self._journal.touch()
        sync_directory(self._partial.parent)
