"""Nearest tasks by cosine: exact, in bounded memory, to a million vectors and beyond what fits; an index for more.

`NearestTasks` reads vectors in parts, out of memory or out of files that are mapped, and its answers are those of one
product with the whole matrix. A folder holds vectors.bin (float32, or float16 at half the size), tasks.parquet (name,
kind, digest) and, written last, index.json. `IndexedTasks` asks faiss (Douze et al., arXiv:2401.08281; the extra
`search`) for candidates and computes their cosines exactly.
"""

import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float, Int

from metasepia.embedding.space import Space, TaskEmbedding
from metasepia.embedding.store import Batch
from metasepia.errors import CorruptArtefact, InvalidRequest, InvalidSettings, MetasepiaError, NotSupported

PART_BYTES = 32 << 20
"""Of vectors in float32 at a time."""
CANDIDATES = 20
"""For each neighbour asked of an index, so many are compared exactly."""
Storage = Literal["float32", "float16"]
_FORMAT = 1
_COLUMNS = ("name", "kind", "digest")


@dataclass(frozen=True)
class Neighbour:
    place: int
    """Among the vectors, in the order given."""
    name: str
    kind: str
    digest: str
    cosine: float


class NearestTasks:
    """Vectors of one space, and what tasks they are of."""

    def __init__(self, space: Space, vectors: Float[np.ndarray, "tasks dims"], tasks: pa.Table) -> None:
        """`vectors` of unit norm, perhaps mapped from a file; `tasks` has a row for each: name, kind, digest."""
        if tasks.num_rows != len(vectors) or tasks.column_names != list(_COLUMNS):
            raise InvalidRequest("tasks", f"{len(vectors)} rows of {', '.join(_COLUMNS)} are needed")
        self.space, self._vectors, self._tasks = space, vectors, tasks

    @classmethod
    def of(cls, embeddings: Sequence[TaskEmbedding]) -> "NearestTasks":
        """At least one. Raises DifferentSpaces."""
        if not embeddings:
            raise InvalidRequest("embeddings", "there are none")
        for one in embeddings:
            embeddings[0].space.check_same(one.space)
        columns = zip(*((one.name, one.kind, one.digest) for one in embeddings), strict=True)
        return cls(embeddings[0].space, np.stack([one.vector for one in embeddings]), _table(*columns))

    @classmethod
    def open(cls, folder: Path) -> "NearestTasks":
        """What `write` wrote; vectors are mapped and not read. Raises CorruptArtefact."""
        try:
            head = json.loads((folder / "index.json").read_text())
            if head["format"] != _FORMAT or head["dtype"] not in ("float32", "float16"):
                raise ValueError(f"format {head['format']!r}, dtype {head['dtype']!r}")
            shape, dtype = (int(head["tasks"]), int(head["dims"])), np.dtype(head["dtype"])
            size = (folder / "vectors.bin").stat().st_size
            if size != shape[0] * shape[1] * dtype.itemsize:
                raise ValueError(f"vectors.bin has {size} bytes, not those of {shape[0]} x {shape[1]} {dtype}")
            vectors = np.memmap(folder / "vectors.bin", dtype, "r", shape=shape)
            tasks = pq.read_table(folder / "tasks.parquet", memory_map=True)
            return cls(Space.from_json(head["space"]), vectors, tasks)
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
            if isinstance(error, MetasepiaError) and not isinstance(error, InvalidRequest):
                raise
            raise CorruptArtefact(str(folder), f"it holds no index of tasks ({error})") from error

    @staticmethod
    def write(
        folder: Path, parts: Iterable[Batch | Sequence[TaskEmbedding]], *, storage: Storage = "float32"
    ) -> "NearestTasks":
        """Writes embeddings as they come, one part in memory at a time, and opens the folder.

        `EmbeddingStore.batches` gives such parts. float16 changes a cosine by less than 0.001. Raises DifferentSpaces,
        InvalidRequest for none at all, and InvalidSettings for a folder that holds something else.
        """
        if storage not in ("float32", "float16"):
            raise InvalidSettings("storage", storage, "float32 or float16")
        if folder.exists() and any(folder.iterdir()) and not (folder / "tasks.parquet").exists():
            raise InvalidSettings("folder", str(folder), "new, empty, or an earlier index of tasks")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "index.json").unlink(missing_ok=True)  # first: what is half written is no index
        space: Space | None = None
        count = dims = 0
        schema = pa.schema([(name, pa.string()) for name in _COLUMNS])
        with (
            (folder / "vectors.bin").open("wb") as file,
            pq.ParquetWriter(folder / "tasks.parquet", schema) as rows,
        ):
            for part in parts:
                if not len(part):
                    continue
                batch = part if isinstance(part, Batch) else Batch.of(part)
                space = space or batch.space
                space.check_same(batch.space)
                file.write(np.ascontiguousarray(batch.vectors, storage).data)
                rows.write_table(_table(batch.names, batch.kinds, batch.digests))
                count, dims = count + len(batch), batch.vectors.shape[1]
        if space is None:
            shutil.rmtree(folder)
            raise InvalidRequest("embeddings", "there are none")
        head = {"format": _FORMAT, "space": space.to_json(), "tasks": count, "dims": dims, "dtype": storage}
        scratch = folder / "index.json.tmp"
        scratch.write_text(json.dumps(head, indent=2, sort_keys=True) + "\n")
        scratch.replace(folder / "index.json")
        return NearestTasks.open(folder)

    def __len__(self) -> int:
        return len(self._vectors)

    @property
    def dims(self) -> int:
        return self._vectors.shape[1]

    def search(
        self, query: TaskEmbedding | Float[np.ndarray, " dims"], k: int = 10, *, leave_out: Sequence[str] = ()
    ) -> list[Neighbour]:
        """The `k` nearest, or all there are, nearest first and equal ones by place, without digests in `leave_out`.

        Raises DifferentSpaces for an embedding of another space.
        """
        if k < 1:
            raise InvalidRequest("k", f"must be 1 or more, got {k}")
        left_out = set(leave_out)
        places, cosines = self.search_many(self._query(query)[None], k + len(left_out))
        found = [
            self._neighbour(place, cosine)
            for place, cosine in zip(places[0].tolist(), cosines[0].tolist(), strict=True)
        ]
        return [one for one in found if one.digest not in left_out][:k]

    def search_many(
        self, vectors: Float[np.ndarray, "queries dims"], k: int = 10
    ) -> tuple[Int[np.ndarray, "queries k"], Float[np.ndarray, "queries k"]]:
        """Places and cosines of each query's `k` nearest (all, where there are fewer), in one pass over the vectors."""
        if k < 1:
            raise InvalidRequest("k", f"must be 1 or more, got {k}")
        if vectors.ndim != 2 or vectors.shape[1] != self.dims or not np.isfinite(vectors).all():
            raise InvalidRequest("vectors", f"must be finite, of {self.dims} numbers, got {list(vectors.shape)}")
        queries, k = vectors.astype(np.float32).T, min(k, len(self))
        best = np.full((len(vectors), 0), 0.0, np.float32)
        places = np.full((len(vectors), 0), 0, np.int64)
        rows = max(1, PART_BYTES // (4 * max(self.dims, 3 * len(vectors))))  # their cosines and places are as large
        for begin in range(0, len(self), rows):
            part = np.asarray(self._vectors[begin : begin + rows], np.float32)
            cosines = np.concatenate([best, (part @ queries).T], axis=1)
            numbers = np.concatenate(
                [places, np.broadcast_to(np.arange(begin, begin + len(part)), (len(vectors), len(part)))], 1
            )
            kept = _largest(cosines, k)
            best, places = np.take_along_axis(cosines, kept, 1), np.take_along_axis(numbers, kept, 1)
        return places, np.clip(best, -1, 1)

    def vector(self, place: int) -> Float[np.ndarray, " dims"]:
        return np.asarray(self._vectors[place], np.float32)

    def _query(self, query: TaskEmbedding | np.ndarray) -> np.ndarray:
        if not isinstance(query, TaskEmbedding):
            return query
        self.space.check_same(query.space)
        return query.vector

    def _neighbour(self, place: int, cosine: float) -> Neighbour:
        row = [str(self._tasks.column(name)[place].as_py()) for name in _COLUMNS]
        return Neighbour(place, row[0], row[1], row[2], cosine)


class IndexedTasks:
    """Approximate search among millions: candidates by an inverted index of faiss, their cosines exact."""

    def __init__(self, tasks: NearestTasks, index: Any) -> None:
        self.tasks, self._index = tasks, index

    @classmethod
    def build(cls, tasks: NearestTasks, path: Path, *, seed: int = 0, code_bytes: int = 64) -> "IndexedTasks":
        """Trains an index on a part of the vectors, drawn by `seed`, fills it with all and writes it to `path`.

        Memory: `code_bytes` and a few more for each task. Raises NotSupported without faiss, InvalidRequest for fewer
        than 1000 tasks, for which nobody needs an index.
        """
        faiss = _faiss()
        if len(tasks) < 1000:
            raise InvalidRequest("tasks", f"{len(tasks)} tasks need no index; use NearestTasks.search")
        lists = int(np.clip(4 * len(tasks) ** 0.5, 4, min(65_536, len(tasks) // 40)))
        code = min(code_bytes, tasks.dims)
        while tasks.dims % code:
            code -= 1
        bits = 8 if len(tasks) >= 10_000 else 4
        index = faiss.index_factory(tasks.dims, f"IVF{lists},PQ{code}x{bits}", faiss.METRIC_INNER_PRODUCT)
        index.cp.seed = index.pq.cp.seed = seed
        chosen = np.sort(np.random.default_rng(seed).permutation(len(tasks))[: 40 * lists])
        index.train(np.asarray(tasks._vectors[chosen], np.float32))
        rows = max(1, PART_BYTES // (4 * tasks.dims))
        for begin in range(0, len(tasks), rows):
            index.add(np.ascontiguousarray(tasks._vectors[begin : begin + rows], np.float32))
        faiss.write_index(index, str(path))
        return cls.open(tasks, path)

    @classmethod
    def open(cls, tasks: NearestTasks, path: Path, *, probes: int = 64) -> "IndexedTasks":
        """`probes` of the index's lists are looked through for a query. Raises CorruptArtefact."""
        faiss = _faiss()
        try:
            index = faiss.read_index(str(path))
        except RuntimeError as error:
            raise CorruptArtefact(str(path), f"faiss cannot read it ({error})") from error
        if index.ntotal != len(tasks) or index.d != tasks.dims:
            made = f"it is of {index.ntotal} vectors of {index.d} numbers"
            raise CorruptArtefact(str(path), f"{made}, the tasks are {len(tasks)} of {tasks.dims}; build it again")
        index.nprobe = min(probes, index.nlist)
        return cls(tasks, index)

    def search(self, query: TaskEmbedding | Float[np.ndarray, " dims"], k: int = 10) -> list[Neighbour]:
        """About the `k` nearest: a neighbour may be missed, but none has a wrong cosine. Raises DifferentSpaces."""
        vector = np.ascontiguousarray(self.tasks._query(query), np.float32)
        _, found = self._index.search(vector[None], k * CANDIDATES)
        places = np.sort(found[0][found[0] >= 0])
        cosines = np.array([self.tasks.vector(int(place)) @ vector for place in places], np.float32)
        order = _largest(cosines[None], min(k, len(places)))[0]
        return [self.tasks._neighbour(int(places[i]), float(cosines[i])) for i in order]


def _largest(values: Float[np.ndarray, "rows n"], k: int) -> Int[np.ndarray, "rows k"]:
    """Places of each row's `k` largest, in order; the first of equal ones."""
    k = min(k, values.shape[1])
    if not k:
        return np.zeros((len(values), 0), np.int64)
    edge = -np.partition(-values, k - 1, axis=1)[:, k - 1]
    chosen = np.empty((len(values), k), np.int64)
    for row, (given, least) in enumerate(zip(values, edge, strict=True)):
        places = np.flatnonzero(given >= least)
        chosen[row] = places[np.lexsort((places, -given[places]))[:k]]
    return chosen


def _table(*columns: Sequence[str]) -> pa.Table:
    return pa.table({name: pa.array(column, pa.string()) for name, column in zip(_COLUMNS, columns, strict=True)})


def _faiss() -> Any:
    try:
        import faiss
    except ImportError:
        raise NotSupported(
            "an approximate index without the package faiss", "pip install 'metasepia[search]', or search exactly"
        ) from None
    return faiss
