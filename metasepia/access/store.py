"""The keys of a registry's directory, and the ledger of what they have used. One writer: the process that holds the
directory's lock.

On disk: `keys.sqlite` beside the catalogue. A key made or revoked is durable when the call returns, whatever dies then
(WAL, synchronous FULL). What gateways report is committed without waiting for the disk: it survives the death of every
process, and of what came in the last seconds before the power failed some may be missing. Standard library only.
"""

import contextlib
import json
import sqlite3
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from metasepia.access.clock import SteadyClock
from metasepia.access.keys import Changes, HeldKey, Key, NewKey, Report, Spent, Total, Usage
from metasepia.errors import CorruptArtefact, InvalidRequest, Locked, UnknownName
from metasepia.local_disk import failures_in_words, sync_directory

MINUTE_S, DAY_S, MINUTES_A_DAY = 60, 86_400, 1440
MAX_KEYS = 10**6
TOLD_KEYS = 20
"""Of those made last, to whoever names one that there is not; their ids open nothing."""
FORGET_GATEWAY_S = 86_400.0
CLOCK_EVERY_S = 60.0

_SCHEMA_VERSION = 1
_SCHEMA = """
CREATE TABLE writer (id INTEGER PRIMARY KEY CHECK (id = 1), epoch INTEGER NOT NULL, clock REAL NOT NULL) STRICT;
INSERT INTO writer VALUES (1, 0, 0.0);
CREATE TABLE keys (
    id TEXT PRIMARY KEY, sha256 BLOB NOT NULL, tenant TEXT NOT NULL, label TEXT NOT NULL, scopes TEXT NOT NULL,
    requests_per_minute INTEGER, tokens_per_day INTEGER,
    created REAL NOT NULL, expires REAL, revoked REAL
) STRICT;
CREATE INDEX keys_expire ON keys (expires) WHERE expires IS NOT NULL;
CREATE TABLE ledger (
    day INTEGER NOT NULL, key TEXT NOT NULL, tenant TEXT NOT NULL,
    requests INTEGER NOT NULL, prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL,
    PRIMARY KEY (day, key)
) STRICT, WITHOUT ROWID;
CREATE INDEX ledger_by_tenant ON ledger (tenant, day);
CREATE TABLE minutes (key TEXT PRIMARY KEY, minute INTEGER NOT NULL, requests INTEGER NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE gateways (id TEXT PRIMARY KEY, number INTEGER NOT NULL, seen REAL NOT NULL) STRICT, WITHOUT ROWID;
"""


