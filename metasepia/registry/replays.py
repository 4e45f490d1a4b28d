"""Answers by the Idempotency-Key of their requests, kept for whoever asks again; one writer, beside the catalogue.

Whoever begins a request *claims* its key for a while, and renews the claim as long as the request runs; claims are in
memory, since those of a gateway that died have to end. A finished answer is *kept*: durable when `keep` returns where
the request changed something, and else surviving the death of every process but not of the machine. On disk:
`replays.sqlite` (WAL), bounded in bytes and age; beyond its bytes the tenant that takes most of them loses its oldest
answers first. Standard library only.
"""

import json
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from metasepia.errors import CorruptArtefact, Overloaded
from metasepia.local_disk import failures_in_words, sync_directory

MAX_CLAIMS = 100_000
MAX_PURGED = 1000
"""Answers that one call takes away for their age."""
_SCHEMA_VERSION = 1
_SCHEMA = """
CREATE TABLE answers (
    id INTEGER PRIMARY KEY, tenant TEXT NOT NULL, key TEXT NOT NULL,
    digest TEXT NOT NULL, status INTEGER NOT NULL, headers TEXT NOT NULL, body BLOB NOT NULL,
    kept REAL NOT NULL, num_bytes INTEGER NOT NULL,
    UNIQUE (tenant, key)
) STRICT;
CREATE INDEX answers_by_age ON answers (kept);
"""
_ROW_BYTES = 256
"""What an answer takes beside its body and headers, about."""


@dataclass(frozen=True, kw_only=True)
class KeptAnswer:
    """One finished answer, and the digest of the request that it answers."""

    digest: str
    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes

    @property
    def num_bytes(self) -> int:
        return _ROW_BYTES + len(self.body) + sum(len(name) + len(value) for name, value in self.headers)


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What became of a key that was claimed: taken, or answered before, or in another's hands."""

    answer: KeptAnswer | None = None
    busy_s: float = 0.0
    """Above 0: another request has it, for so long yet unless it renews."""

    @property
    def is_taken(self) -> bool:
        return self.answer is None and not self.busy_s


@dataclass(frozen=True, kw_only=True)
class _Lease:
    holder: str
    until_s: float


