"""The registry as many read it while others write: what changed, what is taken, and that nobody waits for the disk."""

import threading
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from metasepia.errors import NameTaken, UnknownName
from metasepia.registry.catalogue import Registry
from metasepia.registry.entries import SHARED, Artefact


def digest_for(blob: bytes) -> str:
    return sha256(blob).hexdigest()


def put(registry: Registry, kind: Any, blob: bytes = b"1", *, name: str, owner: str = "local", **more: Any) -> Artefact:
    return registry.put(kind, blob, digest=digest_for(blob), name=name, owner=owner, **more)


@pytest.fixture
def registry(tmp_path: Path):
    with Registry(tmp_path / "registry") as registry:
        yield registry


def test_a_keeper_of_a_copy_learns_every_name_that_changed_and_nothing_else(registry: Registry):
    put(registry, "expert", name="old")
    first = registry.changes("expert", "local", None)
    assert first.names is None
    put(registry, "expert", name="mine")
    put(registry, "expert", b"2", name="mine")
    put(registry, "context", b"3", name="other-kind")
    put(registry, "expert", b"4", name="theirs", owner="somebody")
    put(registry, "expert", b"5", name="gone", owner=SHARED)
    registry.delete("expert", "gone", SHARED)
    seen = registry.changes("expert", "local", first.revision)
    assert seen.names == (("local", "mine"), (SHARED, "gone"))
    assert [(one.name, one.digest) for one in seen.live] == [("mine", digest_for(b"2"))]
    assert registry.changes("expert", "local", seen.revision).names == ()


def test_a_keeper_that_is_too_far_behind_or_knows_another_writer_lists_again(tmp_path: Path, monkeypatch: Any):
    monkeypatch.setattr("metasepia.registry.catalogue.MAX_CHANGES", 2)
    with Registry(tmp_path) as one:
        since = one.changes("expert", "local", None).revision
        for index in range(2):
            put(one, "expert", bytes([index]), name=f"e{index}")
        assert len(one.changes("expert", "local", since).names or ()) == 2
        put(one, "expert", b"x", name="e2")
        assert one.changes("expert", "local", since).names is None
        since = one.changes("expert", "local", None).revision
    with Registry(tmp_path) as two:
        assert two.changes("expert", "local", since).names is None


def test_a_name_in_use_is_taken_unless_it_may_be_replaced_or_is_the_same(registry: Registry):
    put(registry, "expert", b"1", name="x")
    put(registry, "expert", b"1", name="x", replace=False)
    with pytest.raises(NameTaken, match="the expert 'x' exists"):
        put(registry, "expert", b"2", name="x", replace=False)
    assert registry.resolve("expert", "x", "local").digest == digest_for(b"1")


def test_reads_do_not_wait_for_a_write_that_waits_for_the_disk(registry: Registry, monkeypatch: pytest.MonkeyPatch):
    put(registry, "expert", b"1", name="x")
    entered, go_on = threading.Event(), threading.Event()
    store = registry._store

    def slow(blob: bytes, sha256: str) -> None:
        entered.set()
        assert go_on.wait(10)
        store(blob, sha256)

    monkeypatch.setattr(registry, "_store", slow)
    writing = threading.Thread(target=lambda: put(registry, "expert", b"2", name="x"))
    writing.start()
    assert entered.wait(10)
    try:
        assert registry.resolve("expert", "x", "local").digest == digest_for(b"1")
        assert registry.get(digest_for(b"1"), "local") == b"1"
        assert len(registry.list("expert", "local")) == 1
    finally:
        go_on.set()
        writing.join()
    assert registry.resolve("expert", "x", "local").digest == digest_for(b"2")


@pytest.mark.parametrize("ask", ["resolve", "list"])
def test_looking_up_reads_no_tombstones_of_other_names(registry: Registry, ask: str):
    """By counting steps of SQLite's machine: a scan of 2,000 tombstones would take tens of thousands."""
    with registry._write() as db:
        rows = [("expert", digest_for(b"%d" % i), "local", f"n{i}", 1.0, 2.0, 1, "0" * 64, "{}") for i in range(2000)]
        columns = "kind, digest, owner, name, created, deleted, num_bytes, sha256, card"
        db.executemany(f"INSERT INTO entries ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)
    put(registry, "expert", b"1", name="x")
    steps: list[int] = []
    registry._read_db.set_progress_handler(lambda: steps.append(100) or 0, 100)
    if ask == "resolve":
        registry.resolve("expert", "x", "local")
    else:
        assert len(registry.list("expert", "local")) == 1
    assert sum(steps) < 2000


def test_what_a_mixture_is_made_of_outlives_its_name_for_as_long_as_the_mixture(registry: Registry):
    kept, gone = put(registry, "expert", b"1", name="kept"), put(registry, "expert", b"2", name="gone")
    put(registry, "mixture", b"m", name="mixed", card={"adapter": [[kept.digest, 1.0]]})
    put(registry, "mixture", b"n", name="of-another-time", card={})
    for name in ("kept", "gone"):
        registry.delete("expert", name, "local")
    assert registry.purge(-1.0) == 1
    assert registry.get(kept.digest) == b"1"
    with pytest.raises(UnknownName):
        registry.get(gone.digest)
    registry.delete("mixture", "mixed", "local")
    assert registry.purge(-1.0) == 2
