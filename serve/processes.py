"""Every process of one start, found by a mark in its environment, and ended by pid: none outlives `make serve`.

Children inherit the environment, so the mark reaches Ray's daemons and workers however deep they are and whoever
adopted them. Process groups do not: Ray's workers leave theirs.
"""

import os
import signal
import time
from collections.abc import Sequence

import psutil

MARK = "RUN_OF_METASEPIA"
"""Environment variable whose value names one start; names that begin with METASEPIA_ are settings."""


def marked(run: str) -> list[psutil.Process]:
    """The living processes of a start, without this one."""
    found: list[psutil.Process] = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get(MARK) == run and lives(process):
                found.append(process)
        except (psutil.Error, OSError):  # it ended meanwhile, or is another user's
            continue
    return found


def lives(process: psutil.Process) -> bool:
    """False also for a zombie: it has ended, and its parent has not looked yet."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def end(run: str, *, polite_s: float, timeout_s: float = 10.0) -> list[int]:
    """Ends what is left of a start: waits `polite_s` for it to end by itself, then kills. Returns the pids killed."""
    give_up = time.monotonic() + polite_s
    while (left := marked(run)) and time.monotonic() < give_up:
        time.sleep(0.2)
    killed: set[int] = set()
    give_up = time.monotonic() + timeout_s
    while (left := marked(run)) and time.monotonic() < give_up:  # again: a killed parent may have just forked
        killed |= kill(left)
        psutil.wait_procs(left, timeout=0.5)
    return sorted(killed)


def kill(processes: Sequence[psutil.Process]) -> set[int]:
    """SIGKILL by pid; psutil checks that the pid still is the same process."""
    killed: set[int] = set()
    for process in processes:
        try:
            process.send_signal(signal.SIGKILL)
            killed.add(process.pid)
        except psutil.NoSuchProcess:
            continue
    return killed