class ReplayStore:
    """Claims and kept answers of all tenants. Thread-safe.

    Opening raises CorruptArtefact for a damaged file; any method raises Unavailable, with the reason, when the disk is
    full or fails.
    """

    def __init__(
        self,
        root: Path,
        *,
        max_bytes: int,
        keep_s: float,
        wall: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """`root`: a registry's directory whose lock this process holds."""
        self._path, self._max_bytes, self._keep_s = root / "replays.sqlite", max_bytes, keep_s
        self._wall, self._monotonic = wall, monotonic
        self._mutex = threading.RLock()
        self._leases: dict[tuple[str, str], _Lease] = {}
        with failures_in_words(self._path):
            self._db = self._open()
            sync_directory(root)
            rows = self._db.execute("SELECT tenant, SUM(num_bytes) FROM answers GROUP BY tenant")
            self._bytes: dict[str, int] = {row[0]: row[1] for row in rows}

    @property
    def num_bytes(self) -> int:
        with self._mutex:
            return sum(self._bytes.values())

    def claim(self, tenant: str, key: str, holder: str, lease_s: float) -> Claim:
        """Takes the key for `holder`, for `lease_s` seconds, unless it is answered or another has it; a holder's own
        claim is renewed. Raises Overloaded where too many are held.
        """
        with self._mutex, failures_in_words(self._path):
            now = self._monotonic()
            lease = self._leases.get((tenant, key))
            if lease is not None and lease.holder != holder and lease.until_s > now:
                return Claim(busy_s=lease.until_s - now)
            row = self._db.execute(
                "SELECT digest, status, headers, body FROM answers WHERE tenant=? AND key=? AND kept>?",
                (tenant, key, self._wall() - self._keep_s),
            ).fetchone()
            if row is not None:
                headers = tuple((name, value) for name, value in json.loads(row[2]))
                return Claim(answer=KeptAnswer(digest=row[0], status=row[1], headers=headers, body=row[3]))
            if lease is None and len(self._leases) >= MAX_CLAIMS:
                self._leases = {one: held for one, held in self._leases.items() if held.until_s > now}
                if len(self._leases) >= MAX_CLAIMS:
                    raise Overloaded("the table of requests with an Idempotency-Key", 1.0)
            self._leases[tenant, key] = _Lease(holder=holder, until_s=now + lease_s)
            return Claim()

    def keep(self, tenant: str, key: str, holder: str, answer: KeptAnswer, durable: bool) -> bool:
        """Keeps an answer and ends the claim. False where the claim is another's by now, or the answer is larger than
        everything that may be kept: nothing is stored then.
        """
        with self._mutex, failures_in_words(self._path):
            lease = self._leases.get((tenant, key))
            if lease is not None and lease.holder != holder:
                return False
            try:
                if answer.num_bytes > self._max_bytes:
                    return False
                self._store(tenant, key, answer, durable)
            finally:
                self._leases.pop((tenant, key), None)
            return True

    def let_go(self, tenant: str, key: str, holder: str) -> None:
        """Ends a claim without an answer."""
        with self._mutex:
            lease = self._leases.get((tenant, key))
            if lease is not None and lease.holder == holder:
                del self._leases[tenant, key]

    def close(self) -> None:
        with self._mutex:
            self._db.close()

    def _store(self, tenant: str, key: str, answer: KeptAnswer, durable: bool) -> None:
        db, now = self._db, self._wall()
        db.execute(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
        freed: dict[str, int] = {}
        db.execute("BEGIN IMMEDIATE")
        try:
            self._drop(freed, "tenant=? AND key=?", (tenant, key), 1)
            # A clock that went back must not keep answers for ever.
            self._drop(freed, "kept<=? OR kept>?", (now - self._keep_s, now + self._keep_s), MAX_PURGED)
            while (over := self._after(freed, tenant, answer.num_bytes)) is not None:
                self._drop(freed, "tenant=?", (over,), 1)
            db.execute(
                "INSERT INTO answers (tenant, key, digest, status, headers, body, kept, num_bytes) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (tenant, key, answer.digest, answer.status, json.dumps(answer.headers), answer.body, now,
                 answer.num_bytes),
            )  # fmt: skip
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise
        self._bytes = self._without(freed, tenant, answer.num_bytes)

    def _drop(self, freed: dict[str, int], where: str, values: tuple[object, ...], limit: int) -> None:
        """Deletes the oldest of these; adds their bytes to `freed`, by tenant."""
        rows = self._db.execute(
            f"DELETE FROM answers WHERE id IN (SELECT id FROM answers WHERE {where} ORDER BY kept, id LIMIT {limit}) "
            "RETURNING tenant, num_bytes",
            values,
        ).fetchall()
        for tenant, num_bytes in rows:
            freed[tenant] = freed.get(tenant, 0) + num_bytes

    def _without(self, freed: Mapping[str, int], tenant: str, more: int) -> dict[str, int]:
        held = {one: self._bytes.get(one, 0) - freed.get(one, 0) for one in {*self._bytes, tenant}}
        held[tenant] += more
        return {one: num_bytes for one, num_bytes in held.items() if num_bytes > 0}

    def _after(self, freed: Mapping[str, int], tenant: str, more: int) -> str | None:
        """Who has to lose an answer so that `more` bytes of `tenant` fit; None: they fit."""
        held = self._without(freed, tenant, more)
        if sum(held.values()) <= self._max_bytes:
            return None
        held[tenant] -= more  # what is not stored yet cannot be dropped
        return max(held, key=lambda one: (held[one], one))

    def _open(self) -> sqlite3.Connection:
        db = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False, timeout=5.0)
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if version not in (0, _SCHEMA_VERSION):
            problem = f"it is of version {version}, and this program writes {_SCHEMA_VERSION}"
            raise CorruptArtefact(str(self._path), problem)
        db.execute("PRAGMA journal_mode=WAL")
        db.execute(f"PRAGMA journal_size_limit={16 << 20}")
        if version == 0:
            db.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version={_SCHEMA_VERSION}; COMMIT;")
        return db
