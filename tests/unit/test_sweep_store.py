"""Objects are written once and whole; what is torn, foreign or of another sweep is named; a kill loses no byte."""

import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
import torch

from benchmarks.sweep_fits import Fits, plan_of
from metasepia.errors import CorruptArtefact, InvalidSettings, NotSupported
from metasepia.sweeps import files
from metasepia.sweeps.failures import StorageFailed
from metasepia.sweeps.plan import SweepPlan
from metasepia.sweeps.run import find_work, run_pack
from metasepia.sweeps.store import KEY, ROWS, SweepStore

PLAN = plan_of()


class Killed(BaseException):
    """Ends a run as a kill does: nothing after it is executed."""


def run_all(uri: str, plan: SweepPlan = PLAN, order: Callable[[int], range] = range) -> bytes:
    """The table's bytes after all packs ran in this process."""
    store = SweepStore.open(uri, plan)
    for one in order(len(plan.packs)):
        run_pack(Fits, store, one)
    return Path(store.write_table().removeprefix("file://")).read_bytes()


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return run_all(str(tmp_path_factory.mktemp("undisturbed")))


def test_the_table_says_what_the_trials_say_alone(table: bytes):
    rows = pq.read_table(pa.BufferReader(table)).to_pylist()
    assert [tuple(row[name] for name in KEY) for row in rows] == sorted(
        tuple(row[name] for name in KEY) for row in rows
    )
    assert len(rows) == len(PLAN.trials) * 5
    for index in (0, 7):
        alone = Fits([PLAN.trials[index]], "cpu")
        for stop in alone.stops:
            alone.advance(stop)
            [found] = [row for row in rows if (row["trial"], row["step"]) == (index, stop)]
            assert found["value"] == pytest.approx(alone.measure()["value"][0].as_py(), rel=1e-5)


def test_the_order_in_which_packs_finish_leaves_no_trace(tmp_path: Path, table: bytes):
    assert run_all(str(tmp_path), order=lambda n: range(n)[::-1]) == table


def test_the_table_carries_its_plan_and_no_time_or_machine(table: bytes):
    metadata = pq.read_schema(pa.BufferReader(table)).metadata
    assert set(metadata) == {b"plan", b"sweep"}
    assert metadata[b"sweep"].decode() == PLAN.digest


def test_a_sweep_killed_before_any_of_its_writes_goes_on_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    plan = plan_of(seeds=2, rates=(0.1,), steps=2)
    undisturbed = run_all(str(tmp_path / "undisturbed"), plan)
    number = sum(path.is_file() for path in (tmp_path / "undisturbed").rglob("*")) + 2  # two states were forgotten
    whole = files.Files.write
    for at in range(number):
        left = iter([True] * at + [False])

        def write(self: files.Files, name: str, content: bytes, *, if_absent: bool = False, left: Any = left) -> None:
            if not next(left):
                raise Killed
            whole(self, name, content, if_absent=if_absent)

        monkeypatch.setattr(files.Files, "write", write)
        with pytest.raises(Killed):
            run_all(str(tmp_path / str(at)), plan)
        monkeypatch.setattr(files.Files, "write", whole)
        assert run_all(str(tmp_path / str(at)), plan) == undisturbed, f"killed before write {at}"


def test_a_pack_goes_on_from_its_latest_state_and_not_from_the_start(tmp_path: Path):
    store = SweepStore.open(str(tmp_path), PLAN)
    seen: list[int] = []

    def stop_at_four(step: int, rows: pa.Table | None) -> None:
        if step == 4:
            raise Killed

    with pytest.raises(Killed):
        run_pack(Fits, store, 0, stop_at_four)
    assert run_pack(Fits, store, 0, lambda step, rows: seen.append(step)) == 4
    assert seen == [4, 6, 8]
    assert [one.step for one in store._stored(0) if one.kind == "state"] == [8], "earlier states are forgotten"


def test_a_moved_folder_goes_on(tmp_path: Path, table: bytes):
    store = SweepStore.open(str(tmp_path / "here"), PLAN)
    run_pack(Fits, store, 0)
    shutil.move(tmp_path / "here", tmp_path / "a new place")
    moved = SweepStore.read(str(tmp_path / "a new place"))
    assert moved.done(0) and not moved.done(1)
    assert run_all(str(tmp_path / "a new place")) == table
    assert str(tmp_path).encode() not in table


@pytest.mark.parametrize("scheme", ["file", "memory"])
def test_a_uri_and_a_filesystem_without_renames_give_the_same_table(tmp_path: Path, table: bytes, scheme: str):
    if scheme == "file":
        assert run_all(f"file://{tmp_path}/a") == table
        return
    memory = pafs._MockFileSystem()  # one put a file, as object stores do
    store = SweepStore.open("bucket/a", PLAN, memory)
    for one in range(len(PLAN.packs)):
        run_pack(Fits, store, one)
    store.write_table()
    with memory.open_input_stream("bucket/a/table.parquet") as stream:
        assert stream.read() == table
    stored = memory.get_file_info(pafs.FileSelector("bucket", recursive=True))
    assert not [info.path for info in stored if info.base_name.startswith(".")]


