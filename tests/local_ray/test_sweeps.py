"""A sweep's table is the same bytes for any number of workers, and whatever is killed on the way."""

import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest

from benchmarks import sweep_kills
from benchmarks.sweep_fits import Fits, plan_of
from jobs.sweeping import INTERRUPTED, MAX_DEATHS, Asha, Swept, run_sweep
from metasepia.errors import CannotPlace
from metasepia.sweeps.failures import PacksFailed, StorageFailed
from metasepia.sweeps.plan import SweepPlan
from metasepia.sweeps.store import SweepStore

SIZE = sweep_kills.Size(packs=4, steps=24, rounds=2500)
"""About a second a pack, so that there is something to kill."""
WORK = "benchmarks.sweep_fits:Fits"


class Dies(Fits):
    """Its process ends, as one that is out of memory does, when pack 1 has made two steps."""

    def advance(self, until: int) -> None:
        if self.step >= 2 and self._trials[0]["seed"] == 2:
            os._exit(9)
        super().advance(until)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return sweep_kills.undisturbed(SIZE.plan, tmp_path_factory.mktemp("undisturbed"))


def sweep(folder: Path, plan: SweepPlan = SIZE.plan, work: str = WORK, *, workers: int = 2, **more: Any) -> Swept:
    return run_sweep(plan, str(folder), work, workers=workers, progress=False, **more)


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_the_table_is_byte_equal_for_any_number_of_workers(tmp_path: Path, expected: bytes, workers: int):
    swept = sweep(tmp_path, workers=workers)
    assert (swept.workers, swept.num_run, swept.num_deaths) == (workers, 4, 0)
    assert Path(swept.table).read_bytes() == expected
    assert sweep(tmp_path).num_run == 0, "what is done is not run again"


@pytest.mark.usefixtures("cluster")
def test_a_killed_trial_is_begun_again_and_leaves_no_trace(tmp_path: Path, expected: bytes):
    killed: list[int] = []

    def kill_one() -> None:
        until(lambda: list(tmp_path.glob("packs/*/rows-*")))
        trials = [one for one in psutil.Process().children(recursive=True) if sweep_kills.is_trial(one)]
        trials[0].send_signal(signal.SIGKILL)
        killed.append(trials[0].pid)

    thread = threading.Thread(target=kill_one)
    thread.start()
    swept = sweep(tmp_path)
    thread.join()
    assert killed and swept.num_deaths == 1
    assert Path(swept.table).read_bytes() == expected


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(
    "number", [signal.SIGKILL, *(pytest.param(one, marks=pytest.mark.soak) for one in (signal.SIGINT, signal.SIGTERM))]
)
def test_after_an_end_of_the_driver_another_cluster_goes_on_in_a_moved_folder(
    tmp_path: Path, expected: bytes, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
):
    """SIGINT as from Ctrl-C, which also leaves no process and no scratch."""
    (scratch := tmp_path / "scratch").mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))  # of the driver
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")  # its sockets want a short path
    driver = sweep_kills.start(tmp_path / "here", SIZE, workers=2)
    try:
        until(lambda: list(tmp_path.glob("here/packs/*/rows-*")) or driver.poll() is not None)
        driver.send_signal(signal.SIGSTOP)  # its trials wait for it, so that the sweep cannot end while we look
        tree = psutil.Process(driver.pid).children(recursive=True)
        assert list(scratch.glob("metasepia-tune-*"))
        driver.send_signal(number)
        driver.send_signal(signal.SIGCONT)
        status = driver.wait(100)
    finally:
        driver.kill()
    assert not (tmp_path / "here/table.parquet").exists()
    shutil.move(tmp_path / "here", tmp_path / "there")
    if number != signal.SIGKILL:
        assert status == INTERRUPTED
        _, alive = psutil.wait_procs(tree, timeout=60)
        assert not [one for one in alive if one.status() != psutil.STATUS_ZOMBIE]
        assert not list(scratch.glob("metasepia-tune-*"))
    swept = sweep(tmp_path / "there")
    assert Path(swept.table).read_bytes() == expected


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(10))
def test_whatever_is_killed_at_random_the_table_is_byte_equal(tmp_path: Path, seed: int):
    size = sweep_kills.Size()
    undisturbed = sweep_kills.undisturbed(size.plan, tmp_path / "undisturbed")
    victim = sweep_kills.VICTIMS[seed % 3]
    cycle = sweep_kills.disturbed(tmp_path / "killed", victim, size=size, expected=undisturbed, seed=seed)
    assert cycle.equal and cycle.killed and not cycle.hung and not cycle.left_over, cycle


@pytest.mark.usefixtures("cluster")
def test_a_pack_that_raises_or_dies_is_named_and_the_others_are_done(tmp_path: Path):
    quick = sweep_kills.Size(packs=4, steps=8, rounds=1).plan
    trials = [{**one, "breaks_at": 3 if one["seed"] == 1 else -1} for one in quick.trials]
    plan = SweepPlan("fits", {}, tuple(trials), quick.packs)
    with pytest.raises(PacksFailed) as caught:
        sweep(tmp_path, plan, "tests.local_ray.test_sweeps:Dies")
    assert "2 of 4 packs failed" in str(caught.value)
    assert "pack 0: ZeroDivisionError: a bug at step 3" in caught.value.problems[0]
    assert f"pack 1: its process died {MAX_DEATHS} times in a row" in caught.value.problems[1]
    store = SweepStore.read(str(tmp_path))
    assert [store.done(pack) for pack in range(4)] == [False, False, True, True]


@pytest.mark.usefixtures("cluster")
def test_asha_stops_trials_records_it_and_the_table_says_that_it_promises_nothing(tmp_path: Path):
    plan = plan_of(seeds=6, rates=(0.3,), size=1, steps=16)
    swept = sweep(tmp_path, plan, asha=Asha(metric="error", grace_steps=4, reduction_factor=2))
    assert 1 <= swept.num_given_up < 6
    assert b"timing" in pq.read_schema(swept.table).metadata[b"partial"]
    again = sweep(tmp_path, plan, asha=Asha(metric="error", grace_steps=4, reduction_factor=2))
    assert (again.num_run, again.num_given_up) == (0, swept.num_given_up)
    whole = sweep(tmp_path, plan)  # without it those are run to their end, and the promise is back
    assert (whole.num_run, whole.num_given_up) == (swept.num_given_up, 0)
    assert Path(whole.table).read_bytes() == sweep_kills.undisturbed(plan, tmp_path / "undisturbed")


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("asked, said", [({"gpus_per_trial": 0.5}, "0.5 GPU"), ({"cpus_per_trial": 99}, "99 CPU")])
def test_what_no_node_has_is_refused_and_nothing_is_run(tmp_path: Path, asked: dict[str, Any], said: str):
    with pytest.raises(CannotPlace, match=said):
        sweep(tmp_path, **asked)
    assert not (tmp_path / "packs").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real filesystem of 64 KiB, where this machine lets us mount one."""
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.usefixtures("cluster")
def test_a_full_disk_stops_the_sweep_in_words_and_it_goes_on_with_room(small_disk: Path, expected: bytes):
    (small_disk / "ballast").write_bytes(bytes(30_000))
    with pytest.raises(StorageFailed, match="No space left on device"):
        sweep(small_disk / "sweep")
    (small_disk / "ballast").unlink()
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    assert Path(sweep(small_disk / "sweep").table).read_bytes() == expected


def until(true: Callable[[], Any], timeout_s: float = 150.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)
