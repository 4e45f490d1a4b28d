"""Task embeddings at rest: Parquet, a row an embedding, one space a file.

A file says its space in its metadata, and its vectors have one length. A store is a folder of such files, by space:

    <uri>/<digest of the space>/<number>-<stamp>.parquet

It only grows. Each file is whole and named by the sha256 of its bytes, so a writer that is killed leaves nothing half
made, and two writers at once leave two files. Places are local paths or what else `pyarrow.fs` knows.
"""

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from jaxtyping import Float

from metasepia.digests import canonical_json, short
from metasepia.embedding.space import KINDS, Space, TaskEmbedding
from metasepia.embedding.store_files import StreamedFiles
from metasepia.errors import CorruptArtefact, InvalidSettings, UnknownName
from metasepia.sweeps.files import stamp_of

FORMAT = 1
ROWS_AT_A_TIME = 4096
"""Of a row group, and in memory at once when a file is read."""
BYTES_OF_A_FILE = 64 << 20
"""About where a store's file ends and the next begins; so much is in memory while it grows."""
_FILE = re.compile(r"(\d{8})-([0-9a-f]{16})\.parquet")
_COLUMNS = ("name", "kind", "noise", "source", "digest")


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Some embeddings of one space, without an object for each."""

    space: Space
    vectors: Float[np.ndarray, "rows dims"]
    names: list[str]
    kinds: list[str]
    noise: list[float | None]
    sources: list[str]
    """JSON."""
    digests: list[str]

    def __len__(self) -> int:
        return len(self.names)

    @classmethod
    def of(cls, embeddings: Sequence[TaskEmbedding]) -> "Batch":
        """At least one. Raises DifferentSpaces."""
        for one in embeddings:
            embeddings[0].space.check_same(one.space)
        return cls(
            space=embeddings[0].space,
            vectors=np.stack([one.vector for one in embeddings]),
            names=[one.name for one in embeddings],
            kinds=[one.kind for one in embeddings],
            noise=[one.noise for one in embeddings],
            sources=[canonical_json(dict(one.source)).decode() for one in embeddings],
            digests=[one.digest for one in embeddings],
        )

    def embeddings(self) -> list[TaskEmbedding]:
        """Raises CorruptArtefact for a row that is not what its digest says."""
        return [self._embedding(place) for place in range(len(self))]

    def only(self, places: Sequence[int]) -> "Batch":
        return Batch(
            space=self.space,
            vectors=self.vectors[np.asarray(places, np.int64)],
            **{name: [values[place] for place in places] for name, values in self._lists().items()},
        )

    def to_arrow(self) -> pa.RecordBatch:
        vectors = pa.array(np.ascontiguousarray(self.vectors, np.float32).ravel())
        schema = _schema(self.space, self.vectors.shape[1])
        columns = {
            "name": self.names,
            "kind": self.kinds,
            "space": [self.space.digest] * len(self),
            "vector": pa.FixedSizeListArray.from_arrays(vectors, type=schema.field("vector").type),
            "noise": self.noise,
            "source": self.sources,
            "digest": self.digests,
        }
        return pa.RecordBatch.from_pydict(columns, schema=schema)

    def _lists(self) -> dict[str, list[Any]]:
        return {
            "names": self.names,
            "kinds": self.kinds,
            "noise": self.noise,
            "sources": self.sources,
            "digests": self.digests,
        }

    def _embedding(self, place: int) -> TaskEmbedding:
        name = self.names[place]
        try:
            one = TaskEmbedding(
                space=self.space,
                vector=self.vectors[place],
                kind=self.kinds[place],  # pyright: ignore[reportArgumentType]  # the class checks it
                name=name,
                source=json.loads(self.sources[place]),
                noise=self.noise[place],
            )
        except ValueError as error:
            raise CorruptArtefact(f"the embedding {name!r}", str(error)) from error
        if one.digest != self.digests[place]:
            told = f"its digest is {short(one.digest)}, and {short(self.digests[place])} is written beside it"
            raise CorruptArtefact(f"the embedding {name!r}", told)
        return one


# -- one file


def write(uri: str, embeddings: Iterable[TaskEmbedding]) -> int:
    """Writes embeddings of one space as one file, in the order given, and returns how many.

    They are taken as they come, ROWS_AT_A_TIME in memory. The bytes are a function of the embeddings and of pyarrow's
    version. Locally the file appears whole or not at all. Raises InvalidSettings for none at all, whose space nobody
    knows, DifferentSpaces for several, StorageFailed where the filesystem refuses.
    """
    files, name = _place(uri)
    parts = _runs(embeddings)
    first = next(parts, None)
    if first is None:
        raise InvalidSettings("embeddings", "none", "one or more, whose space the file then says")
    count = 0
    with files.create(name) as stream, _writer(stream, first) as writer:
        for part in itertools.chain([first], parts):
            first.space.check_same(part.space)
            writer.write_batch(part.to_arrow(), row_group_size=ROWS_AT_A_TIME)
            count += len(part)
    return count


def batches(uri: str, *, rows: int = ROWS_AT_A_TIME) -> Iterator[Batch]:
    """The embeddings of one file, at most `rows` at a time.

    Raises InvalidSettings for a file that is not there, CorruptArtefact for one that `write` never made.
    """
    files, name = _place(uri)
    if not files.exists(name):
        raise InvalidSettings("uri", uri, "a Parquet file of task embeddings; there is none")
    yield from _batches(files, name, rows)


def read(uri: str) -> list[TaskEmbedding]:
    """All of a file, each checked against its digest. Raises as `batches` and `Batch.embeddings` do."""
    return [one for batch in batches(uri) for one in batch.embeddings()]


# -- a folder that grows


class EmbeddingStore:
    """Embeddings of any number of spaces, kept apart. Any number of processes may read and add.

    Spaces are named by their digests. Two processes that add the same embedding at one moment both keep it.
    """

    def __init__(self, uri: str, filesystem: pafs.FileSystem | None = None) -> None:
        """Nothing needs to be there yet. Raises InvalidSettings for a URI that pyarrow does not know."""
        self._files = StreamedFiles.at(uri, filesystem)

    @property
    def uri(self) -> str:
        return self._files.uri

    def add(self, embeddings: Iterable[TaskEmbedding]) -> int:
        """Adds those that are not there yet, by their digests, and returns how many. Spaces may be mixed.

        They are taken as they come. What came before one that raises is kept.
        """
        return self._add(_runs(embeddings))

    def merge(self, other: "EmbeddingStore") -> int:
        """Adds what another store has and this one lacks, and returns how many."""
        return self._add(batch for space in other.spaces() for batch in other.batches(space.digest))

    def merge_file(self, uri: str) -> int:
        """Adds what a file has and this store lacks, and returns how many."""
        return self._add(batches(uri))

    def spaces(self) -> list[Space]:
        """Sorted by digest."""
        return [self._space(digest) for digest in self._digests_of_spaces()]

    def count(self, space: str) -> int:
        """Embeddings of a space; 0 for one that is not there."""
        total = 0
        for name in self._names(space):
            with self._files.open(name) as file:
                total += file.metadata.num_rows
        return total

    def batches(self, space: str, *, rows: int = ROWS_AT_A_TIME) -> Iterator[Batch]:
        """The embeddings of one space in the order they were added. Raises UnknownName for a space it has not."""
        self._check(space)
        for name in self._names(space):
            yield from _batches(self._files, name, rows)

    def read(self, space: str, *, kinds: Sequence[str] = KINDS) -> list[TaskEmbedding]:
        """All of a space and of some kinds, each checked against its digest."""
        found: list[TaskEmbedding] = []
        for batch in self.batches(space):
            found += batch.only([place for place, kind in enumerate(batch.kinds) if kind in kinds]).embeddings()
        return found

    def find(self, space: str, name: str) -> TaskEmbedding:
        """The embedding of this name that was added last. Raises UnknownName with some of those there are."""
        self._check(space)
        for file in reversed(self._names(space)):
            found = [
                batch.only([place])
                for batch in _batches(self._files, file, ROWS_AT_A_TIME)
                for place, one in enumerate(batch.names)
                if one == name
            ]
            if found:
                return found[-1].embeddings()[0]
        known = itertools.islice((one for batch in self.batches(space) for one in batch.names), 50)
        raise UnknownName("embedding", name, tuple(dict.fromkeys(known)))

    def vectors(self, space: str, path: Path) -> Float[np.ndarray, "rows dims"]:
        """The vectors of a space, mapped from a new .npy file at `path`, which is written a batch at a time."""
        array: np.ndarray | None = None
        row = 0
        for batch in self.batches(space):
            if array is None:
                shape = (self.count(space), batch.vectors.shape[1])
                array = np.lib.format.open_memmap(path, "w+", np.float32, shape)
            array[row : row + len(batch)] = batch.vectors
            row += len(batch)
        del array
        return np.load(path, mmap_mode="r")

    # -- files

    def _add(self, parts: Iterable[Batch]) -> int:
        held: dict[str, set[bytes]] = {}
        growing: dict[str, _Growing] = {}
        count = 0
        try:
            for part in parts:
                key = part.space.digest
                if key not in held:
                    held[key] = self._held(key)
                new = [place for place, one in enumerate(part.digests) if bytes.fromhex(one) not in held[key]]
                new = list({part.digests[place]: place for place in reversed(new)}.values())[::-1]  # each once
                if not new:
                    continue
                if key not in growing:
                    growing[key] = _Growing(part)
                growing[key].add(part.only(new))
                held[key] |= {bytes.fromhex(part.digests[place]) for place in new}
                count += len(new)
                if growing[key].num_bytes >= BYTES_OF_A_FILE:
                    self._keep(growing.pop(key))
        finally:
            for one in growing.values():
                self._keep(one)
        return count

    def _keep(self, grown: "_Growing") -> None:
        """Under the next number; the stamp tells apart what two writers number alike."""
        content = grown.finish()
        folder = grown.space.digest
        numbers = [int(name.rpartition("/")[2][:8]) for name in self._names(folder)]
        self._files.write(f"{folder}/{max(numbers, default=0) + 1:08d}-{stamp_of(content)}.parquet", content)

    def _held(self, space: str) -> set[bytes]:
        """The digests of a space, 32 bytes each."""
        found: set[bytes] = set()
        for name in self._names(space):
            with self._files.open(name) as file:
                for group in file.iter_batches(1 << 16, columns=["digest"]):
                    found |= {bytes.fromhex(one) for one in group.column(0).to_pylist()}
        return found

    def _digests_of_spaces(self) -> list[str]:
        return [folder for folder in self._files.folders() if self._names(folder)]

    def _names(self, space: str) -> list[str]:
        return [f"{space}/{name}" for name in sorted(self._files.names(space)) if _FILE.fullmatch(name)]

    def _space(self, digest: str) -> Space:
        with self._files.open(self._names(digest)[0]) as file:
            return _space_of(file, digest)

    def _check(self, space: str) -> None:
        if not self._names(space):
            raise UnknownName("space", space, tuple(self._digests_of_spaces()))


class _Growing:
    """One file of a store, in memory until it is whole."""

    def __init__(self, first: Batch) -> None:
        self.space = first.space
        self._sink = pa.BufferOutputStream()
        self._writer = _writer(self._sink, first)

    @property
    def num_bytes(self) -> int:
        return self._sink.tell()

    def add(self, part: Batch) -> None:
        self._writer.write_batch(part.to_arrow(), row_group_size=ROWS_AT_A_TIME)

    def finish(self) -> bytes:
        self._writer.close()
        return self._sink.getvalue().to_pybytes()


def _place(uri: str) -> tuple[StreamedFiles, str]:
    """The folder of a file, and the file's name in it. Raises InvalidSettings for a place that is none."""
    folder, slash, name = uri.rpartition("/")
    if not name:
        raise InvalidSettings("uri", uri, "the path or URI of a file")
    return StreamedFiles.at((folder or "/") if slash else "."), name


