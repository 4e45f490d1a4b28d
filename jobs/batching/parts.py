"""What a batch has done: write-once Parquet parts, and one file made of them where one file is asked for.

    OUT/_batch.json                        what the batch is, and its digest
    OUT/part-00000012-<stamp>.parquet      rows of one part, in the input's order
    OUT/_SUCCESS                           all parts are there

A stamp is of the part's bytes (`metasepia.sweeps.files`). Readers of Parquet folders pass over names that begin with
`_`. Where OUT ends in .parquet the folder is OUT.parts, and goes when OUT is whole.
"""

import json
import re
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.batching.spec import BatchSpec
from metasepia.digests import short
from metasepia.embedding.store_files import StreamedFiles
from metasepia.errors import CorruptArtefact, InvalidSettings
from metasepia.sweeps.files import shown, stamp_of

FORMAT = 1
MANIFEST, SUCCESS = "_batch.json", "_SUCCESS"
KEY = b"metasepia"
_PART = re.compile(r"part-(\d{8})-([0-9a-f]{16})\.parquet")


class Parts:
    """One batch's output. One process writes it."""

    def __init__(self, uri: str, spec: BatchSpec, error_column: str) -> None:
        """Raises InvalidSettings where another batch's output is, StorageFailed where it cannot be written."""
        self._spec, self._error = spec, error_column
        address, mark, options = uri.partition("?")
        self._whole: tuple[StreamedFiles, str] | None = None
        if address.endswith(".parquet"):
            folder, _, name = address.rpartition("/")
            self._whole = StreamedFiles.at((folder or ".") + mark + options), name
            address += ".parts"
        self._files = StreamedFiles.at(address + mark + options)
        self.uri = shown(uri)
        self._is_done = self._find_whole()
        if not self._is_done:
            self._begin()
        elif self._whole is not None:
            self._clear()  # a process was killed between the whole file and this

    def done(self) -> set[int]:
        """Parts that are there."""
        if self._is_done:
            return set(range(self._spec.num_parts))
        return {int(match[1]) for name in self._files.names("") if (match := _PART.fullmatch(name))}

    def put(self, part: int, table: pa.Table) -> None:
        content = _parquet(table, self._spec.digest)
        self._files.write(f"part-{part:08d}-{stamp_of(content)}.parquet", content)

    def finish(self, empty: pa.Schema) -> int:
        """Makes the output whole and returns how many rows have an error. `empty`: the schema where there are no rows.

        Raises CorruptArtefact naming a part that is torn.
        """
        if self._is_done:
            return self._num_errors_of_whole()
        names = sorted(name for name in self._files.names("") if _PART.fullmatch(name))
        num_errors = 0
        if self._whole is None:
            num_errors = sum(self._num_errors(self._read(name)) for name in names)
            self._files.write(SUCCESS, b"")
            self._files.clear_leftovers("")
        else:
            files, whole = self._whole
            with files.create(whole) as stream:
                tables = (self._read(name) for name in names)
                first = next(tables, empty.empty_table())
                schema = first.schema.with_metadata({KEY: self._mark()})
                with pq.ParquetWriter(stream, schema, compression="zstd", compression_level=3) as writer:
                    for table in _with_first(first, tables):
                        num_errors += self._num_errors(table)
                        writer.write_table(table.replace_schema_metadata(schema.metadata), row_group_size=1 << 20)
            self._clear()
        self._is_done = True
        return num_errors

    def _clear(self) -> None:
        for name in self._files.names(""):
            if name == MANIFEST or _PART.fullmatch(name):
                self._files.delete(name)
        self._files.clear_leftovers("")
        self._files.remove()

    def _mark(self) -> bytes:
        return json.dumps({"batch": self._spec.digest}).encode()

    def _begin(self) -> None:
        content = self._files.read(MANIFEST)
        if content is None:
            if any(_PART.fullmatch(name) for name in self._files.names("")):
                raise InvalidSettings("output", self.uri, f"a folder without parts of a batch that has no {MANIFEST}")
            told = {"format": FORMAT, "digest": self._spec.digest, "batch": self._spec.to_json()}
            self._files.write(MANIFEST, json.dumps(told, indent=1, sort_keys=True).encode() + b"\n")
            return
        try:
            found: Any = json.loads(content)
            digest = str(found["digest"])
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptArtefact(self._files.path_of(MANIFEST), f"it is torn ({error}); delete the folder") from error
        self._check(digest, _differences(found.get("batch", {}), self._spec.to_json()))
        self._is_done = self._whole is None and self._files.exists(SUCCESS)

    def _find_whole(self) -> bool:
        if self._whole is None or not self._whole[0].exists(self._whole[1]):
            return False
        with self._whole[0].open(self._whole[1]) as file:
            metadata = (file.schema_arrow.metadata or {}).get(KEY, b"{}")
        self._check(str(json.loads(metadata).get("batch", "")), "")
        return True

    def _check(self, digest: str, why: str) -> None:
        if digest != self._spec.digest:
            what = f"the output of another batch ({short(digest)})" if digest else "a file that no batch wrote"
            allowed = f"a new place, or this batch's ({short(self._spec.digest)}); it is {what}{why}"
            raise InvalidSettings("output", self.uri, allowed)

    def _read(self, name: str) -> pa.Table:
        content = self._files.read(name)
        match = _PART.fullmatch(name)
        assert match is not None
        if content is None or stamp_of(content) != match[2]:
            raise CorruptArtefact(self._files.path_of(name), "its bytes are not those it was written with; delete it")
        return pq.read_table(pa.BufferReader(content))

    def _num_errors(self, table: pa.Table) -> int:
        return table.num_rows - table[self._error].null_count

    def _num_errors_of_whole(self) -> int:
        if self._whole is None:
            return sum(self._num_errors(self._read(n)) for n in self._files.names("") if _PART.fullmatch(n))
        with self._whole[0].open(self._whole[1]) as file:
            batches = file.iter_batches(columns=[self._error])
            return sum(len(batch) - batch[self._error].null_count for batch in batches)


def _with_first(first: pa.Table, others: Any) -> Any:
    yield first
    yield from others


def _differences(one: dict[str, Any], other: dict[str, Any]) -> str:
    names = sorted(name for name in {*one, *other} if one.get(name) != other.get(name))
    return f", of another {', '.join(names)}" if names else ""


def _parquet(table: pa.Table, digest: str) -> bytes:
    """Bytes that depend on the table, the digest and pyarrow's version alone."""
    sink = pa.BufferOutputStream()
    table = table.replace_schema_metadata({KEY: json.dumps({"batch": digest}).encode()})
    pq.write_table(table, sink, row_group_size=1 << 20, compression="zstd", compression_level=3)
    return sink.getvalue().to_pybytes()
