"""The registry against crashes, second writers, full and damaged disks, and other tenants."""

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from hashlib import sha256
from pathlib import Path

import pytest

from metasepia.errors import (
    CorruptArtefact,
    InvalidRequest,
    InvalidSettings,
    Locked,
    Unavailable,
    UnknownName,
)
from metasepia.local_disk import check_local_disk
from metasepia.registry.catalogue import Registry
from metasepia.registry.reading import read_blob

ROOT = Path(__file__).parents[2]


def digest(content: str) -> str:
    return sha256(content.encode()).hexdigest()


def put(registry: Registry, name: str | None, content: str, owner: str = "ann", **more):
    return registry.put("expert", content.encode(), digest=digest(content), name=name, owner=owner, **more)


@pytest.fixture
def registry(tmp_path: Path):
    with Registry(tmp_path / "registry") as registry:
        yield registry


def test_what_was_put_is_found_by_name_and_digest_after_reopening(tmp_path: Path):
    with Registry(tmp_path) as registry:
        stored = put(registry, "maths", "z of maths", card={"seed": 3, "gain": 0.1})
    with Registry(tmp_path) as registry:
        assert registry.resolve("expert", "maths", "ann") == stored
        assert registry.resolve("expert", digest("z of maths"), "ann") == stored
        assert registry.get(stored.digest, "ann") == b"z of maths"
        assert stored.card == {"seed": 3, "gain": 0.1}


def test_an_unnamed_artefact_is_found_by_its_digest(registry: Registry):
    assert registry.resolve("expert", put(registry, None, "mixture").digest, "ann").name == digest("mixture")


def test_unknown_name_lists_the_names_of_that_kind_and_owner(registry: Registry):
    put(registry, "maths", "1")
    put(registry, "law", "2", owner="shared")
    put(registry, "secret", "3", owner="bob")
    with pytest.raises(UnknownName, match=r"no expert named 'code'; known: law, maths$"):
        registry.resolve("expert", "code", "ann")
    with pytest.raises(UnknownName, match="known: none"):
        registry.resolve("module", "maths", "ann")


def test_a_replaced_name_points_to_the_new_digest_and_the_old_blob_stays(registry: Registry):
    put(registry, "maths", "old")
    put(registry, "maths", "new")
    assert registry.resolve("expert", "maths", "ann").digest == digest("new")
    assert registry.get(digest("old"), "ann") == b"old"
    assert [entry.digest for entry in registry.list("expert", "ann", deleted=True)] == [digest("new"), digest("old")]


def test_the_same_put_twice_is_one_entry(registry: Registry):
    assert put(registry, "maths", "1") == put(registry, "maths", "1")
    assert len(registry.list(None, "ann", deleted=True)) == 1


def test_a_deleted_name_is_unknown_but_its_blob_stays(registry: Registry):
    put(registry, "maths", "1")
    registry.delete("expert", "maths", "ann")
    with pytest.raises(UnknownName, match="known: none"):
        registry.resolve("expert", "maths", "ann")
    assert registry.list("expert", "ann") == ()
    assert registry.get(digest("1"), "ann") == b"1"
    with pytest.raises(UnknownName):
        registry.delete("expert", "maths", "ann")


def test_a_repeated_delete_of_a_digest_never_takes_what_replaced_it(registry: Registry):
    put(registry, "maths", "old")
    first = registry.delete("expert", "maths", "ann", digest=digest("old"))
    put(registry, "maths", "new")
    assert registry.delete("expert", "maths", "ann", digest=digest("old")) == first
    assert registry.resolve("expert", "maths", "ann").digest == digest("new")


