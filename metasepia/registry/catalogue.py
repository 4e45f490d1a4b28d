"""The catalogue: names, digests and blobs of experts, mixtures, contexts, modules, factors and embeddings, on one disk.

A *blob* is immutable bytes under the content digest its maker computed (`metasepia.digests`). A *name* is a mutable
pointer to a digest, one a kind and owner. Replacing or deleting a name leaves a tombstone: the blob can still be had by
digest, so that receipts can be replayed, until `purge` takes it. What `put` and `delete` have answered survives the
death of the process and of the machine: the blob is on disk (file, then directory) before its row is committed.

On disk: `catalogue.sqlite` (WAL, synchronous FULL), `blobs/<sha256 of the bytes>`, `lock`. Standard library only.
"""

import contextlib
import hashlib
import json
import os
import re
import socket
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from metasepia.errors import (
    CorruptArtefact,
    InvalidRequest,
    Locked,
    NameTaken,
    UnknownName,
)
from metasepia.local_disk import check_local_disk, failures_in_words, sync_directory, take_lock
from metasepia.registry.entries import KINDS, SHARED, Artefact, Changes, Kind, check_name
from metasepia.registry.reading import COLUMNS, MAX_NAMES_IN_AN_ERROR, artefact_of

MAX_CARD_BYTES = 1 << 20
MAX_CHANGES = 1000
"""Changes of names that are remembered; whoever is further behind lists everything again."""

_DIGEST = re.compile(r"[0-9a-f]{64}")
_SCHEMA_VERSION = 1
_SCHEMA = """
CREATE TABLE writer (id INTEGER PRIMARY KEY CHECK (id = 1), epoch INTEGER NOT NULL, holder TEXT NOT NULL) STRICT;
INSERT INTO writer VALUES (1, 0, 'nobody');
CREATE TABLE entries (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    kind TEXT NOT NULL, digest TEXT NOT NULL, owner TEXT NOT NULL, name TEXT NOT NULL,
    created REAL NOT NULL, deleted REAL,
    num_bytes INTEGER NOT NULL, sha256 TEXT NOT NULL, card TEXT NOT NULL
) STRICT;
CREATE UNIQUE INDEX live_names ON entries (kind, owner, name) WHERE deleted IS NULL;
CREATE INDEX entries_by_digest ON entries (digest);
CREATE INDEX entries_by_blob ON entries (sha256);
"""
_INDEXES = """
CREATE INDEX IF NOT EXISTS entries_by_name ON entries (kind, name);
CREATE INDEX IF NOT EXISTS entries_deleted ON entries (deleted) WHERE deleted IS NOT NULL;
"""
"""Made at any opening where they are missing: they change how fast and not what."""


