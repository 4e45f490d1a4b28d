"""Sum of float32 tensors over the ranks of one gang on one machine: shared memory without a name, with a deadline.

gloo takes a millisecond for the few kilobytes that a decoding step reduces, sixty times a step; this a tenth of it.
The memory is a memfd that rank 0 opens and its peers reach through /proc, so there is no file to be left over. Each
rank writes its part, publishes a counter, waits for its peers' counters, then adds all parts in rank order: the result
is the same on every rank to the last bit. Two halves are used in turn: a rank that writes half A again has seen every
peer publish half B, and so nobody still reads A. Publishing relies on x86's store order; elsewhere `connect` says no.
"""

import itertools
import mmap
import os
import platform
import secrets
import time
from pathlib import Path

import torch
import torch.distributed as dist

CHUNK = 1 << 18
"""Elements that one exchange carries: 1 MiB. Larger tensors go in several."""
PAGE = 4096
SPIN_S = 2e-3
NAP_S = 2e-4
_connects = itertools.count()
"""All ranks call `connect` in the same order, so a number names one call on each of them."""


class SharedMemoryAllReduce:
    """In-place sum over `world` ranks of one machine. Every rank calls it in the same order with the same shape."""

    def __init__(self, memory: mmap.mmap, rank: int, world: int, timeout_s: float) -> None:
        self._rank, self._world, self._timeout_s = rank, world, timeout_s
        self._memory = memory
        # One cache line a counter, so that ranks do not slow each other down by publishing.
        self._counters = torch.frombuffer(memory, dtype=torch.int64, count=PAGE // 8).numpy()[8 : 8 * (world + 1) : 8]
        parts = torch.frombuffer(memory, dtype=torch.float32, offset=PAGE, count=2 * world * CHUNK)
        self._parts = parts.view(2, world, CHUNK)
        self._turn = 0

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` (float32, contiguous, CPU) becomes the sum. TimeoutError when a peer is silent for `timeout_s`."""
        flat = tensor.view(-1)
        for start in range(0, flat.numel(), CHUNK):
            self._exchange(flat[start : start + CHUNK])
        return tensor

    def takes(self, tensor: torch.Tensor) -> bool:
        """Whether it can sum this tensor; the others are torch's to sum. The same answer on every rank."""
        return tensor.dtype == torch.float32 and tensor.is_contiguous() and tensor.device.type == "cpu"

    def _exchange(self, piece: torch.Tensor) -> None:
        self._turn += 1
        half, length = self._parts[self._turn % 2], piece.numel()
        half[self._rank, :length].copy_(piece)
        self._counters[self._rank] = self._turn
        self._wait()
        torch.sum(half[:, :length], dim=0, out=piece)

    def _wait(self) -> None:
        counters, turn = self._counters, self._turn
        if counters.min() >= turn:
            return
        begin = time.monotonic()
        while counters.min() < turn:
            waited = time.monotonic() - begin
            if waited > self._timeout_s:
                silent = [rank for rank in range(self._world) if counters[rank] < turn]
                raise TimeoutError(f"all-reduce: rank {silent} did not answer within {self._timeout_s:g} s")
            time.sleep(0 if waited < SPIN_S else NAP_S)  # lets this process's other threads run: a pulse, say
            os.sched_yield()  # and others on this core: perhaps the peer that we wait for


def connect(rank: int, world: int, timeout_s: float) -> SharedMemoryAllReduce | None:
    """The gang's shared all-reduce, or None on every rank when one of them cannot reach it (other machine, not x86).

    Needs torch's default process group; all ranks call it.
    """
    # A key used twice would give a peer that is early the memory of the call before.
    size, key = PAGE + 2 * world * CHUNK * 4, f"metasepia-allreduce-{next(_connects)}"
    store = dist.distributed_c10d._get_default_store()
    memory: mmap.mmap | None = None
    fd = -1
    usable = platform.machine() in ("x86_64", "AMD64") and hasattr(os, "memfd_create") and world <= PAGE // 64 - 1
    if rank == 0:
        token = secrets.token_hex(16)
        if usable:
            fd = os.memfd_create(key, os.MFD_CLOEXEC)
            os.ftruncate(fd, size)
            memory = mmap.mmap(fd, size)
            memory[:32] = token.encode()
        store.set(key, f"{os.getpid()} {fd} {token}")
    else:
        pid, remote_fd, token = store.get(key).decode().split()
        memory = _open_peer(Path(f"/proc/{pid}/fd/{remote_fd}"), size, token) if usable else None
    agreed = torch.tensor([0 if memory is None else 1])
    dist.all_reduce(agreed, op=dist.ReduceOp.MIN)  # also the barrier after which rank 0 may close its descriptor
    if fd >= 0:
        os.close(fd)
    if not int(agreed) or memory is None:
        return None
    return SharedMemoryAllReduce(memory, rank, world, timeout_s)


def _open_peer(path: Path, size: int, token: str) -> mmap.mmap | None:
    try:
        with path.open("r+b") as file:
            memory = mmap.mmap(file.fileno(), size)
    except (OSError, ValueError):
        return None
    # The same pid and descriptor on another machine would be some other file.
    return memory if memory[:32] == token.encode() else None