def _runs(embeddings: Iterable[TaskEmbedding]) -> Iterator[Batch]:
    """Consecutive ones of one space, at most ROWS_AT_A_TIME."""
    for _, group in itertools.groupby(embeddings, lambda one: one.space.digest):
        while part := list(itertools.islice(group, ROWS_AT_A_TIME)):
            yield Batch.of(part)


def _schema(space: Space, dims: int) -> pa.Schema:
    told = {"kind": "task embeddings", "format": FORMAT, "space": space.to_json()}
    fields = [
        pa.field("name", pa.string(), False),
        pa.field("kind", pa.string(), False),
        pa.field("space", pa.string(), False),
        pa.field("vector", pa.list_(pa.field("item", pa.float32(), False), dims), False),
        pa.field("noise", pa.float64()),
        pa.field("source", pa.string(), False),
        pa.field("digest", pa.string(), False),
    ]
    return pa.schema(fields, metadata={"metasepia": canonical_json(told).decode()})


def _writer(sink: Any, first: Batch) -> pq.ParquetWriter:
    return pq.ParquetWriter(
        sink,
        _schema(first.space, first.vectors.shape[1]),
        version="2.6",
        compression="zstd",
        compression_level=1,
        use_dictionary=["kind", "space"],  # pyright: ignore[reportArgumentType]  # a list of columns, says pyarrow
        write_statistics=["name"],  # pyright: ignore[reportArgumentType]
    )