def test_purge_takes_old_tombstones_with_their_blobs_and_nothing_else(tmp_path: Path):
    now = [1000.0]
    with Registry(tmp_path, clock=lambda: now[0]) as registry:
        for name in ("old", "recent", "live"):
            put(registry, name, name)
        put(registry, "twin", "old", owner="bob")  # the same bytes, still named
        registry.delete("expert", "old", "ann")
        now[0] = 2000.0
        registry.delete("expert", "recent", "ann")
        assert registry.purge(older_than_s=500.0) == 1
        with pytest.raises(UnknownName):
            registry.get(digest("old"), "ann")
        assert registry.get(digest("old"), "bob") == b"old"
        registry.delete("expert", "twin", "bob")
        now[0] = 2600.0
        assert registry.purge(older_than_s=500.0) == 2
        assert [path.name for path in (tmp_path / "blobs").iterdir()] == [digest("live")]


def test_a_blob_that_a_crash_left_without_an_entry_is_purged_at_the_same_age(registry: Registry):
    orphan = registry.root / "blobs" / digest("orphan")
    orphan.write_bytes(b"orphan")
    registry.purge(older_than_s=500.0)
    assert orphan.exists()
    os.utime(orphan, (0, time.time() - 1000))
    registry.purge(older_than_s=500.0)
    assert not orphan.exists()


def test_one_owner_cannot_see_another_owners_names_or_digests(registry: Registry):
    put(registry, "maths", "bob's", owner="bob")
    assert registry.list(None, "ann", deleted=True) == ()
    for attempt in (
        lambda: registry.resolve("expert", "maths", "ann"),
        lambda: registry.resolve("expert", digest("bob's"), "ann"),
        lambda: registry.get(digest("bob's"), "ann"),
        lambda: registry.delete("expert", "maths", "ann"),
    ):
        with pytest.raises(UnknownName, match="known: none"):
            attempt()
    assert registry.get(digest("bob's")) == b"bob's"  # the system itself


def test_wrong_bytes_under_a_digest_reach_only_the_owner_who_put_them(registry: Registry):
    registry.put("expert", b"forged", digest=digest("right"), name="x", owner="mallory")
    put(registry, "x", "right")
    assert registry.get(digest("right"), "ann") == b"right"


def test_shared_entries_are_seen_by_all_and_hidden_by_an_owners_own(registry: Registry):
    put(registry, "maths", "shipped", owner="shared")
    assert registry.get(registry.resolve("expert", "maths", "ann").digest, "ann") == b"shipped"
    put(registry, "maths", "mine")
    assert registry.resolve("expert", "maths", "ann").digest == digest("mine")
    assert registry.resolve("expert", "maths", "bob").digest == digest("shipped")
    with pytest.raises(UnknownName):
        registry.delete("expert", "maths", "bob")


@pytest.mark.parametrize(
    "name",
    ["", "auto", "ctx-1", "mix@0", "Maths", "-a", ".", "../x", "a/b", "a b", "a\n", "é", "a" * 65, "0" * 64],
)
def test_names_that_are_reserved_or_misspelt_are_refused(registry: Registry, name: str):
    with pytest.raises(InvalidRequest, match="name"):
        put(registry, name, "1")
    assert registry.list(None, "ann") == ()


def test_a_card_that_json_cannot_hold_is_refused(registry: Registry):
    for card in ({"loss": float("nan")}, {"model": object()}, {"text": "\ud800"}, {"log": "x" * 2_000_000}):
        with pytest.raises(InvalidRequest, match="card"):
            put(registry, "maths", "1", card=card)


def test_listing_goes_on_behind_a_name(registry: Registry):
    for i in range(5):
        put(registry, f"e{i}", str(i))
    first = registry.list("expert", "ann", limit=3)
    rest = registry.list("expert", "ann", after=first[-1].name)
    assert [entry.name for entry in first + rest] == ["e0", "e1", "e2", "e3", "e4"]


def test_changed_or_missing_bytes_are_noticed_and_mended_by_another_put(registry: Registry):
    put(registry, "maths", "right")
    blob = registry.root / "blobs" / digest("right")
    for damage in (lambda: blob.write_bytes(b"wrong"), blob.unlink):
        damage()
        with pytest.raises(CorruptArtefact, match="put it again"):
            registry.get(digest("right"), "ann")
        put(registry, "maths", "right")
        assert registry.get(digest("right"), "ann") == b"right"


