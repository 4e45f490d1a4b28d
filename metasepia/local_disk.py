"""What durable storage needs of a disk: that it is of this machine, that renames are on it, and that one writer is; and
what its failures are called.
"""

import contextlib
import errno
import fcntl
import os
import re
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

from metasepia.errors import CorruptArtefact, InvalidSettings, Locked, MetasepiaError, Unavailable

_NETWORK_FILESYSTEMS = frozenset(
    """nfs nfs4 cifs smb3 smbfs 9p ceph lustre glusterfs afs gpfs beegfs orangefs pvfs2 ocfs2 gfs2 ncpfs davfs
    vboxsf""".split()  # noqa: SIM905
)


def check_local_disk(root: Path, mountinfo: str | None = None) -> None:
    """Raises InvalidSettings when `root`, which need not exist, lies on a network filesystem.

    `mountinfo` is the text of /proc/self/mountinfo (proc(5)), read when None; on systems without it nothing is refused.
    """
    if mountinfo is None:
        try:
            mountinfo = Path("/proc/self/mountinfo").read_text()
        except OSError:  # not Linux: nothing to ask
            return
    path, found = os.path.realpath(root), ("", "")
    for line in mountinfo.splitlines():
        left, _, right = line.partition(" - ")
        mount_point = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), left.split()[4])
        inside = path == mount_point or path.startswith(mount_point.rstrip("/") + "/")
        if inside and len(mount_point) >= len(found[0]):  # a later mount on the same point hides the earlier one
            found = (mount_point, right.split()[0])
    mount_point, filesystem = found
    if filesystem in _NETWORK_FILESYSTEMS or (re.match(r"fuse(\.(?!fuse-overlayfs)|$)", filesystem)):
        allowed = f"on a local disk for the registry's catalogue; {mount_point} is a network filesystem ({filesystem})"
        raise InvalidSettings("home", str(root), allowed)


def sync_directory(path: Path) -> None:
    """Makes the names inside a directory durable: a file's own fsync does not cover its name."""
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def take_lock(path: Path, holder: str, timeout_s: float) -> int:
    """Locks a file for this process and writes `holder` into it; closing the returned descriptor gives it free.

    The kernel frees it when the process dies, however it dies. Raises Locked with the holder after `timeout_s`.
    """
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    give_up_at = time.monotonic() + timeout_s
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= give_up_at:
                other = os.pread(lock, 256, 0).decode(errors="replace").strip()
                os.close(lock)
                raise Locked(str(path.parent), other or "another process") from None
            time.sleep(0.05)
        else:
            os.ftruncate(lock, 0)
            os.pwrite(lock, holder.encode(), 0)
            return lock


@contextlib.contextmanager
def failures_in_words(database: Path) -> Iterator[None]:
    """What the disk or a database of a registry's directory raises, as CorruptArtefact or Unavailable, with why."""
    root = database.parent
    full = Unavailable(f"the registry at {root} (its disk is full: nothing was stored; free some space)", 60.0)
    try:
        yield
    except MetasepiaError:
        raise
    except sqlite3.DatabaseError as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            raise CorruptArtefact(str(database), f"{error}; restore it from a copy") from error
        if code == sqlite3.SQLITE_FULL:
            raise full from error
        if isinstance(error, sqlite3.OperationalError):
            raise Unavailable(f"the registry at {root} ({error})", 5.0) from error
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise full from error
        raise Unavailable(f"the registry at {root} ({error})", 5.0) from error