def _space_of(file: pq.ParquetFile, name: str) -> Space:
    try:
        told = json.loads((file.schema_arrow.metadata or {})[b"metasepia"])
        if told["kind"] != "task embeddings" or told["format"] != FORMAT:
            raise ValueError(f"kind {told['kind']!r}, format {told['format']!r}")
        return Space.from_json(told["space"])
    except (KeyError, TypeError, ValueError) as error:
        problem = f"it holds no task embeddings of format {FORMAT} ({type(error).__name__}: {error})"
        raise CorruptArtefact(name, problem) from error


def _batches(files: StreamedFiles, name: str, rows: int) -> Iterator[Batch]:
    path = files.path_of(name)
    with files.open(name) as file:
        space = _space_of(file, path)
        try:
            for part in file.iter_batches(rows):
                yield _batch(part, space, path)
        except (pa.ArrowException, OSError, KeyError) as error:
            raise CorruptArtefact(path, f"it cannot be read ({type(error).__name__}: {error})") from error


def _batch(part: pa.RecordBatch, space: Space, path: str) -> Batch:
    names, kinds, noise, sources, digests = (part.column(name).to_pylist() for name in _COLUMNS)
    if any(one != space.digest for one in part.column("space").unique().to_pylist()):
        raise CorruptArtefact(path, f"a row is of another space than the file's, {short(space.digest)}")
    vector = part.column("vector")
    vectors = vector.flatten().to_numpy(zero_copy_only=False).reshape(len(part), vector.type.list_size)
    return Batch(space=space, vectors=vectors, names=names, kinds=kinds, noise=noise, sources=sources, digests=digests)
