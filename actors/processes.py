"""What rank processes say about themselves, and what the kernel says about them. No torch."""

import os
from dataclasses import dataclass
from pathlib import Path

import ray


@dataclass(frozen=True, kw_only=True)
class Identity:
    """A process beyond doubt: a pid alone may be used again."""

    pid: int
    start_ticks: int
    """When the process started, in clock ticks after boot (/proc/<pid>/stat)."""
    node: str
    """Ray's id of its node."""
    address: str
    """IP address of its node."""
    visible_gpus: str
    """CUDA_VISIBLE_DEVICES, as Ray set it."""

    @classmethod
    def mine(cls) -> "Identity":
        node = ray.get_runtime_context().get_node_id()
        pid = os.getpid()
        ticks = process_state(pid)[1]
        return cls(
            pid=pid,
            start_ticks=ticks,
            node=node,
            address=ray.util.get_node_ip_address(),
            visible_gpus=os.environ.get("CUDA_VISIBLE_DEVICES", ""),
        )


@dataclass(frozen=True, kw_only=True)
class Pulse:
    """What a rank says when it is asked whether it lives."""

    progress: int
    """Transformer blocks run since it joined."""
    busy: bool
    """Inside a step now."""
    failed: str | None
    """Why it can run no more steps; the gang must be replaced."""


@dataclass(frozen=True, kw_only=True)
class Joined:
    """What a rank found itself to be after DeepSpeed cut the model."""

    tp_rank: int
    tp_world_size: int
    """As every cut layer says; 1 where nothing was cut."""
    group_timeout_s: float | None
    shard_shapes: dict[str, tuple[int, ...]]
    """Parameter name to local shape, cut layers only."""
    partition_sizes: dict[str, tuple[int, ...]]
    """Parameter name to the sizes over the ranks."""
    all_reduce: str
    factors: str | None
    seconds: dict[str, float]


def process_state(pid: int) -> tuple[str, int]:
    """State letter and start time of a process of this machine; ("X", 0) when there is none."""
    try:
        # The name in brackets may hold spaces: fields are counted from the last bracket.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "X", 0
    return fields[0], int(fields[19])
