"""Parquet files at any `pyarrow.fs` URI that need not be in memory whole."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from metasepia.errors import CorruptArtefact
from metasepia.sweeps.files import Files


class StreamedFiles(Files):
    """Files below one URI that are read and written a part at a time."""

    @classmethod
    def at(cls, uri: str, filesystem: pafs.FileSystem | None = None) -> "StreamedFiles":
        found = super().at(uri, filesystem)
        assert isinstance(found, StreamedFiles)
        return found

    def folders(self) -> list[str]:
        """Names of the folders at the root."""
        with self._named(""):
            selector = pafs.FileSelector(self._root, allow_not_found=True)
            found = self._filesystem.get_file_info(selector)
        return sorted(info.base_name for info in found if info.type == pafs.FileType.Directory)

    def remove(self) -> None:
        """Deletes the folder itself, where nothing is in it any more."""
        with self._named(""):
            if self._filesystem.get_file_info(self._root).type != pafs.FileType.Directory:
                return
            found = self._filesystem.get_file_info(pafs.FileSelector(self._root, recursive=True))
            if not any(one.type == pafs.FileType.File for one in found):
                self._filesystem.delete_dir(self._root)

    def open(self, name: str) -> pq.ParquetFile:
        """Raises CorruptArtefact for what is no Parquet file."""
        with self._named(name):
            stream = self._filesystem.open_input_file(self._path(name))
        try:
            return pq.ParquetFile(stream)
        except pa.ArrowException as error:
            stream.close()
            raise CorruptArtefact(self.path_of(name), f"it is torn or no Parquet file ({error})") from error

    @contextlib.contextmanager
    def create(self, name: str) -> Iterator[pa.NativeFile]:
        """A stream whose file takes its place when the block ends, and not at all if it raises: what an object store
        took until then is deleted again, a moment after it can be seen.
        """
        path = self._path(name)
        beside = f"{path.rpartition('/')[0]}/.{path.rpartition('/')[2]}.{os.urandom(4).hex()}" if self._local else path
        with self._named(name):
            self._filesystem.create_dir(path.rpartition("/")[0], recursive=True)
            try:
                with self._filesystem.open_output_stream(beside) as stream:
                    yield stream
                if self._local:
                    _sync(Path(beside))
                    os.replace(beside, path)
            except BaseException:
                with contextlib.suppress(OSError):
                    self._filesystem.delete_file(beside)
                raise


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
