"""Answers that were paid for, kept: SQLite, by the digest of the black box and the digest of what it was asked.

An answer is durable before it counts (WAL, synchronous FULL), so a killed run goes on where it stopped and pays again
at most for what was in flight. Each row carries a checksum over all of itself; a damaged one is as good as none. What
answered (a model's name and fingerprint) is part of a row's key, so answers of two models lie side by side.

Several processes may use one file. Who asks a black box holds a lock on it (of the kernel's, which dies with the
process), so two never pay for one answer; within a process, a text in flight is waited for.
"""

import asyncio
import contextlib
import json
import os
import sqlite3
import threading
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metasepia.blackbox.errors import CacheFailed
from metasepia.digests import canonical_json, digest_of
from metasepia.errors import InvalidSettings, Locked
from metasepia.local_disk import check_local_disk, take_lock

APPLICATION_ID = 0x6D736162
VERSION = 1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS answers (
    box TEXT NOT NULL, item TEXT NOT NULL, identity TEXT NOT NULL, value TEXT NOT NULL, checksum TEXT NOT NULL,
    prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL, created REAL NOT NULL,
    PRIMARY KEY (box, item, identity)
) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS facts (
    box TEXT NOT NULL, name TEXT NOT NULL, value TEXT NOT NULL, PRIMARY KEY (box, name)
) STRICT, WITHOUT ROWID;
"""
_POLL_S = 0.05
_MANY = 500
"""Items asked for in one query."""


@dataclass(frozen=True, kw_only=True)
class Kept:
    """One answer as it is kept."""

    item: str
    """Digest of what was asked."""
    identity: str
    """Who answered, as the answer says."""
    value: Any
    """JSON."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    created_unix_s: float = 0.0


