"""Rows of Parquet files at a path or `pyarrow.fs` URI, in order, a part at a time, whatever the size of a row group."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from jobs.batching.spec import Piece
from metasepia.errors import CorruptArtefact, InvalidSettings
from metasepia.sweeps.files import shown

READ_ROWS = 1024
"""Rows decoded at a time."""
BUFFER_BYTES = 1 << 20
"""Of a column that is read, at a time: a row group need not be in memory whole."""


@dataclass(frozen=True)
class Source:
    """The files of an input, all of one schema."""

    filesystem: pafs.FileSystem
    paths: tuple[str, ...]
    pieces: tuple[Piece, ...]
    schema: pa.Schema

    @classmethod
    def at(cls, uri: str) -> "Source":
        """A file, or a folder whose *.parquet files (not those that begin with `_` or `.`) are taken by name.

        Raises InvalidSettings for a place without any and for files of different schemas, CorruptArtefact for a file
        that is no Parquet.
        """
        try:
            if "://" in uri:
                filesystem, path = pafs.FileSystem.from_uri(uri)
            else:
                filesystem, path = pafs.LocalFileSystem(), str(Path(uri).expanduser().absolute())
            info = filesystem.get_file_info(path)
            paths = [path] if info.type == pafs.FileType.File else []
            if info.type == pafs.FileType.Directory:
                found = filesystem.get_file_info(pafs.FileSelector(path))
                files = [one for one in found if one.type == pafs.FileType.File]
                names = [one for one in files if one.base_name.endswith(".parquet") and one.base_name[0] not in "_."]
                paths = sorted(one.path for one in names)
        except (OSError, ValueError, pa.ArrowException) as error:
            words = _first_line(error).replace(uri, shown(uri))
            raise InvalidSettings("input", shown(uri), f"a place that can be read ({words})") from error
        if not paths:
            raise InvalidSettings("input", shown(uri), "a Parquet file, or a folder of *.parquet files; there is none")
        pieces, schema = list[Piece](), None
        for one in paths:
            with _opened(filesystem, one) as file:
                if schema is not None and not file.schema_arrow.equals(schema):
                    raise InvalidSettings("input", one, f"of the columns and types of {paths[0]}")
                schema = file.schema_arrow
                pieces.append(_piece(filesystem, one, file))
        assert schema is not None
        return cls(filesystem, tuple(paths), tuple(pieces), schema.remove_metadata())

    def parts(self, wanted: Sequence[range], columns: Sequence[str]) -> Iterator[pa.Table]:
        """The rows of each range; `wanted` in order, without overlap. One part is in memory at a time."""
        left, begin = list(wanted), 0
        pending: list[pa.RecordBatch] = []
        for path, piece in zip(self.paths, self.pieces, strict=True):
            end = begin + piece.rows
            if left and left[0].start < end:
                with _opened(self.filesystem, path) as file:
                    yield from _parts_of(file, begin, left, pending, columns)
            begin = end
        assert not left and not pending


def _parts_of(
    file: pq.ParquetFile, begin: int, left: list[range], pending: list[pa.RecordBatch], columns: Sequence[str]
) -> Iterator[pa.Table]:
    """Takes ranges that end in this file off `left`; rows of one that goes on in the next file stay in `pending`."""
    for group in range(file.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        if not left or left[0].start >= begin + rows:
            begin += rows
            continue
        for batch in file.iter_batches(READ_ROWS, row_groups=[group], columns=list(columns), use_threads=False):
            at = begin
            begin += batch.num_rows
            while left and left[0].start < begin:
                first, last = max(left[0].start, at), min(left[0].stop, begin)
                pending.append(batch.slice(first - at, last - first))
                if last < left[0].stop:
                    break
                left.pop(0)
                yield pa.Table.from_batches(pending).combine_chunks()
                pending.clear()


def _opened(filesystem: pafs.FileSystem, path: str) -> pq.ParquetFile:
    try:
        stream = filesystem.open_input_file(path)
        return pq.ParquetFile(stream, buffer_size=BUFFER_BYTES, pre_buffer=False)
    except (OSError, pa.ArrowException) as error:
        raise CorruptArtefact(path, f"it cannot be read as Parquet ({_first_line(error)})") from error


def _piece(filesystem: pafs.FileSystem, path: str, file: pq.ParquetFile) -> Piece:
    size = filesystem.get_file_info(path).size
    with filesystem.open_input_file(path) as stream:  # a file ends in its footer, the footer's length, and "PAR1"
        stream.seek(size - 8)
        length = int.from_bytes(stream.read(4), "little")
        stream.seek(max(0, size - 8 - length))
        footer = hashlib.sha256(stream.read(length)).hexdigest()
    return Piece(rows=file.metadata.num_rows, num_bytes=size, footer=footer)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
