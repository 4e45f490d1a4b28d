"""Reading a registry's directory beside whoever writes it, for programs that end; and rows of its table as entries."""

import contextlib
import hashlib
import json
import sqlite3
from pathlib import Path
from typing import Any

from metasepia.errors import CorruptArtefact, UnknownName
from metasepia.registry.entries import SHARED, Artefact, Kind

MAX_NAMES_IN_AN_ERROR = 50
COLUMNS = "kind, digest, name, owner, created, num_bytes, card, deleted"


def read_entry(root: Path, kind: Kind, name: str, owner: str) -> Artefact:
    """What a name, or a digest, stands for, read beside whoever writes this directory. For programs that end.

    Raises UnknownName as `Registry.resolve` does.
    """
    catalogue = root.expanduser().resolve() / "catalogue.sqlite"
    if not catalogue.is_file():
        raise UnknownName(kind, name, ())
    with contextlib.closing(sqlite3.connect(f"{catalogue.as_uri()}?mode=ro", uri=True, timeout=5.0)) as db:
        db.row_factory = sqlite3.Row
        row = db.execute(
            f"SELECT {COLUMNS} FROM entries WHERE kind=? AND (name=? OR digest=?) AND owner IN (?, ?) "
            "AND deleted IS NULL ORDER BY owner = ? DESC, name = ? DESC, id LIMIT 1",
            (kind, name, name, owner, SHARED, owner, name),
        ).fetchone()
        if row is None:
            known = (
                "SELECT DISTINCT name FROM entries WHERE kind=? AND owner IN (?, ?) AND deleted IS NULL ORDER BY name"
            )
            rows = db.execute(f"{known} LIMIT ?", (kind, owner, SHARED, MAX_NAMES_IN_AN_ERROR)).fetchall()
            raise UnknownName(kind, name, tuple(one["name"] for one in rows))
    return artefact_of(row)


def read_blob(root: Path, digest: str) -> bytes:
    """The bytes under a digest, deleted ones included, read beside whoever writes this directory. For audits.

    Raises UnknownName, and CorruptArtefact as `Registry.get` does.
    """
    catalogue = root.expanduser().resolve() / "catalogue.sqlite"
    if not catalogue.is_file():
        raise UnknownName("artefact", digest, ())
    with contextlib.closing(sqlite3.connect(f"{catalogue.as_uri()}?mode=ro", uri=True, timeout=5.0)) as db:
        row = db.execute("SELECT sha256 FROM entries WHERE digest=? LIMIT 1", (digest,)).fetchone()
    if row is None:
        raise UnknownName("artefact", digest, ())
    path = catalogue.parent / "blobs" / row[0]
    blob = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(blob).hexdigest() != row[0]:
        raise CorruptArtefact(f"artefact {digest}", "its blob is missing or has changed since it was stored")
    return blob


def artefact_of(row: Any) -> Artefact:
    """The entry in a row of COLUMNS."""
    return Artefact(
        kind=row["kind"],
        digest=row["digest"],
        name=row["name"],
        owner=row["owner"],
        created_unix_s=row["created"],
        num_bytes=row["num_bytes"],
        card=json.loads(row["card"]),
        deleted_unix_s=row["deleted"],
    )