def test_a_second_writer_is_told_who_holds_the_registry(registry: Registry):
    program = "from pathlib import Path; from metasepia.registry.catalogue import Registry; "
    program += f"Registry(Path({str(registry.root)!r}))"
    second = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert f"Locked: {registry.root} is held by process {os.getpid()} on {os.uname().nodename}" in second.stderr
    with pytest.raises(Locked, match=f"process {os.getpid()} "):
        Registry(registry.root, lock_timeout_s=0.1)


def test_an_old_writer_that_was_taken_over_can_read_but_not_write(registry: Registry):
    put(registry, "maths", "1")
    (registry.root / "lock").unlink()  # the lock no longer keeps the second one out
    with Registry(registry.root) as successor:
        put(successor, "law", "2")
        for write in (
            lambda: put(registry, "code", "3"),
            lambda: registry.delete("expert", "maths", "ann"),
            lambda: registry.purge(0.0),
        ):
            with pytest.raises(Locked, match="is held by process"):
                write()
        assert not (registry.root / "blobs" / digest("3")).exists()
        assert [entry.name for entry in registry.list("expert", "ann")] == ["law", "maths"]


def test_a_closed_registry_is_free_for_the_next_writer(tmp_path: Path):
    with Registry(tmp_path) as first:
        epoch = first.epoch
    with Registry(tmp_path) as second:
        assert second.epoch == epoch + 1


def test_acknowledged_puts_survive_sigkill_at_any_time(tmp_path: Path):
    program = f"""
        import sys
        from hashlib import sha256
        from pathlib import Path
        from metasepia.registry.catalogue import Registry
        registry = Registry(Path({str(tmp_path)!r}))
        for i in range(int(sys.argv[1]), 10**6):
            content = str(i).encode() * 1000
            registry.put("expert", content, digest=sha256(content).hexdigest(), name=f"e{{i % 7}}", owner="ann")
            print(i, flush=True)
    """
    random_time = random.Random(5)
    acknowledged = -1
    for _ in range(6):
        command = [sys.executable, "-c", textwrap.dedent(program), str(acknowledged + 1)]
        writer = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        assert int(writer.stdout.readline()) == acknowledged + 1
        time.sleep(random_time.uniform(0.0, 0.15))
        writer.send_signal(signal.SIGKILL)
        acknowledged = int((writer.stdout.read().split() or [acknowledged + 1])[-1])
        writer.wait()
        in_doubt = str(acknowledged + 1).encode() * 1000  # may be stored, its acknowledgement lost in the kill
        with Registry(tmp_path) as registry:
            for i in range(max(0, acknowledged - 6), acknowledged + 1):
                content = str(i).encode() * 1000
                named = registry.get(registry.resolve("expert", f"e{i % 7}", "ann").digest)
                assert named == content or (named == in_doubt and i % 7 == (acknowledged + 1) % 7)
                assert registry.get(sha256(content).hexdigest(), "ann") == content
            acknowledged += sha256(in_doubt).hexdigest() in {e.digest for e in registry.list("expert", "ann")}


