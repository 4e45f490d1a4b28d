"""Whole files below one `pyarrow.fs` URI: what is read was written to its end, and what is written is whole or absent.

Locally a file is written beside its place, synced, and renamed. Elsewhere it is one put: object stores show that whole
or not at all; on a filesystem that does neither, the stamp in an object's name tells (`metasepia.sweeps.store`).
"""

import contextlib
import errno
import hashlib
import os
import re
import uuid
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs

from metasepia.errors import InvalidSettings
from metasepia.sweeps.failures import StorageFailed

_LEFTOVER = re.compile(r"\..+\.[0-9a-f]{8}")
"""What a local writer writes before it renames."""
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK}
"""What a filesystem without hard links says: FAT, some network and shared ones."""


def stamp_of(content: bytes) -> str:
    """The first 16 digits of its sha256."""
    return hashlib.sha256(content).hexdigest()[:16]


def shown(uri: str) -> str:
    """A URI for people and logs: without user, password and options, which may be secrets."""
    scheme, mark, rest = uri.partition("://")
    if not mark:
        return uri
    authority, slash, path = rest.partition("?")[0].partition("/")
    return f"{scheme}://{authority.rpartition('@')[2]}{slash}{path}"


class Files:
    """Files below `root` in `filesystem`; names are relative, with slashes."""

    def __init__(self, filesystem: pafs.FileSystem, root: str, uri: str) -> None:
        self._filesystem, self._root = filesystem, root.rstrip("/")
        self.address, self.uri = uri, shown(uri)
        """What opens the same place again, and the same for people (`shown`)."""
        self._local = isinstance(filesystem, pafs.LocalFileSystem)

    @classmethod
    def at(cls, uri: str, filesystem: pafs.FileSystem | None = None) -> "Files":
        """Raises InvalidSettings for a URI that pyarrow does not know, or that is a file."""
        if not uri:
            raise InvalidSettings("uri", uri, "a path or a URI")
        try:
            if filesystem is not None:
                files = cls(filesystem, uri, uri)
            elif "://" in uri:
                found, root = pafs.FileSystem.from_uri(uri)
                files = cls(found, root, uri)
            else:
                path = str(Path(uri).expanduser().absolute())
                files = cls(pafs.LocalFileSystem(), path, path)
        except (ValueError, OSError, pa.ArrowException) as error:
            words = str(error).replace(uri, shown(uri)).splitlines()[0]
            allowed = f"a local path, file:///..., s3://bucket/..., gs://bucket/... ({words})"
            raise InvalidSettings("uri", shown(uri), allowed) from error
        with files._named(""):
            if files._filesystem.get_file_info(files._root).type == pafs.FileType.File:
                raise InvalidSettings("uri", files.uri, "a folder; this is a file")
        return files

    def path_of(self, name: str) -> str:
        """For people: where the file is."""
        return f"{self.uri.rstrip('/')}/{name}"

    def exists(self, name: str) -> bool:
        with self._named(name):
            return self._filesystem.get_file_info(self._path(name)).type == pafs.FileType.File

    def names(self, folder: str) -> list[str]:
        """Of the files in a folder; none where it does not exist."""
        with self._named(folder):
            selector = pafs.FileSelector(self._path(folder), allow_not_found=True)
            found = self._filesystem.get_file_info(selector)
        return [info.base_name for info in found if info.type == pafs.FileType.File]

    def read(self, name: str) -> bytes | None:
        """The content, None where there is no such file."""
        try:
            with self._named(name), self._filesystem.open_input_stream(self._path(name)) as stream:
                return stream.read()
        except StorageFailed as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return None
            raise

    def write(self, name: str, content: bytes, *, if_absent: bool = False) -> None:
        """Puts the file there whole, in place of what there was; with `if_absent` only where there is none.

        Without a local filesystem `if_absent` is not atomic: read what is there afterwards.
        """
        with self._named(name):
            path = self._path(name)
            self._filesystem.create_dir(path.rpartition("/")[0], recursive=True)
            if self._local:
                _write_locally(Path(path), content, if_absent=if_absent)
            elif not (if_absent and self.exists(name)):
                with self._filesystem.open_output_stream(path) as stream:
                    stream.write(content)

    def delete(self, name: str) -> None:
        """Also where it is gone already."""
        try:
            with self._named(name):
                self._filesystem.delete_file(self._path(name))
        except StorageFailed as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise

    def clear_leftovers(self, folder: str) -> None:
        """Deletes what writers that were killed left beside a place; call it when no one else writes there."""
        for name in self.names(folder):
            if _LEFTOVER.fullmatch(name):
                self.delete(f"{folder}/{name}")

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    @contextlib.contextmanager
    def _named(self, name: str) -> Iterator[None]:
        """The filesystem's errors as StorageFailed, with the file's name."""
        try:
            yield
        except StorageFailed:
            raise
        except OSError as error:
            raise StorageFailed(self.path_of(name), error.strerror or str(error)) from error


def _write_locally(path: Path, content: bytes, *, if_absent: bool) -> None:
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if if_absent:
            _link(beside, path)
        else:
            os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _link(beside: Path, path: Path) -> None:
    """Makes `beside` be `path` too unless that exists; without hard links two at one moment may both think so."""
    try:
        os.link(beside, path)
    except FileExistsError:
        pass
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if not path.exists():
            os.replace(beside, path)