class Registry:
    """The one writer of a registry directory. Thread-safe. Opening it recovers whatever a crash left behind.

    Opening raises Locked while another process holds the directory (after waiting `lock_timeout_s`), InvalidSettings
    for a network filesystem, where neither SQLite's log nor the lock can be relied upon, and CorruptArtefact for a
    damaged catalogue. Any method raises Unavailable, with the reason, when the disk is full or fails.
    """

    def __init__(self, root: Path, *, lock_timeout_s: float = 0.0, clock: Callable[[], float] = time.time) -> None:
        root = root.expanduser().resolve()
        check_local_disk(root)
        self.root, self._blobs, self._clock = root, root / "blobs", clock
        self._mutex, self._reading = threading.RLock(), threading.RLock()
        self._num_changes = 0
        self._changed: deque[tuple[int, str, str, str]] = deque(maxlen=MAX_CHANGES)
        self._holder = f"process {os.getpid()} on {socket.gethostname()}"
        with self._failures_in_words():
            self._blobs.mkdir(parents=True, exist_ok=True)
            sync_directory(root.parent)
            self._lock = take_lock(root / "lock", self._holder, lock_timeout_s)
            try:
                for unfinished in self._blobs.glob("*.part"):
                    unfinished.unlink()
                self._db = self._open_catalogue()
                self.epoch = self._begin_epoch()
                self._read_db = self._connect()  # reads do not wait for a write that waits for the disk
            except BaseException:
                os.close(self._lock)
                raise

    def put(
        self,
        kind: Kind,
        blob: bytes,
        *,
        digest: str,
        name: str | None,
        owner: str,
        card: dict[str, object] | None = None,
        replace: bool = True,
    ) -> Artefact:
        """Stores a blob and points `name` at it (None: it is found by its digest alone); durable when this returns.

        `digest` is the content digest; whoever takes bytes from a client computes it from them first. A name in use is
        moved to the new digest, or with `replace` false NameTaken is raised. The same put again changes nothing, except
        that it mends a damaged blob. Raises InvalidRequest for a kind, name, owner or card that is not allowed.
        """
        if kind not in KINDS:
            raise InvalidRequest("kind", f"{kind!r} is not a kind; one of {', '.join(KINDS)}")
        if not _DIGEST.fullmatch(digest):
            raise InvalidRequest("digest", f"{digest[:80]!r} is not a digest of 64 hex digits")
        name = digest if name is None else name
        check_name(name)
        check_name(owner, "owner")
        if name != digest and _DIGEST.fullmatch(name):
            raise InvalidRequest("name", f"{name!r} looks like the digest of something else; choose another name")
        card_json = _card_json(card or {})
        sha256 = hashlib.sha256(blob).hexdigest()
        with self._write() as db:
            # The blob first: a crash after it leaves a file for `purge`, never a name without its bytes.
            self._store(blob, sha256)
            now = self._clock()
            live = db.execute(
                f"SELECT id, sha256, {COLUMNS} FROM entries WHERE kind=? AND owner=? AND name=? AND deleted IS NULL",
                (kind, owner, name),
            ).fetchone()
            if live is not None:
                if (live["digest"], live["sha256"], live["card"]) == (digest, sha256, card_json):
                    return artefact_of(live)
                if not replace:
                    raise NameTaken(kind, name, live["digest"])
                db.execute("UPDATE entries SET deleted=? WHERE id=?", (now, live["id"]))
            db.execute(
                "INSERT INTO entries (kind, digest, owner, name, created, num_bytes, sha256, card) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (kind, digest, owner, name, now, len(blob), sha256, card_json),
            )
        self._note(kind, owner, name)
        return Artefact(
            kind=kind,
            digest=digest,
            name=name,
            owner=owner,
            created_unix_s=now,
            num_bytes=len(blob),
            card=json.loads(card_json),
        )

    def resolve(self, kind: Kind, name: str, owner: str, *, deleted: bool = False) -> Artefact:
        """What a name, or a digest, stands for to this owner now: their own entry before the shared one.

        `deleted` finds the latest tombstone where nothing stands for it now. Raises UnknownName listing the names of
        that kind this owner can see.
        """
        found = f"SELECT id, {COLUMNS} FROM entries WHERE kind=? AND owner IN (?, ?) AND (? OR deleted IS NULL)"
        whose = (kind, owner, SHARED, deleted)
        row = self._one(  # each half by its own index: a name may have thousands of tombstones beside it
            f"SELECT * FROM ({found} AND name=? UNION ALL {found} AND digest=?) "
            "ORDER BY deleted IS NOT NULL, owner = ? DESC, name = ? DESC, deleted DESC, id LIMIT 1",
            (*whose, name, *whose, name, owner, name),
        )
        if row is None:
            raise UnknownName(kind, name, self._known(kind, owner))
        return artefact_of(row)

    def get(self, digest: str, owner: str | None = None) -> bytes:
        """The bytes stored under a digest, also of deleted or replaced names that `purge` has not taken.

        `owner` None is the system itself: a shard that pulls what an admitted row names. Raises UnknownName for a
        digest this owner has not got, CorruptArtefact when the bytes on disk are no longer those that were stored.
        """
        try:
            file, sha256 = self._open_blob(digest, owner)
        except CorruptArtefact:  # or `purge` took the bytes while another entry of them was being made
            with self._mutex:
                file, sha256 = self._open_blob(digest, owner)
        with file, self._failures_in_words():
            blob = file.read()
        if hashlib.sha256(blob).hexdigest() != sha256:
            raise CorruptArtefact(
                f"artefact {digest}", "the bytes on disk have changed since they were stored; put it again"
            )
        return blob

    def list(
        self, kind: Kind | None, owner: str, *, deleted: bool = False, after: str = "", limit: int = 1000
    ) -> tuple[Artefact, ...]:
        """The owner's and the shared entries of a kind (None: all kinds) by name, from the name behind `after` on.

        `deleted` adds tombstones, newest first behind the live entry of their name. A shared entry that the owner's own
        hides is listed too.
        """
        alive = "" if deleted else "AND deleted IS NULL "
        of_kind, kinds = ("", ()) if kind is None else ("kind=? AND ", (kind,))
        one = (
            f"SELECT * FROM (SELECT id, {COLUMNS} FROM entries WHERE {of_kind}owner=? AND name > ? {alive}"
            "ORDER BY name, deleted IS NOT NULL, id DESC LIMIT ?)"
        )
        with self._reading, self._failures_in_words():
            rows = self._read_db.execute(
                f"SELECT * FROM ({one} UNION ALL {one}) ORDER BY name, deleted IS NOT NULL, id DESC LIMIT ?",
                (*kinds, owner, after, limit, *kinds, SHARED, after, 0 if owner == SHARED else limit, limit),
            ).fetchall()
        return tuple(artefact_of(row) for row in rows)

    def owners(self, kind: Kind) -> tuple[str, ...]:
        """Whoever has something of a kind now, in order."""
        with self._reading, self._failures_in_words():
            rows = self._read_db.execute(
                "SELECT DISTINCT owner FROM entries WHERE kind=? AND deleted IS NULL ORDER BY owner", (kind,)
            ).fetchall()
        return tuple(row["owner"] for row in rows)

    def changes(self, kind: Kind, owner: str, since: tuple[int, int] | None) -> Changes:
        """The names of a kind, the owner's and the shared ones, that may have changed since a revision.

        For keepers of a copy: take the revision (`since` None), list everything once, then ask what has changed. What
        `put` or `delete` had answered before this was asked is in the answer. After another writer took over, or more
        than MAX_CHANGES changes, everything must be listed again.
        """
        with self._reading:
            changed, now = tuple(self._changed), self._num_changes
        behind = None if since is None or since[0] != self.epoch else now - since[1]
        if behind is None or not 0 <= behind <= len(changed):
            return Changes(revision=(self.epoch, now), names=None)
        recent = changed[len(changed) - behind :] if behind else ()
        names = tuple(
            dict.fromkeys((own, name) for _, of, own, name in recent if of == kind and own in (owner, SHARED))
        )
        return Changes(revision=(self.epoch, now), names=names, live=self._live(kind, names))

    def delete(self, kind: Kind, name: str, owner: str, *, digest: str | None = None) -> Artefact:
        """Takes an owner's name away and returns its tombstone; the blob stays until `purge`.

        With `digest`, only while the name points there; deleting again then answers with the same tombstone, which
        makes a retry safe. Raises UnknownName, also for a shared name unless `owner` is `shared`.
        """
        with self._write() as db:
            row = db.execute(
                f"SELECT id, {COLUMNS} FROM entries WHERE kind=? AND name=? AND owner=? AND (digest=? OR ? IS NULL) "
                "AND (deleted IS NULL OR ? IS NOT NULL) ORDER BY deleted IS NOT NULL, id DESC LIMIT 1",
                (kind, name, owner, digest, digest, digest),
            ).fetchone()
            if row is None:
                raise UnknownName(kind, name, self._known(kind, owner, shared=False))
            if row["deleted"] is None:
                now = self._clock()
                db.execute("UPDATE entries SET deleted=? WHERE id=?", (now, row["id"]))
                row = {**dict(row), "deleted": now}
        self._note(kind, owner, name)
        return artefact_of(row)

    def purge(self, older_than_s: float) -> int:
        """Forgets what was deleted or replaced more than `older_than_s` ago; the number of entries.

        What a live mixture is made of stays. Blobs that no entry names any more leave the disk, those that a crash left
        without an entry at the same age.
        """
        before = self._clock() - older_than_s
        with self._write() as db:
            in_mixtures = (
                "SELECT json_extract(part.value, '$[0]') FROM entries AS mixture, "
                "json_each(mixture.card, '$.adapter') AS part "
                "WHERE mixture.kind = 'mixture' AND mixture.deleted IS NULL"
            )
            gone = db.execute(
                f"DELETE FROM entries WHERE deleted < ? AND digest NOT IN ({in_mixtures}) RETURNING sha256", (before,)
            ).fetchall()
        purged = [row["sha256"] for row in gone]
        # Rows first: a crash here leaves files without rows, which the next purge finds. In a transaction, so that a
        # writer that took over cannot be naming the same blob meanwhile.
        with self._write() as db:
            named = {row["sha256"] for row in db.execute("SELECT DISTINCT sha256 FROM entries")}
            for path in self._blobs.iterdir():
                if path.name not in named and (path.name in purged or path.stat().st_mtime < before):
                    path.unlink()
        return len(purged)

    def close(self) -> None:
        """Gives the directory free for another writer."""
        with self._mutex, self._reading:
            self._db.close()
            self._read_db.close()
            if self._lock >= 0:
                os.close(self._lock)
                self._lock = -1

    def __enter__(self) -> "Registry":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open_catalogue(self) -> sqlite3.Connection:
        # Autocommit: transactions begin and end where `_write` says. SQLite plays back the write-ahead log by itself.
        db = self._connect()
        try:
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("PRAGMA synchronous=FULL")
            problem = db.execute("PRAGMA quick_check(1)").fetchone()[0]
            if problem != "ok":
                raise CorruptArtefact(str(self.root / "catalogue.sqlite"), f"{problem}; restore it from a copy")
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version not in (0, _SCHEMA_VERSION):
                raise CorruptArtefact(
                    str(self.root / "catalogue.sqlite"),
                    f"its version is {version}, this program reads {_SCHEMA_VERSION}",
                )
            if version == 0:
                db.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} PRAGMA user_version={_SCHEMA_VERSION}; COMMIT;")
            db.executescript(_INDEXES)
            sync_directory(self.root)
        except BaseException:
            db.close()
            raise
        return db

    def _connect(self) -> sqlite3.Connection:
        db = sqlite3.connect(self.root / "catalogue.sqlite", isolation_level=None, check_same_thread=False, timeout=5.0)
        db.row_factory = sqlite3.Row
        return db

    def _begin_epoch(self) -> int:
        self._db.execute("BEGIN IMMEDIATE")
        self._db.execute("UPDATE writer SET epoch = epoch + 1, holder = ?", (self._holder,))
        epoch = self._db.execute("SELECT epoch FROM writer").fetchone()["epoch"]
        self._db.execute("COMMIT")
        return epoch

    @contextlib.contextmanager
    def _write(self) -> Iterator[sqlite3.Connection]:
        """One write transaction, refused with Locked when another writer has begun a later epoch.

        The lock keeps a second writer out; the epoch fences us off where it did not (a deleted lock file).
        """
        with self._mutex, self._failures_in_words():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                writer = self._db.execute("SELECT epoch, holder FROM writer").fetchone()
                if writer["epoch"] != self.epoch:
                    raise Locked(str(self.root), writer["holder"])
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    self._db.execute("ROLLBACK")
                raise

    def _store(self, blob: bytes, sha256: str) -> None:
        target = self._blobs / sha256
        if not (target.exists() and hashlib.sha256(target.read_bytes()).hexdigest() == sha256):
            part = self._blobs / f"{sha256}.part"
            with part.open("wb") as file:
                file.write(blob)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, target)
        sync_directory(self._blobs)  # also for a file that was there: its own writer may have died before this

    def _open_blob(self, digest: str, owner: str | None) -> tuple[BinaryIO, str]:
        row = self._one(
            "SELECT sha256 FROM entries WHERE digest=? AND (? IS NULL OR owner IN (?, ?)) "
            "ORDER BY owner IS ? DESC, deleted IS NOT NULL, id LIMIT 1",
            (digest, owner, owner, SHARED, owner),
        )
        if row is None:
            raise UnknownName("artefact", digest, self._known(None, owner))
        with self._failures_in_words():
            try:
                return (self._blobs / row["sha256"]).open("rb"), row["sha256"]
            except FileNotFoundError:
                raise CorruptArtefact(f"artefact {digest}", "its blob is missing; put it again") from None

    def _note(self, kind: str, owner: str, name: str) -> None:
        """Remembers a committed change, before it is acknowledged."""
        with self._reading:
            self._num_changes += 1
            self._changed.append((self._num_changes, kind, owner, name))

    def _live(self, kind: str, names: Sequence[tuple[str, str]]) -> tuple[Artefact, ...]:
        query = f"SELECT {COLUMNS} FROM entries WHERE kind=? AND owner=? AND name=? AND deleted IS NULL"
        with self._reading, self._failures_in_words():
            rows = [self._read_db.execute(query, (kind, owner, name)).fetchone() for owner, name in names]
        return tuple(artefact_of(row) for row in rows if row is not None)

    def _one(self, query: str, values: tuple[object, ...]) -> Any:
        with self._reading, self._failures_in_words():
            return self._read_db.execute(query, values).fetchone()

    def _known(self, kind: str | None, owner: str | None, *, shared: bool = True) -> tuple[str, ...]:
        with self._reading:
            rows = self._read_db.execute(
                "SELECT DISTINCT name FROM entries WHERE deleted IS NULL AND (? IS NULL OR kind=?) "
                "AND (? IS NULL OR owner=? OR (? AND owner=?)) ORDER BY name LIMIT ?",
                (kind, kind, owner, owner, shared, SHARED, MAX_NAMES_IN_AN_ERROR + 1),
            ).fetchall()
        names = tuple(row["name"] for row in rows)
        return names if len(names) <= MAX_NAMES_IN_AN_ERROR else (*names[:MAX_NAMES_IN_AN_ERROR], "and more")

    def _failures_in_words(self) -> contextlib.AbstractContextManager[None]:
        return failures_in_words(self.root / "catalogue.sqlite")


def _card_json(card: dict[str, object]) -> str:
    try:
        text = json.dumps(card, sort_keys=True, allow_nan=False, ensure_ascii=False)
        size = len(text.encode())
    except (TypeError, ValueError) as error:
        raise InvalidRequest("card", f"it must be a JSON object ({error})") from error
    if size > MAX_CARD_BYTES:
        raise InvalidRequest("card", f"it has {size} bytes; at most {MAX_CARD_BYTES} are kept")
    return text