class KeyStore:
    """Keys and ledger of one directory. Thread-safe.

    Any method raises Unavailable, with the reason, when the disk is full or fails; a write raises Locked when another
    writer has begun a later epoch.
    """

    def __init__(
        self,
        root: Path,
        epoch: int,
        *,
        max_keys: int = MAX_KEYS,
        wall: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """`epoch`: of the `Registry` that holds the directory's lock. Raises CorruptArtefact for a damaged file."""
        self._path, self._epoch, self._max_keys = root / "keys.sqlite", epoch, max_keys
        self._mutex = threading.RLock()
        with failures_in_words(self._path):
            self._db = self._open()
            self._ledger_db = self._connect("NORMAL")
            sync_directory(root)
            with self._write(self._db) as db:
                db.execute("UPDATE writer SET epoch=?", (epoch,))
                self._marked_unix_s = float(db.execute("SELECT clock FROM writer").fetchone()[0])
            self._clock = SteadyClock(self._marked_unix_s, wall, monotonic)
            self._keys = {row["id"]: _held(row) for row in self._db.execute("SELECT * FROM keys")}
            self._totals: OrderedDict[str, tuple[int, Total]] = OrderedDict(
                (one.key, (0, one)) for one in self._stored_totals()
            )
        self._changed: OrderedDict[str, int] = OrderedDict()
        self._num_changes = self._num_reports = 0

    # -- keys ----------------------------------------------------------------------------------------------------------

    def now(self) -> float:
        """Unix seconds, never earlier than before; see `SteadyClock`. What was said is kept where a key has expired
        since the last time, so that another process, with a clock that went back, goes on behind it.
        """
        with self._mutex:
            now = self._clock.now()
            crossed = self._db.execute(
                "SELECT 1 FROM keys WHERE expires > ? AND expires <= ? LIMIT 1", (self._marked_unix_s, now)
            ).fetchone()
            if crossed or now > self._marked_unix_s + CLOCK_EVERY_S:
                with self._write(self._db if crossed else self._ledger_db) as db:
                    db.execute("UPDATE writer SET clock=?", (now,))
                self._marked_unix_s = now
            return now

    def create(self, new: NewKey) -> Key:
        """Keeps a key; the same one again changes nothing. Raises InvalidRequest where there is no room for another:
        dead ones make room, the oldest first.
        """
        with self._mutex:
            known = self._keys.get(new.id)
            if known is not None:
                if known.sha256 != new.sha256:
                    raise InvalidRequest("id", "another key has this id")
                return known.key
            now = self.now()
            self._make_room(now)
            key = Key(
                id=new.id,
                tenant=new.tenant,
                scopes=new.scopes,
                label=new.label,
                requests_per_minute=new.requests_per_minute,
                tokens_per_day=new.tokens_per_day,
                created_unix_s=now,
                expires_unix_s=None if new.lifetime_s is None else now + new.lifetime_s,
            )
            with self._write(self._db) as db:
                db.execute(
                    "INSERT INTO keys VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, NULL)",
                    (
                        *(key.id, new.sha256, key.tenant, key.label, json.dumps(key.scopes)),
                        *(key.requests_per_minute, key.tokens_per_day, key.created_unix_s, key.expires_unix_s),
                    ),
                )
            self._note(HeldKey(key=key, sha256=new.sha256))
            return key

    def revoke(self, id_: str) -> Key:
        """Ends a key for good; a second time the same answer. Raises UnknownName."""
        with self._mutex:
            held = self._find(id_)
            if held.key.revoked_unix_s is not None:
                return held.key
            now = self.now()
            with self._write(self._db) as db:
                db.execute("UPDATE keys SET revoked=? WHERE id=?", (now, id_))
                row = db.execute("SELECT * FROM keys WHERE id=?", (id_,)).fetchone()
            self._note(_held(row))
            return self._keys[id_].key

    def get(self, id_: str) -> Key:
        """Raises UnknownName."""
        with self._mutex:
            return self._find(id_).key

    def page(self, *, after: str = "", limit: int = 1000) -> tuple[Key, ...]:
        """In order of id, from the one behind `after` on; dead ones too."""
        with self._mutex, failures_in_words(self._path):
            rows = self._db.execute("SELECT * FROM keys WHERE id > ? ORDER BY id LIMIT ?", (after, limit)).fetchall()
        return tuple(_held(row).key for row in rows)

    # -- gateways ------------------------------------------------------------------------------------------------------

    def exchange(self, report: Report, since: tuple[int, int, int] | None) -> Changes:
        """Takes what a gateway's keys have used and tells what changed since a revision (None: tells everything)."""
        with self._mutex:
            now = self.now()
            if report.spent:
                self._absorb(report, now)
            revision = (self._epoch, self._num_changes, self._num_reports)
            whole = since is None or since[0] != self._epoch or since[1] > self._num_changes
            if whole:
                keys, totals = tuple(self._keys.values()), [one for _, one in self._totals.values()]
            else:
                assert since is not None
                keys = tuple(self._keys[id_] for id_ in _newer(self._changed, since[1]) if id_ in self._keys)
                totals = []
                for number, total in reversed(self._totals.values()):
                    if number <= since[2]:
                        break
                    totals.append(total)
            return Changes(revision=revision, now_unix_s=now, whole=whole, keys=keys, totals=tuple(totals))

    def usage(self, first_day: int, last_day: int, *, tenant: str | None, limit: int) -> tuple[Usage, ...]:
        """Lines of the ledger, a day and key each, newest first, the keys of a day by id; up to `limit`."""
        with self._mutex, failures_in_words(self._path):
            rows = self._ledger_db.execute(
                "SELECT * FROM ledger WHERE day BETWEEN ? AND ? AND (? IS NULL OR tenant = ?) "
                "ORDER BY day DESC, key LIMIT ?",
                (first_day, last_day, tenant, tenant, limit),
            ).fetchall()
        return tuple(Usage(**dict(row)) for row in rows)

    def close(self) -> None:
        with self._mutex:
            self._db.close()
            self._ledger_db.close()

    # -- inside --------------------------------------------------------------------------------------------------------

    def _absorb(self, report: Report, now: float) -> None:
        with self._write(self._ledger_db) as db:
            seen = db.execute("SELECT number FROM gateways WHERE id=?", (report.gateway,)).fetchone()
            if seen is not None and seen["number"] >= report.number:
                return  # it was counted, and the gateway was not told so
            db.execute("DELETE FROM gateways WHERE seen < ?", (now - FORGET_GATEWAY_S,))
            db.execute("INSERT OR REPLACE INTO gateways VALUES (?, ?, ?)", (report.gateway, report.number, now))
            known = [one for one in report.spent if one.key in self._keys]
            for one in known:
                tokens = (one.requests, one.prompt_tokens, one.completion_tokens)
                db.execute(
                    "INSERT INTO ledger VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (day, key) DO UPDATE SET "
                    "requests = requests + ?, prompt_tokens = prompt_tokens + ?, "
                    "completion_tokens = completion_tokens + ?",
                    (one.minute // MINUTES_A_DAY, one.key, self._keys[one.key].key.tenant, *tokens, *tokens),
                )
                db.execute(
                    "INSERT INTO minutes VALUES (?1, ?2, ?3) ON CONFLICT (key) DO UPDATE SET "
                    "requests = CASE WHEN minute = ?2 THEN requests + ?3 WHEN minute < ?2 THEN ?3 ELSE requests END, "
                    "minute = max(minute, ?2)",
                    (one.key, one.minute, one.requests),
                )
        self._num_reports += 1
        for one in known:
            before = self._totals.get(one.key)
            self._totals[one.key] = (self._num_reports, _added(None if before is None else before[1], one))
            self._totals.move_to_end(one.key)

    def _stored_totals(self) -> list[Total]:
        """Of the latest minute and day of each key, as far as they may still count."""
        today = int(self._clock.now()) // DAY_S
        rows = self._db.execute(
            "SELECT minutes.key, minute, minutes.requests, max(day) AS day, "
            "prompt_tokens + completion_tokens AS tokens "
            "FROM minutes JOIN ledger ON ledger.key = minutes.key WHERE day >= ? GROUP BY minutes.key",
            (today - 1,),
        ).fetchall()
        return [Total(**dict(row)) for row in rows]

    def _make_room(self, now: float) -> None:
        if len(self._keys) < self._max_keys:
            return
        dead = [one.key for one in self._keys.values() if one.key.status(now) != "active"]
        if not dead:
            why = f"{len(self._keys)} keys are in use, which is registry.max_keys; revoke some first"
            raise InvalidRequest(None, why)
        oldest = min(dead, key=lambda one: one.created_unix_s)
        with self._write(self._db) as db:
            db.execute("DELETE FROM keys WHERE id=?", (oldest.id,))
        for kept in (self._keys, self._changed, self._totals):
            kept.pop(oldest.id, None)

    def _note(self, held: HeldKey) -> None:
        """Remembers a committed change, before it is acknowledged."""
        self._num_changes += 1
        self._keys[held.key.id] = held
        self._changed[held.key.id] = self._num_changes
        self._changed.move_to_end(held.key.id)

    def _find(self, id_: str) -> HeldKey:
        held = self._keys.get(id_)
        if held is None:
            raise UnknownName("key", id_[:80], tuple(list(self._keys)[-TOLD_KEYS:]))
        return held

    @contextlib.contextmanager
    def _write(self, db: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
        """One transaction, refused with Locked when another writer has begun a later epoch."""
        with self._mutex, failures_in_words(self._path):
            db.execute("BEGIN IMMEDIATE")
            try:
                if db.execute("SELECT epoch FROM writer").fetchone()[0] > self._epoch:
                    raise Locked(str(self._path.parent), "a later writer")
                yield db
                db.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    db.execute("ROLLBACK")
                raise

    def _open(self) -> sqlite3.Connection:
        db = self._connect("FULL")
        try:
            db.execute("PRAGMA journal_mode=WAL")
            problem = db.execute("PRAGMA quick_check(1)").fetchone()[0]
            if problem != "ok":
                raise CorruptArtefact(str(self._path), f"{problem}; restore it from a copy")
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version not in (0, _SCHEMA_VERSION):
                raise CorruptArtefact(
                    str(self._path), f"its version is {version}, this program reads {_SCHEMA_VERSION}"
                )
            if version == 0:
                db.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} PRAGMA user_version={_SCHEMA_VERSION}; COMMIT;")
        except BaseException:
            db.close()
            raise
        return db

    def _connect(self, synchronous: str) -> sqlite3.Connection:
        db = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False, timeout=5.0)
        db.row_factory = sqlite3.Row
        db.execute(f"PRAGMA synchronous={synchronous}")
        return db


def _held(row: Any) -> HeldKey:
    key = Key(
        id=row["id"],
        tenant=row["tenant"],
        scopes=tuple(json.loads(row["scopes"])),
        label=row["label"],
        requests_per_minute=row["requests_per_minute"],
        tokens_per_day=row["tokens_per_day"],
        created_unix_s=row["created"],
        expires_unix_s=row["expires"],
        revoked_unix_s=row["revoked"],
    )
    return HeldKey(key=key, sha256=row["sha256"])


def _newer(changed: "OrderedDict[str, int]", than: int) -> list[str]:
    found: list[str] = []
    for id_ in reversed(changed):
        if changed[id_] <= than:
            break
        found.append(id_)
    return found


def _added(total: Total | None, spent: Spent) -> Total:
    """A total with what was used in its windows, or in later ones, which then are its windows."""
    day, tokens = spent.minute // MINUTES_A_DAY, spent.prompt_tokens + spent.completion_tokens
    minutes, days = [(spent.minute, spent.requests)], [(day, tokens)]
    if total is not None:
        minutes.append((total.minute, total.requests))
        days.append((total.day, total.tokens))
    last_minute, last_day = max(minutes)[0], max(days)[0]
    return Total(
        key=spent.key,
        minute=last_minute,
        requests=sum(number for minute, number in minutes if minute == last_minute),
        day=last_day,
        tokens=sum(number for day, number in days if day == last_day),
    )