def test_a_crash_at_any_line_of_put_leaves_the_old_entry_or_the_new_one_whole(tmp_path: Path):
    """A forked child is killed at its n-th executed line of the registry, for every n; the parent then opens it."""
    program = f"""
        import os, sys
        from hashlib import sha256
        from pathlib import Path
        from metasepia.registry import catalogue as module
        from metasepia.registry.catalogue import Registry
        root = Path({str(tmp_path)!r})
        of = lambda content: sha256(content).hexdigest()

        def put_and_die(n, content):
            left = n
            def trace(frame, event, _):
                nonlocal left
                if frame.f_code.co_filename not in (module.__file__, module.check_local_disk.__code__.co_filename):
                    return None
                if event == "line":
                    left -= 1
                    if left == 0:
                        os.kill(os.getpid(), 9)
                return trace
            registry = Registry(root)
            sys.settrace(trace)
            registry.put("expert", content, digest=of(content), name="maths", owner="ann")
            os.write(acknowledge, b"x")

        with Registry(root) as registry:
            registry.put("expert", b"0", digest=of(b"0"), name="maths", owner="ann")
        now, outcomes = b"0", []
        for n in range(1, 500):
            new = str(n).encode()
            told, acknowledge = os.pipe()
            child = os.fork()
            if child == 0:
                os.close(told)
                put_and_die(n, new)
                os._exit(0)
            os.close(acknowledge)
            acknowledged = os.read(told, 1) == b"x"
            os.close(told)
            _, status = os.waitpid(child, 0)
            with Registry(root) as registry:
                entry = registry.resolve("expert", "maths", "ann")
                blob = registry.get(entry.digest)
                assert entry.digest == of(blob), (n, entry)
                assert blob in (now, new) and (blob == new or not acknowledged), (n, blob, now, new)
                assert all(registry.get(e.digest) for e in registry.list(None, "ann", deleted=True))
                assert not list(root.glob("blobs/*.part"))
            outcomes.append((blob == new, acknowledged))
            now = blob
            if os.WIFEXITED(status):
                break
        assert len(outcomes) > 30 and outcomes[0] == (False, False) and outcomes[-1] == (True, True), outcomes
        assert (True, False) in outcomes, "no crash fell between commit and acknowledgement"
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_puts_replaces_and_deletes_of_several_threads_survive_sigkill_at_random_moments(tmp_path: Path):
    """A forked writer is killed, 24 times; the next finds all that was acknowledged and one more change a thread."""
    program = f"""
        import os, random, signal, sys, threading, time
        from hashlib import sha256
        from pathlib import Path
        from metasepia.registry.catalogue import Registry
        root, THREADS, NAMES = Path({str(tmp_path)!r}), 3, 3

        def change(thread, i):
            # The i-th change of a thread, a function of both: (name, content), or (name, None) for a delete.
            draw = random.Random(f"{{thread}} {{i}}")
            name = f"t{{thread}}-{{draw.randrange(NAMES)}}"
            if draw.random() < 0.3:
                return name, None
            return name, draw.randbytes(draw.choice((100, 30_000, 300_000)))

        def write(registry, thread, i, tell):
            while True:
                name, content = change(thread, i)
                if content is not None:
                    registry.put("expert", content, digest=sha256(content).hexdigest(), name=name, owner="ann")
                elif any(e.name == name for e in registry.list("expert", "ann")):
                    registry.delete("expert", name, "ann")
                i += 1
                os.write(tell, bytes([thread]))

        done = [0] * THREADS
        names = [{{}} for _ in range(THREADS)]
        moments, interrupted = random.Random(7), 0
        for _ in range(24):
            told, tell = os.pipe()
            child = os.fork()
            if child == 0:
                registry = Registry(root)
                for thread in range(THREADS):
                    threading.Thread(target=write, args=(registry, thread, done[thread], tell), daemon=True).start()
                time.sleep(60)
            os.close(tell)
            first = os.read(told, 1)
            time.sleep(moments.uniform(0, 0.1))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            acknowledged = first
            while more := os.read(told, 4096):
                acknowledged += more
            os.close(told)
            left = {{path.name for path in root.glob("blobs/*.part")}}
            with Registry(root) as registry:
                assert not list(root.glob("blobs/*.part"))
                now = {{entry.name: entry.digest for entry in registry.list("expert", "ann")}}
                for entry in registry.list(None, "ann", deleted=True):
                    assert sha256(registry.get(entry.digest)).hexdigest() == entry.digest
            for path in root.glob("blobs/*"):
                assert sha256(path.read_bytes()).hexdigest() == path.name, "a torn blob"
            for thread in range(THREADS):
                def after(count):
                    state = dict(names[thread])
                    for i in range(done[thread], done[thread] + count):
                        name, content = change(thread, i)
                        state.pop(name, None)
                        if content is not None:
                            state[name] = sha256(content).hexdigest()
                    return state
                count = acknowledged.count(thread)
                found = {{name: digest for name, digest in now.items() if name.startswith(f"t{{thread}}-")}}
                assert found in (after(count), after(count + 1)), (thread, count, found)
                if found != after(count):
                    interrupted += 1
                    count += 1
                names[thread], done[thread] = found, done[thread] + count
            interrupted += len(left)
        print(sum(done), "changes,", interrupted, "interrupted")
        assert sum(done) > 50 and interrupted > 0, (done, interrupted)
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    print(run.stdout)