# -- bad directories


def test_the_folder_of_another_sweep_is_refused_with_both_digests(tmp_path: Path):
    SweepStore.open(str(tmp_path), PLAN)
    other = plan_of(steps=12)
    with pytest.raises(InvalidSettings, match=f"{other.digest[:12]}.*holds the sweep {PLAN.digest[:12]}"):
        SweepStore.open(str(tmp_path), other)
    assert SweepStore.read(str(tmp_path)).plan.digest == PLAN.digest


@pytest.mark.parametrize("damage", ["half", "empty", "edited", "not a manifest"])
def test_a_damaged_manifest_is_named_and_the_way_out_keeps_the_packs(tmp_path: Path, table: bytes, damage: str):
    store = SweepStore.open(str(tmp_path), PLAN)
    run_pack(Fits, store, 0)
    manifest = tmp_path / "manifest.json"
    content = manifest.read_bytes()
    damaged = {
        "half": content[: len(content) // 2],
        "empty": b"",
        "edited": content.replace(b'"steps":8', b'"steps":9'),
        "not a manifest": b"[1, 2]",
    }
    manifest.write_bytes(damaged[damage])
    with pytest.raises(CorruptArtefact, match=r"manifest\.json.*delete it and start the same sweep again"):
        SweepStore.open(str(tmp_path), PLAN)
    manifest.unlink()
    assert SweepStore.open(str(tmp_path), PLAN).done(0)
    assert run_all(str(tmp_path)) == table


def test_a_manifest_of_a_later_format_is_refused(tmp_path: Path):
    SweepStore.open(str(tmp_path), PLAN)
    manifest = tmp_path / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"format":1', b'"format":2'))
    with pytest.raises(NotSupported, match="format 2"):
        SweepStore.read(str(tmp_path))


def test_packs_of_another_sweep_under_our_manifest_are_named(tmp_path: Path):
    run_all(str(tmp_path / "theirs"), plan_of(steps=4))
    store = SweepStore.open(str(tmp_path / "ours"), PLAN)
    shutil.copytree(tmp_path / "theirs" / "packs", tmp_path / "ours" / "packs")
    with pytest.raises(CorruptArtefact, match=r"done\.json.*of the sweep"):
        store.done(0)
    (tmp_path / "ours" / "packs" / "00000" / "done.json").unlink()
    with pytest.raises(CorruptArtefact, match=r"state-.*of the sweep"):
        run_pack(Fits, store, 0)


@pytest.mark.parametrize("uri", ["", "ftp://x/y", "s4://bucket/x"])
def test_a_uri_that_nothing_knows_is_refused(uri: str):
    with pytest.raises(InvalidSettings, match="uri"):
        SweepStore.open(uri, PLAN)


def test_a_file_and_a_foreign_table_are_not_written_over(tmp_path: Path):
    (tmp_path / "table.parquet").write_bytes(b"mine")
    with pytest.raises(InvalidSettings, match=r"without a table\.parquet"):
        SweepStore.open(str(tmp_path), PLAN)
    with pytest.raises(InvalidSettings, match="a folder; this is a file"):
        SweepStore.open(str(tmp_path / "table.parquet"), PLAN)
    assert (tmp_path / "table.parquet").read_bytes() == b"mine"


def test_a_folder_without_a_sweep_cannot_be_read(tmp_path: Path):
    with pytest.raises(InvalidSettings, match=r"with its manifest\.json"):
        SweepStore.read(str(tmp_path))


# -- torn objects


@pytest.mark.parametrize("kind", ["rows", "state", "done"])
def test_a_torn_object_of_an_unfinished_pack_is_written_again(tmp_path: Path, table: bytes, kind: str):
    store = SweepStore.open(str(tmp_path), PLAN)
    with pytest.raises(Killed):
        run_pack(Fits, store, 0, _kill_after(6))
    if kind == "done":
        (tmp_path / "packs/00000/done.json").write_bytes(b'{"rows":{"0"')
    else:
        torn = sorted((tmp_path / "packs/00000").glob(f"{kind}-*"))[0]
        torn.write_bytes(torn.read_bytes()[:-7])
    assert run_all(str(tmp_path)) == table


def test_torn_rows_of_a_finished_pack_are_named_and_made_again_once_deleted(tmp_path: Path, table: bytes):
    assert run_all(str(tmp_path)) == table
    torn = sorted((tmp_path / "packs/00001").glob("rows-*"))[2]
    torn.write_bytes(torn.read_bytes()[:100])
    store = SweepStore.read(str(tmp_path))
    with pytest.raises(CorruptArtefact, match=torn.name):
        store.table()
    torn.unlink()
    assert not store.done(1)
    assert run_all(str(tmp_path)) == table


def test_the_same_step_with_other_figures_is_an_error_and_with_the_same_is_none(tmp_path: Path):
    store = SweepStore.open(str(tmp_path), PLAN)
    work = Fits(PLAN.trials_of(0), "cpu")
    store.put_rows(0, 0, work.measure())
    store.put_rows(0, 0, work.measure())
    work._w += 1
    with pytest.raises(CorruptArtefact, match="step 0 of pack 0, computed again, gave other bytes"):
        store.put_rows(0, 0, work.measure())
    assert len(list((tmp_path / "packs/00000").iterdir())) == 1


def test_a_filesystem_without_hard_links_holds_a_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def no_links(source: Path, target: Path) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr("os.link", no_links)
    SweepStore.open(str(tmp_path), PLAN)
    first = (tmp_path / "manifest.json").read_bytes()
    files.Files.at(str(tmp_path)).write("manifest.json", b"another", if_absent=True)
    assert (tmp_path / "manifest.json").read_bytes() == first
    assert [one.name for one in tmp_path.iterdir()] == ["manifest.json"]


def test_what_killed_writers_left_is_cleared_when_the_pack_is_done(tmp_path: Path):
    store = SweepStore.open(str(tmp_path), PLAN)
    (tmp_path / "packs/00000").mkdir(parents=True)
    (tmp_path / "packs/00000/.rows-00000000-aa.parquet.12345678").write_bytes(b"half")
    (tmp_path / "packs/00000/.snapshot").mkdir()  # as some file servers have in every folder
    run_pack(Fits, store, 0)
    assert [one.name for one in (tmp_path / "packs/00000").glob(".*")] == [".snapshot"]


# -- measures


def _measured(**columns: list) -> pa.Table:
    table = Fits(PLAN.trials_of(0), "cpu").measure()
    for name, values in columns.items():
        table = table.set_column(table.column_names.index(name), name, pa.array(values))
    return table


@pytest.mark.parametrize(
    "table, said",
    [
        (_measured().drop_columns(["status"]), "columns trial, step"),
        (_measured(trial=[0, 1, 3]), "a place in the pack of 3"),
        (_measured(trial=[0, 1, 1]), "one row for each of"),
        (_measured(step=[0, 0, 1]), "0, where the work is"),
        (_measured(value=[0.0, None, 1.0]), "without nulls"),
        (_measured(value=["a", "b", "c"]), "measure"),
    ],
)
def test_a_measurement_that_the_table_cannot_hold_is_refused(tmp_path: Path, table: pa.Table, said: str):
    store = SweepStore.open(str(tmp_path), PLAN)
    with pytest.raises(InvalidSettings, match=said):
        store.put_rows(0, 0, table)


def test_a_diverging_trial_is_recorded_and_its_neighbours_go_on(tmp_path: Path):
    plan = plan_of(rates=(0.1, 60.0), steps=40, size=12)
    together = SweepPlan("fits", {}, plan.trials, (tuple(range(12)),))
    run_all(str(tmp_path), together)
    last = [row for row in SweepStore.read(str(tmp_path)).table().to_pylist() if row["step"] == 40]
    assert [row["status"] for row in last] == ["ok"] * 6 + ["diverged"] * 6
    assert all(row["value"] != row["value"] for row in last[6:])


# -- disk full


class Full(pafs.FileSystemHandler):
    """An in-memory filesystem whose disk is full after so many bytes; what does not fit is half-written."""

    def __init__(self, room: int) -> None:
        self.inner, self.room = pafs._MockFileSystem(), room

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def get_type_name(self) -> str:
        return "full"

    def open_output_stream(self, path: str, metadata: Any) -> Any:
        outer, inner = self, self.inner.open_output_stream(path)

        class Stream:
            closed = False

            def write(self, data: Any) -> int:
                data = bytes(data)
                inner.write(data[: outer.room])
                outer.room -= len(data)
                if outer.room < 0:
                    outer.room = 0
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return len(data)

            def close(self) -> None:
                inner.close()
                self.closed = True

            def flush(self) -> None:
                inner.flush()

            def writable(self) -> bool:
                return True

        return pa.PythonFile(Stream(), mode="w")

    def get_file_info(self, paths: Any) -> Any:
        return self.inner.get_file_info(paths)

    def get_file_info_selector(self, selector: Any) -> Any:
        return self.inner.get_file_info(selector)

    def create_dir(self, path: str, recursive: bool) -> None:
        self.inner.create_dir(path, recursive=recursive)

    def delete_file(self, path: str) -> None:
        self.inner.delete_file(path)

    def open_input_stream(self, path: str) -> Any:
        return self.inner.open_input_stream(path)

    def delete_dir(self, path: str) -> None: ...
    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None: ...
    def delete_root_dir_contents(self) -> None: ...
    def move(self, src: str, dest: str) -> None: ...
    def copy_file(self, src: str, dest: str) -> None: ...
    def open_input_file(self, path: str) -> Any: ...
    def open_append_stream(self, path: str, metadata: Any) -> Any: ...
    def normalize_path(self, path: str) -> str:
        return path


def test_a_full_disk_is_said_and_leaves_what_was_whole(table: bytes):
    handler = Full(room=26_000)
    disk = pafs.PyFileSystem(handler)
    store = SweepStore.open("sweep", PLAN, disk)
    with pytest.raises(StorageFailed, match="No space left on device; nothing that was whole is lost"):
        for one in range(len(PLAN.packs)):
            run_pack(Fits, store, one)
    assert 0 < len([one for one in range(len(PLAN.packs)) if store.done(one)]) < len(PLAN.packs)
    kept = [store._read(0, one) is not None for one in store._stored(0) if one.kind == "rows"]
    assert kept and all(kept)
    handler.room = 10**9
    for one in range(len(PLAN.packs)):
        run_pack(Fits, store, one)
    store.write_table()
    with handler.inner.open_input_stream("sweep/table.parquet") as stream:
        assert stream.read() == table


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real filesystem of 64 KiB, where this machine lets us mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() or subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True
    ).returncode:  # fmt: skip
        pytest.skip("mounting a tmpfs is not permitted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_real_full_disk_is_said_and_the_sweep_goes_on_when_there_is_room(small_disk: Path, table: bytes):
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(30_000))
    with pytest.raises(StorageFailed, match="No space left on device"):
        run_all(str(small_disk / "sweep"))
    assert not list(small_disk.rglob(".*")), "the half-written file is gone"
    ballast.unlink()
    shutil.copytree(small_disk / "sweep", small_disk.parent / "larger")
    assert run_all(str(small_disk.parent / "larger")) == table