class AnswerCache:
    """One file of answers. Thread-safe.

    `path` None keeps answers in memory, for as long as this object lives. Opening raises CacheFailed for a file that is
    something else, damaged, or cannot be written, and InvalidSettings on a network filesystem, where neither SQLite's
    log nor the lock can be relied upon. So do all methods, in words, when the disk is full or fails.
    """

    def __init__(self, path: Path | str | None, *, wait_s: float = 30.0) -> None:
        """`wait_s`: for another process's write, which takes milliseconds."""
        self._mutex = threading.Lock()
        self._flying: dict[tuple[str, str], Future[None]] = {}
        self._held: dict[str, tuple[int, int]] = {}
        """Lock files by black box: descriptor, and how many use it."""
        self._wait_s = wait_s
        self.damaged = 0
        """Rows found whose checksum does not fit; they are asked again."""
        self.path = None if path is None else Path(path).expanduser().resolve()
        if self.path is not None:
            try:
                check_local_disk(self.path.parent)
            except InvalidSettings as error:
                raise InvalidSettings("cache", str(self.path), f"on a local disk ({error.allowed})") from None
        with self._in_words():
            if self.path is not None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(
                self.path or ":memory:", timeout=wait_s, isolation_level=None, check_same_thread=False
            )
        try:
            with self._in_words():
                self._open()
        except BaseException:
            self._db.close()
            raise

    def _open(self) -> None:
        # Tables first: another process that makes them writes the two numbers in the same transaction.
        tables = self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        (found,), (version,) = self._db.execute("PRAGMA application_id"), self._db.execute("PRAGMA user_version")
        if tables and found[0] != APPLICATION_ID:
            raise CacheFailed(self._name, "is a database of something else; choose another file")
        if tables and version[0] != VERSION:
            raise CacheFailed(self._name, f"is of version {version[0]}, not {VERSION}; choose another file")
        self._write_ahead()
        self._db.execute("PRAGMA synchronous = FULL")
        with self._transaction():
            for statement in _SCHEMA.split(";"):
                self._db.execute(statement)
            # Written each time: a disk that takes nothing is found before anything is paid for.
            self._db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            self._db.execute(f"PRAGMA user_version = {VERSION}")

    def _write_ahead(self) -> None:
        """Two that open a new file at once: SQLite refuses one of them at once here, whatever its timeout says."""
        give_up_s = time.monotonic() + self._wait_s
        while True:
            try:
                self._db.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > give_up_s:
                    raise
                time.sleep(_POLL_S)

    @property
    def _name(self) -> str:
        return "in memory" if self.path is None else str(self.path)

    def close(self) -> None:
        with self._mutex:
            self._db.close()

    def __enter__(self) -> "AnswerCache":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- answers -------------------------------------------------------------------------------------------------------

    def get(self, box: str, items: Sequence[str]) -> list[Kept]:
        """What is kept of these, in order of time, answers of every identity among them."""
        found: list[Kept] = []
        wanted = list(dict.fromkeys(items))
        for begin in range(0, len(wanted), _MANY):
            some = wanted[begin : begin + _MANY]
            query = (
                "SELECT item, identity, value, checksum, prompt_tokens, completion_tokens, created FROM answers "
                f"WHERE box = ? AND item IN ({','.join('?' * len(some))})"
            )
            with self._mutex, self._in_words():
                rows = self._db.execute(query, (box, *some)).fetchall()
            for item, identity, value, checksum, *counts in rows:
                if _checksum(box, item, identity, value, counts) != checksum:
                    self.damaged += 1
                    continue
                prompt_tokens, completion_tokens, created = counts
                found.append(
                    Kept(
                        item=item,
                        identity=identity,
                        value=json.loads(value),
                        prompt_tokens=prompt_tokens,
                        completion_tokens=completion_tokens,
                        created_unix_s=created,
                    )
                )
        return sorted(found, key=lambda one: one.created_unix_s)

    def put(self, box: str, answers: Sequence[Kept]) -> None:
        """Keeps answers, all or none of them; durable when this returns. One that is there already is replaced."""
        rows = []
        for one in answers:
            value, created = canonical_json(one.value).decode(), one.created_unix_s or time.time()
            counts = (one.prompt_tokens, one.completion_tokens, created)
            checksum = _checksum(box, one.item, one.identity, value, counts)
            rows.append((box, one.item, one.identity, value, checksum, *counts))
        with self._mutex, self._in_words(), self._transaction():
            self._db.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?, ?, ?, ?, ?)", rows)

    def forget(self, box: str) -> int:
        """Drops all that is kept of a black box; returns how many answers that was. They are paid for again."""
        with self._mutex, self._in_words(), self._transaction():
            self._db.execute("DELETE FROM facts WHERE box = ?", (box,))
            return self._db.execute("DELETE FROM answers WHERE box = ?", (box,)).rowcount

    def fact(self, box: str, name: str) -> Any:
        """What was found out about a black box; None: nothing yet."""
        with self._mutex, self._in_words():
            row = self._db.execute("SELECT value FROM facts WHERE box = ? AND name = ?", (box, name)).fetchone()
        return None if row is None else json.loads(row[0])

    def put_fact(self, box: str, name: str, value: Any) -> None:
        with self._mutex, self._in_words(), self._transaction():
            kept = canonical_json(value).decode()
            self._db.execute("INSERT OR REPLACE INTO facts VALUES (?, ?, ?)", (box, name, kept))

    # -- who asks ------------------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def asking(self, box: str, patience_s: float) -> AsyncGenerator[None]:
        """Holds a black box against other processes. Raises Locked, with the holder, after `patience_s`."""
        if self.path is None:
            yield
            return
        path, give_up_at = self._lock_path(box), time.monotonic() + patience_s
        while not self._hold(box, path, last=time.monotonic() >= give_up_at):
            await asyncio.sleep(_POLL_S)
        try:
            yield
        finally:
            self._release(box)

    def _lock_path(self, box: str) -> Path:
        assert self.path is not None
        folder = self.path.with_name(self.path.name + ".locks")
        with self._in_words():
            folder.mkdir(exist_ok=True)
        return folder / box[:32]

    def _hold(self, box: str, path: Path, *, last: bool) -> bool:
        with self._mutex:
            if box in self._held:
                descriptor, count = self._held[box]
                self._held[box] = descriptor, count + 1
                return True
            try:
                with self._in_words():
                    self._held[box] = take_lock(path, f"process {os.getpid()}", 0.0), 1
                return True
            except Locked as error:
                if last:
                    holder = f"{error.holder}, which asks the same black box now; what it is answered is kept"
                    raise Locked(self._name, holder) from None
                return False

    def _release(self, box: str) -> None:
        with self._mutex:
            descriptor, count = self._held.pop(box)
            if count > 1:
                self._held[box] = descriptor, count - 1
            else:
                os.close(descriptor)

    def begin(self, box: str, text: str) -> Future[None] | None:
        """Takes it upon the caller to ask this, until `end`; or who asks already: wait for that and look again."""
        with self._mutex:
            other = self._flying.get((box, text))
            if other is None:
                self._flying[box, text] = Future()
            return other

    def end(self, box: str, text: str) -> None:
        """The answer is kept, or there will be none."""
        with self._mutex:
            self._flying.pop((box, text)).set_result(None)

    # -- SQLite --------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):  # SQLite has rolled back by itself when the disk is full
                self._db.execute("ROLLBACK")
            raise

    @contextlib.contextmanager
    def _in_words(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise CacheFailed(self._name, _words(error)) from error
        except (PermissionError, FileExistsError, NotADirectoryError, OSError) as error:
            if isinstance(error, CacheFailed):
                raise
            raise CacheFailed(self._name, f"cannot be used: {error.strerror or error}") from error


def _words(error: sqlite3.Error) -> str:
    said = str(error)
    for sign, words in (
        ("full", "cannot be written: the disk is full. What was answered before is kept; free space and run again"),
        (
            "readonly",
            "cannot be written: it is read-only; choose a file that can be written",
        ),
        ("unable to open", "cannot be opened: does its directory exist, and may this user write there?"),
        ("locked", "is being written by another process for longer than a write takes; run again when that is done"),
        ("not a database", "is no cache of answers; choose another file"),
        ("malformed", "is damaged; move it away (its answers will be paid for again) or bring back a copy"),
    ):
        if sign in said:
            return words
    return f"cannot be used: {said}"


def _checksum(box: str, item: str, identity: str, value: str, counts: Sequence[int | float]) -> str:
    return digest_of([box, item, identity, value, *counts])