def test_a_crash_at_any_line_of_delete_leaves_the_name_or_its_tombstone(tmp_path: Path):
    program = f"""
        import os, sys
        from hashlib import sha256
        from pathlib import Path
        from metasepia.registry import catalogue as module
        from metasepia.errors import UnknownName
        from metasepia.registry.catalogue import Registry
        root, digest = Path({str(tmp_path)!r}), sha256(b"z").hexdigest()

        def delete_and_die(n, acknowledge):
            left = n
            def trace(frame, event, _):
                nonlocal left
                if frame.f_code.co_filename != module.__file__:
                    return None
                left -= event == "line"
                if left == 0:
                    os.kill(os.getpid(), 9)
                return trace
            registry = Registry(root)
            sys.settrace(trace)
            registry.delete("expert", "maths", "ann")
            os.write(acknowledge, b"x")

        outcomes = []
        for n in range(1, 200):
            with Registry(root) as registry:
                registry.put("expert", b"z", digest=digest, name="maths", owner="ann")
            told, acknowledge = os.pipe()
            child = os.fork()
            if child == 0:
                delete_and_die(n, acknowledge)
                os._exit(0)
            os.close(acknowledge)
            acknowledged = os.read(told, 1) == b"x"
            os.close(told)
            _, status = os.waitpid(child, 0)
            with Registry(root) as registry:
                gone = not registry.list("expert", "ann")
                assert registry.get(digest) == b"z"  # receipts of rows that ran can be replayed
                assert gone or not acknowledged
            outcomes.append((gone, acknowledged))
            if os.WIFEXITED(status):
                break
        assert outcomes[0] == (False, False) and outcomes[-1] == (True, True) and (True, False) in outcomes, outcomes
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_bytes_and_names_are_on_disk_before_the_row_is_committed(registry: Registry, monkeypatch: pytest.MonkeyPatch):
    steps: list[str] = []
    fsync, replace = os.fsync, os.replace

    def recorded_fsync(fd: int) -> None:
        steps.append("sync " + Path(os.readlink(f"/proc/self/fd/{fd}")).name.removeprefix(digest("1")))
        fsync(fd)

    def recorded_replace(source: Path, target: Path) -> None:
        steps.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    registry._db.set_trace_callback(lambda sql: steps.append(sql.split()[0]))
    put(registry, "maths", "1")
    assert [step for step in steps if step != "SELECT"] == [
        *("BEGIN", "sync .part", "rename", "sync blobs", "INSERT", "COMMIT")
    ]
    assert registry._db.execute("PRAGMA synchronous").fetchone()[0] == 2  # FULL: COMMIT syncs the log


def test_a_torn_write_ahead_log_keeps_what_was_committed(tmp_path: Path):
    copy = tmp_path / "copy"
    copy.mkdir()
    with Registry(tmp_path / "registry") as registry:
        put(registry, "maths", "1")
        for file in ("catalogue.sqlite", "catalogue.sqlite-wal"):  # as a power cut would leave them: no checkpoint ran
            (copy / file).write_bytes((registry.root / file).read_bytes())
        (copy / "blobs").mkdir()
        (copy / "blobs" / digest("1")).write_bytes(b"1")
    with (copy / "catalogue.sqlite-wal").open("ab") as wal:
        wal.write(os.urandom(5000))
    with Registry(copy) as registry:
        assert registry.get(registry.resolve("expert", "maths", "ann").digest) == b"1"


def test_a_damaged_or_newer_catalogue_is_refused_in_words(tmp_path: Path):
    Registry(tmp_path).close()
    with sqlite3.connect(tmp_path / "catalogue.sqlite") as db:
        db.execute("PRAGMA user_version=99")
    db.close()
    with pytest.raises(CorruptArtefact, match="its version is 99, this program reads 1"):
        Registry(tmp_path)
    (tmp_path / "catalogue.sqlite").write_bytes(b"not a database, but long enough to be read as one" * 100)
    with pytest.raises(CorruptArtefact, match=r"catalogue.sqlite cannot be used: file is not a database"):
        Registry(tmp_path)


def test_a_full_disk_is_said_in_words_and_stores_nothing(registry: Registry):
    put(registry, "maths", "1")
    pages = registry._db.execute("PRAGMA page_count").fetchone()[0]
    registry._db.execute(f"PRAGMA max_page_count={pages}")  # SQLite's own "database or disk is full"
    with pytest.raises(Unavailable, match="its disk is full: nothing was stored"):
        put(registry, "law", "2", card={"log": "x" * 100_000})
    registry._db.execute("PRAGMA max_page_count=1000000")
    assert [entry.name for entry in registry.list("expert", "ann")] == ["maths"]
    put(registry, "law", "2")


def test_a_disk_that_fills_up_inside_a_blob_is_said_in_words(tmp_path: Path):
    program = f"""
        import resource
        from pathlib import Path
        from metasepia.errors import Unavailable
        from metasepia.registry.catalogue import Registry
        registry = Registry(Path({str(tmp_path)!r}))
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
        try:
            registry.put("factors", bytes(10**6), digest="0" * 64, name=None, owner="ann")
        except Unavailable as error:
            print(error, registry.list(None, "ann"))
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], cwd=ROOT, capture_output=True, text=True)
    assert "its disk is full: nothing was stored" in run.stdout and run.stdout.endswith("()\n"), run.stderr


