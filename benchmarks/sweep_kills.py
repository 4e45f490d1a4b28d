"""One sweep whose driver, trial or raylet is killed (SIGKILL) at a random moment, and which is then gone on with.

    python -m benchmarks.sweep_kills URI --workers 2 --packs 4 --steps 40

runs the small sweep that is killed, in a process of its own; `disturbed` starts that, kills, and starts it again.
"""

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import psutil

from benchmarks.sweep_fits import Fits, plan_of
from metasepia.sweeps.plan import SweepPlan
from metasepia.sweeps.run import run_pack
from metasepia.sweeps.store import SweepStore

Victim = Literal["driver", "trial", "raylet"]
VICTIMS: tuple[Victim, ...] = get_args(Victim)
ROOT = Path(__file__).parents[1]
GONE_S = 90.0
"""Within so long after a driver's end none of its processes is left: agents of a killed raylet end after 45 s."""
HANGS_S = 90.0


@dataclass(frozen=True, kw_only=True)
class Size:
    """Of the sweep that is killed. A step takes `rounds` descents, about 15 us each: a pack of these about 2 s."""

    packs: int = 6
    steps: int = 80
    rounds: int = 1600

    @property
    def plan(self) -> SweepPlan:
        return plan_of(seeds=2 * self.packs, rates=(0.1,), steps=self.steps, size=2, rounds=self.rounds)


@dataclass(frozen=True, kw_only=True)
class Cycle:
    """What happened in one cycle."""

    victim: Victim
    delay_s: float
    """From the first stored rows to the kill."""
    equal: bool
    """The table's bytes are those of the sweep that nobody disturbed."""
    starts: int
    """Drivers that it took."""
    killed: bool
    """The victim was there to be killed."""
    gone_s: float
    """From the driver's end until none of its processes was left; at most GONE_S."""
    left_over: tuple[str, ...]
    """What was alive then."""
    hung: bool
    """The driver had not ended HANGS_S after the kill, and was killed."""


def undisturbed(plan: SweepPlan, folder: Path) -> bytes:
    """The table's bytes, made in this process, without Ray."""
    store = SweepStore.open(str(folder), plan)
    for one in range(len(plan.packs)):
        run_pack(Fits, store, one)
    return Path(store.write_table()).read_bytes()


def start(folder: Path, size: Size, workers: int) -> subprocess.Popen[bytes]:
    """A driver in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.sweep_kills", str(folder), "--workers", str(workers)]
    command += ["--packs", str(size.packs), "--steps", str(size.steps), "--rounds", str(size.rounds)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def processes(driver: subprocess.Popen[bytes]) -> dict[Victim, list[psutil.Process]]:
    """The driver's processes by what they are; a trial's process bears the name of its function."""
    found: dict[Victim, list[psutil.Process]] = {"driver": [], "trial": [], "raylet": []}
    try:
        tree = [psutil.Process(driver.pid), *psutil.Process(driver.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return found
    for one in tree:
        try:
            if one.pid == driver.pid:
                found["driver"].append(one)
            elif one.name() == "raylet":
                found["raylet"].append(one)
            elif is_trial(one):
                found["trial"].append(one)
        except psutil.NoSuchProcess:
            continue
    return found


def is_trial(one: psutil.Process) -> bool:
    """Ray writes what a worker runs into its title; the class that Tune makes of a function has this name."""
    try:
        return "".join(one.cmdline()[:1]).startswith("ray::ImplicitFunc")
    except psutil.NoSuchProcess:
        return False


def disturbed(
    folder: Path, victim: Victim, *, size: Size, expected: bytes, seed: int, workers: int = 2, window_s: float = 5.0
) -> Cycle:
    """Kills `victim` between 0 and `window_s` after the first rows are stored, and goes on until the table is there."""
    delay_s = random.Random(f"sweep-kill-{seed}").uniform(0, window_s)
    driver = start(folder, size, workers)
    while driver.poll() is None and not list(folder.glob("packs/*/rows-*")):
        time.sleep(0.02)
    time.sleep(delay_s)
    victims, tree = processes(driver)[victim], _tree(driver.pid)
    if victims:
        victims[seed % len(victims)].send_signal(signal.SIGKILL)
    hung, starts, ended_s = _ends(driver), 1, time.monotonic()
    left_over = _left_over(tree)
    gone_s = time.monotonic() - ended_s
    while not (folder / "table.parquet").is_file() and starts < 4:
        driver, starts = start(folder, size, workers), starts + 1
        driver.wait()
    table = folder / "table.parquet"
    equal = table.is_file() and table.read_bytes() == expected
    return Cycle(
        **{"victim": victim, "delay_s": delay_s, "killed": bool(victims), "equal": equal, "starts": starts},
        **{"gone_s": gone_s, "left_over": left_over, "hung": hung},
    )


def _tree(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _ends(driver: subprocess.Popen[bytes]) -> bool:
    """Waits until it has ended; True where it had to be killed."""
    try:
        driver.wait(HANGS_S)
    except subprocess.TimeoutExpired:
        driver.kill()
        driver.wait()
        return True
    return False


def _left_over(tree: list[psutil.Process]) -> tuple[str, ...]:
    _, alive = psutil.wait_procs(tree, timeout=GONE_S)
    names = []
    for one in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            names += [one.name()] if one.status() != psutil.STATUS_ZOMBIE else []
    return tuple(names)


def main(argv: Sequence[str] | None = None) -> int:
    from jobs.sweeping import run_sweep

    p = argparse.ArgumentParser(prog="python -m benchmarks.sweep_kills", description=(__doc__ or "").split("\n\n")[0])
    p.add_argument("uri")
    p.add_argument("--workers", type=int, default=2)
    for name in ("packs", "steps", "rounds"):
        p.add_argument(f"--{name}", type=int, default=getattr(Size(), name))
    arguments = p.parse_args(argv)
    size = Size(packs=arguments.packs, steps=arguments.steps, rounds=arguments.rounds)
    swept = run_sweep(size.plan, arguments.uri, "benchmarks.sweep_fits:Fits", workers=arguments.workers)
    print(swept)
    return 0


if __name__ == "__main__":
    sys.exit(main())