def test_a_read_only_folder_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(files, "_write_locally", refuse)
    with pytest.raises(StorageFailed, match=r"manifest\.json: Permission denied"):
        SweepStore.open(str(tmp_path), PLAN)


# -- the loop


@pytest.mark.parametrize("name", ["Fits", "benchmarks.sweep_fits:Nothing", "no.such:Thing", ":"])
def test_a_work_that_cannot_be_found_is_refused(name: str):
    with pytest.raises(InvalidSettings, match="module:Class"):
        find_work(name)


def test_a_work_with_wrong_stops_or_that_stands_still_is_refused(tmp_path: Path):
    store = SweepStore.open(str(tmp_path), PLAN)

    class Backwards(Fits):
        def __init__(self, trials: Any, device: str) -> None:
            super().__init__(trials, device)
            self.stops = (4, 2)

    class Still(Fits):
        def advance(self, until: int) -> None: ...

    with pytest.raises(InvalidSettings, match="stops"):
        run_pack(Backwards, store, 0)
    with pytest.raises(InvalidSettings, match="advance"):
        run_pack(Still, store, 0)


def test_listening_to_steps_cuts_advance_and_changes_no_byte(tmp_path: Path, table: bytes):
    store = SweepStore.open(str(tmp_path), PLAN)
    heard: list[tuple[int, int]] = []
    for one in range(len(PLAN.packs)):
        run_pack(Fits, store, one, on_step=lambda step, last: heard.append((step, last)))
    assert heard[0] == (0, 8)
    assert Path(store.write_table()).read_bytes() == table


def test_a_table_of_an_unfinished_sweep_is_refused_unless_partial(tmp_path: Path):
    store = SweepStore.open(str(tmp_path), PLAN)
    run_pack(Fits, store, 0)
    with pytest.raises(InvalidSettings, match="3 of its 4 packs are not done"):
        store.table()
    assert set(store.table(partial=True)["trial"].to_pylist()) == set(PLAN.packs[0])
    assert store.table(partial=True).schema.equals(ROWS)


def test_states_are_stored_as_they_were(tmp_path: Path):
    store = SweepStore.open(str(tmp_path), PLAN)
    flat = torch.arange(6.0)
    store.put_state(0, 3, {"a": flat[:4].view(2, 2), "b": flat[2:], "t": flat.view(2, 3).T})  # they share bytes
    found = store.latest(0, (3,))
    assert found is not None and found[0] == 3
    assert torch.equal(found[1]["a"], flat[:4].view(2, 2)) and torch.equal(found[1]["t"], flat.view(2, 3).T)


def _kill_after(at: int) -> Callable[[int, pa.Table | None], None]:
    def kill(step: int, rows: pa.Table | None) -> None:
        if step == at:
            raise Killed

    return kill