MOUNTS = r"""
22 1 254:0 / / rw - ext4 /dev/vda rw
23 22 0:40 / /mnt/team rw - nfs4 host:/export rw
24 22 0:41 / /mnt/team/scratch rw - xfs /dev/vdb rw
25 22 0:42 / /mnt/my\040share rw - cifs //host/share rw
26 22 0:43 / /mnt/bucket rw - fuse.s3fs s3fs rw
27 22 0:44 / /mnt/layers rw - fuse.fuse-overlayfs overlay rw
28 22 0:45 / /mnt/late rw - ext4 /dev/vdc rw
29 22 0:46 / /mnt/late rw - lustre mds rw
""".strip()


@pytest.mark.parametrize("root", ["/mnt/team/home", "/mnt/team", "/mnt/my share/a", "/mnt/bucket/a", "/mnt/late/a"])
def test_a_network_filesystem_is_refused_in_words(root: str):
    with pytest.raises(InvalidSettings, match=r"setting home = .* on a local disk .* is a network filesystem \("):
        check_local_disk(Path(root), MOUNTS)


@pytest.mark.parametrize("root", ["/home", "/mnt/teamwork", "/mnt/team/scratch/a", "/mnt/layers/a"])
def test_a_local_filesystem_is_taken(root: str):
    check_local_disk(Path(root), MOUNTS)


def test_the_registry_needs_neither_torch_nor_numpy():
    program = "import json, sys; import metasepia.registry.catalogue; print(json.dumps(sorted(sys.modules)))"
    loaded = json.loads(subprocess.check_output([sys.executable, "-c", program], cwd=ROOT))
    assert not {"torch", "numpy", "ray"} & set(loaded)


def test_a_blob_is_read_beside_the_writer_also_after_its_name_was_deleted(registry: Registry):
    put(registry, "maths", "content")
    registry.delete("expert", "maths", "ann")
    assert read_blob(registry.root, digest("content")) == b"content"
    with pytest.raises(UnknownName):
        read_blob(registry.root, digest("nothing"))
    with pytest.raises(UnknownName):
        read_blob(registry.root / "elsewhere", digest("content"))
    (registry.root / "blobs" / digest("content")).write_bytes(b"changed")
    with pytest.raises(CorruptArtefact, match="missing or has changed"):
        read_blob(registry.root, digest("content"))
