"""What this machine gives us, as its kernel says: CPUs and memory within our control group, and its clock."""

import ctypes
import os
import re
from pathlib import Path

_UNSYNCHRONISED = 0x40
"""STA_UNSYNC of adjtimex(2)."""


def real_cpus(root: Path = Path("/sys/fs/cgroup")) -> float:
    """Those that we may run on, and no more than the control group's quota."""
    usable = float(len(os.sched_getaffinity(0)))
    try:
        quota, period = (root / "cpu.max").read_text().split()
    except (OSError, ValueError):
        return usable
    return usable if quota == "max" else min(usable, int(quota) / int(period))


def free_memory(meminfo: str, root: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that processes may still take: what the machine has available, and what the control group allows."""
    available = int(re.findall(r"^MemAvailable:\s+(\d+) kB", meminfo, re.MULTILINE)[0]) * 1024
    try:
        limit, used = (root / "memory.max").read_text().strip(), int((root / "memory.current").read_text())
    except (OSError, ValueError):
        return available
    return available if limit == "max" else min(available, max(0, int(limit) - used))


def kernel_clock() -> bool | None:
    """What adjtimex(2) says; None where it says nothing."""
    buffer = ctypes.create_string_buffer(512)  # struct timex, modes 0: nothing is changed
    try:
        state = ctypes.CDLL(None, use_errno=True).adjtimex(buffer)
    except (OSError, AttributeError):
        return None
    if state < 0:
        return None
    status = ctypes.c_int.from_buffer(buffer, 5 * ctypes.sizeof(ctypes.c_long)).value
    return not status & _UNSYNCHRONISED
